"""Teachers' features computed once: K augmented views of N records in ArrayRecord shards, read back as batches.

A folder holds `views-SSSSS-of-NNNNN.array_record` shards, `chain-TEACHER.safetensors` where a teacher was distilled
itself, and `manifest.json`, written last: the recipe, the teachers' specs, and count, bytes and sha256 of every shard.
Entry v * N + i is view v of record i: the augmented pixels (lossless), the record they really came from, the crop's
box, the key of the augmentation's draws, and every teacher's features (feature_codec.py). feature_builder.py writes it.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load
from tqdm import tqdm

from eupe_jax.data.feature_codec import decode_features, unpack_arrays
from eupe_jax.data.order import hash_words, record_index
from eupe_jax.data.sources import riegeli, storage
from eupe_jax.data.sources.base import RecordError, is_plain_name
from eupe_jax.data.teacher_stage import Background
from eupe_jax.data.threads import for_each
from eupe_jax.distill.teacher_spec import TeacherSpec
from eupe_jax.hashing import sha256_file

MANIFEST, PROGRESS = "manifest.json", "progress.json"
FORMAT = 2

_SHARD_FIELDS = {"file": str, "records": int, "bytes": int, "sha256": str}


def read_manifest(path: Path) -> dict:
    """manifest.json, or progress.json of an unfinished cache. Raises ValueError when it is none of this format."""
    try:
        content = json.loads(path.read_bytes())
        held = content["format"]
        if held == FORMAT:
            content["recipe"].keys(), content["chains"].keys()
            if not all(isinstance(shard[k], kind) for shard in content["shards"] for k, kind in _SHARD_FIELDS.items()):
                raise TypeError("its list of shards is damaged")
            if outside := [name for name in _file_names(content) if not is_plain_name(name)]:
                raise ValueError(f"it names {outside[0]!r}, which is no file of its folder")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        wrong = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: no manifest of a feature cache ({wrong}): remove it and build again") from None
    if held != FORMAT:
        raise ValueError(f"{path}: a feature cache of format {held}, not {FORMAT}: remove it and build again")
    return content


def _file_names(manifest: Mapping) -> list[str]:
    return [shard["file"] for shard in manifest["shards"]] + [f"chain-{name}" for name in manifest["chains"]]


def _spec(facts: dict) -> TeacherSpec:
    return TeacherSpec(**{**facts, "mean": tuple(facts["mean"]), "std": tuple(facts["std"])})


class FeatureCache:
    """A finished cache: `batches` gives {"image", "index", "features"}, in an order that is a function of the step.

    Epoch e shows every record once, each in one of its views; K epochs in a row show all of a record's views.
    "index" numbers the source's records. `fingerprint` identifies teachers and data recipe; `teachers`: their specs.
    Opening reads the manifest and the sizes of the files; a damaged record is found when it is read, all of them by
    `verify`. Shards are read by byte ranges, however many there are.
    Raises FileNotFoundError when there is no cache or a shard is missing, ValueError when it is unfinished, or a shard
    is not what the manifest says.
    """

    def __init__(self, folder: str | os.PathLike, *, threads: int = 4):
        if "://" in os.fspath(folder):
            raise ValueError(f"{folder}: a feature cache is read from a local folder or a mount, not a bucket")
        self.folder = Path(folder)
        if (self.folder / PROGRESS).is_file() and not (self.folder / MANIFEST).is_file():
            shards = read_manifest(self.folder / PROGRESS)
            done, total = len(shards["shards"]), shards["recipe"]["shards"]
            raise ValueError(f"{folder}: unfinished feature cache, {done} of {total} shards; build it again to go on")
        if not (self.folder / MANIFEST).is_file():
            raise FileNotFoundError(f"no feature cache in {folder} ({MANIFEST} is missing)")
        self.manifest = read_manifest(self.folder / MANIFEST)
        try:
            self._take(self.manifest["recipe"], self.manifest["shards"])
        except (KeyError, TypeError, AttributeError) as error:
            wrong = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{self.folder / MANIFEST}: not as it was written ({wrong}): remove it and build again"
            ) from error
        self._reader, self._tables = storage.RangeReader(), {}
        self._threads = threads

    def _take(self, recipe: dict, shards: list[dict]) -> None:
        self.recipe, self._shards = recipe, shards
        self.records, self.views = recipe["records"], recipe["views"]
        self.fingerprint = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
        self.teachers = {name: _spec(facts) for name, facts in recipe["teachers"].items()}
        self.entry_count = self.records * self.views
        self._files = [self._file(shard) for shard in shards]
        self._ends = np.cumsum([shard["records"] for shard in shards])
        if not shards or self._ends[-1] != self.entry_count:
            raise ValueError(f"{self.folder}: the manifest's shards do not hold {self.entry_count} entries")
        self._layout = self._shapes(recipe["host"]["size"])

    def _file(self, shard: Mapping) -> storage.File:
        path = self.folder / shard["file"]
        cure = "copy it again, or run the command that built this feature cache: it builds what lacks"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: {cure}")
        file = storage.stat(str(path))
        if file.size != shard["bytes"]:
            raise ValueError(f"{path} has {file.size} bytes, not {shard['bytes']}: {cure}")
        return file

    def _bytes(self, shard: int, record: int) -> bytes:
        """A record by its place, which stays in memory (20 bytes each) once its shard was looked into."""
        file = self._files[shard]
        if shard not in self._tables:  # two threads may both do so
            self._tables[shard] = riegeli.record_table(file, self._reader)
        if record >= len(self._tables[shard]):
            raise RecordError(file.path, f"holds {len(self._tables[shard])} records only")
        return riegeli.read_record(file, self._reader, self._tables[shard][record])

    def __len__(self) -> int:
        return self.records

    def read(self, entry: int) -> dict[str, np.ndarray]:
        """What is stored of one entry: "image" uint8 [S, S, 3], "index" int64, "box" float32 [4] (left, top, right,
        bottom in the upright picture), "key" uint32 [2] (`augment.draws` tells what was drawn with it), and the
        teachers' features as feature_codec.py stores them.

        Raises OSError or ValueError, naming shard and record, when it is damaged.
        """
        shard = int(np.searchsorted(self._ends, entry, side="right"))
        record = entry - int(self._ends[shard]) + self._shards[shard]["records"]
        where = f"{self.folder / self._shards[shard]['file']}: record {record}"
        try:
            data = self._bytes(shard, record)
        except (RecordError, riegeli.NotPlain, riegeli.Unreadable) as error:
            raise OSError(f"{where}: cannot be read: {getattr(error, 'reason', error)}") from error
        arrays = unpack_arrays(data, where)
        if lacking := {k: s for k, s in self._layout.items() if k not in arrays or arrays[k].shape != s}:
            raise ValueError(f"{where}: lacks arrays that the manifest promises: {lacking}")
        return arrays

    def _shapes(self, size: int) -> dict[str, tuple[int, ...]]:
        """Shapes of one entry's arrays, scales apart."""
        layout = {"image": (size, size, 3), "index": (), "key": (2,), "box": (4,)}
        for name, spec in self.teachers.items():
            layout[f"{name}.patches"] = (spec.grid, spec.grid, spec.patch_dim)
            if spec.cls_dim is not None:
                layout[f"{name}.cls"] = (spec.cls_dim,)
        return layout

    def entries(self, entry: np.ndarray, teachers: Collection[str] | None = None) -> dict:
        """The batch made of these entries (int [b]); features, of all teachers or of some, as float32. Without any
        there is no "features"."""
        layout, b = self._layout, len(entry)
        image, index = np.empty((b, *layout["image"]), np.uint8), np.empty(b, np.int64)
        features = {
            name: {
                kind: np.empty((b, *layout[key]), np.float32)
                for kind in ("cls", "patches")
                if (key := f"{name}.{kind}") in layout
            }
            for name in (self.teachers if teachers is None else teachers)
        }

        def fill(j: int) -> None:
            arrays = self.read(int(entry[j]))
            image[j], index[j] = arrays["image"], arrays["index"]
            for name, kinds in features.items():
                for kind, out in kinds.items():
                    decode_features(f"{name}.{kind}", arrays, out[j])

        for_each(fill, range(b), threads=self._threads, name="feature-cache")
        return {"image": image, "index": index} | ({"features": features} if features else {})

    def entries_of_step(self, step: int, batch_size: int, seed: int) -> np.ndarray:
        """Entries (int64 [batch_size]) of the global batch of `step`."""
        draws = step * batch_size + np.arange(batch_size)
        record = record_index(seed, draws, self.records)
        shift = (hash_words(seed, 0x76696577, record) % np.uint64(self.views)).astype(np.int64)
        view = (draws // self.records + shift) % self.views
        return view * self.records + record

    def batches(
        self,
        start_step: int = 0,
        *,
        batch_size: int,
        seed: int,
        positions: np.ndarray | None = None,
        teachers: Collection[str] | None = None,
    ) -> Background:
        """The entries at `positions` (int [b], None: all) of every global batch from `start_step` on, with the features
        of all teachers or of some, read ahead in a thread; endless. Close it when done.
        """
        mine = slice(None) if positions is None else np.asarray(positions)

        def read(steps: Iterator[int]) -> Iterator[dict]:
            for step in steps:
                yield self.entries(self.entries_of_step(step, batch_size, seed)[mine], teachers)

        return Background(read, itertools.count(start_step), ahead=2)

    def chain(self, teacher: str) -> tuple[dict, dict[str, np.ndarray]] | None:
        """(header, arrays) of what leads from a distilled teacher back to its own teachers; None where it was not."""
        if (held := self.manifest["chains"].get(teacher)) is None:
            return None
        path = self.folder / f"chain-{teacher}.safetensors"
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != held["sha256"]:
            raise ValueError(f"{path} is damaged: its sha256 is not the manifest's")
        return held["header"], load(data)

    def verify(self, *, progress: bool = True) -> list[str]:
        """What is damaged, one line each: every shard's sha256 and every record are read. Empty: all is well."""
        damaged = []
        with tqdm(total=self.entry_count, desc="verifying", unit="img", disable=not progress) as bar:
            for shard, end in zip(self._shards, self._ends, strict=True):
                path = self.folder / shard["file"]
                if sha256_file(path) != shard["sha256"]:
                    damaged.append(f"{path}: its sha256 is not the manifest's")
                for entry in range(end - shard["records"], end):
                    try:
                        self.read(entry)
                    except (OSError, ValueError) as error:
                        damaged.append(str(error))
                    bar.update()
        for teacher in self.manifest["chains"]:
            try:
                self.chain(teacher)
            except (OSError, ValueError) as error:
                damaged.append(str(error))
        return damaged
