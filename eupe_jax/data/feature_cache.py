"""Host teachers' features computed once: K augmented views of N records on disk, then read as batches.

A folder holds `manifest.json`, `image.npy` (uint8 [K * N, S, S, 3]), `index.npy` (int64 [K * N], the record each image
really came from) and `NAME.cls.npy` / `NAME.patches.npy` (float16) for every teacher; entry v * N + i is view v of
record i. Building resumes where it stopped; the manifest is replaced whole after each piece, so a folder is always
either finished or resumable.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from eupe_jax.data.host import HostConfig, RecordReader
from eupe_jax.data.order import hash_words, record_index
from eupe_jax.data.sources import Source
from eupe_jax.data.teacher_stage import AugmentFn, run_teachers
from eupe_jax.distill.host_teachers import HostTeacher
from eupe_jax.distill.teacher_spec import TeacherSpec

MANIFEST = "manifest.json"


def build_feature_cache(
    folder: str | os.PathLike,
    source: Source,
    config: HostConfig,
    teachers: Mapping[str, HostTeacher],
    augment_fn: AugmentFn | None = None,
    *,
    seed: int,
    views: int = 1,
    records: int | None = None,
    augment_facts: Mapping | None = None,
    piece: int = 64,
    threads: int = 4,
    progress: bool = True,
) -> "FeatureCache":
    """Computes (or finishes) the cache in `folder` and opens it.

    The first `records` of the source (all by default) in `views` views each. View v of record i is cropped and
    augmented with the keys of step v, position i. augment_fn: `host_augment(...)`; augment_facts: what describes it in
    the fingerprint (its config as a dict, its seed). `piece` images are made and saved at a time.
    Raises ValueError when the folder holds a cache of something else.
    """
    count = min(records or len(source), len(source))
    recipe = {
        "source": source.digest,
        "records": count,
        "views": views,
        "seed": seed,
        "host": asdict(config),
        "augment": dict(augment_facts or {}) if augment_fn else None,
        "teachers": {name: asdict(t.spec) for name, t in teachers.items()},
    }
    writer = _Writer(Path(folder), recipe, _layout(config.size, teachers), views * count)
    reader = RecordReader(config, seed)
    bar = tqdm(total=writer.total, initial=writer.done, desc="expert features", unit="img", disable=not progress)
    with bar, ThreadPoolExecutor(threads) as pool:
        while writer.done < writer.total:
            view, first = divmod(writer.done, count)
            n = min(piece, count - first)  # a piece lies inside one view
            read = pool.map(lambda i, v=view: reader(source, i, v, i), range(first, first + n))
            images, index = map(np.stack, zip(*read, strict=True))
            if augment_fn is not None:
                images = augment_fn(view, images, first)
            features = run_teachers(teachers, images)
            flat = {f"{name}.{kind}": x for name, kinds in features.items() for kind, x in kinds.items()}
            writer.append({"image": images, "index": index, **flat})
            bar.update(n)
    return FeatureCache(folder)


def _layout(size: int, teachers: Mapping[str, HostTeacher]) -> dict[str, tuple[tuple[int, ...], str]]:
    """(shape of one entry, dtype) of every array of a cache."""
    layout: dict[str, tuple[tuple[int, ...], str]] = {"image": ((size, size, 3), "uint8"), "index": ((), "int64")}
    for name, teacher in teachers.items():
        spec = teacher.spec
        layout[f"{name}.patches"] = ((spec.grid, spec.grid, spec.patch_dim), "float16")
        if spec.cls_dim is not None:
            layout[f"{name}.cls"] = ((spec.cls_dim,), "float16")
    return layout


class _Writer:
    """Appends entries to the arrays of a cache; `done` of `total` are safely there, also after an interruption."""

    def __init__(self, folder: Path, recipe: dict, layout: dict, total: int):
        recipe = json.loads(json.dumps(recipe))  # as it will be read back
        self._folder, self.total = folder, total
        self._manifest = {"format": 1, "recipe": recipe, "entries": total, "done": 0}
        if (folder / MANIFEST).exists():
            old = json.loads((folder / MANIFEST).read_text())
            if old["recipe"] != recipe:
                changed = sorted(k for k in recipe if old["recipe"].get(k) != recipe[k])
                raise ValueError(f"{folder} holds a feature cache of another {', '.join(changed)}; remove it first")
            self._manifest = old
        folder.mkdir(parents=True, exist_ok=True)
        self._arrays = {
            key: np.load(folder / f"{key}.npy", mmap_mode="r+")
            if self.done
            else np.lib.format.open_memmap(folder / f"{key}.npy", mode="w+", dtype=dtype, shape=(total, *shape))
            for key, (shape, dtype) in layout.items()
        }

    @property
    def done(self) -> int:
        return self._manifest["done"]

    def append(self, values: Mapping[str, np.ndarray]):
        end = self.done + len(values["index"])
        for key, array in self._arrays.items():
            array[self.done : end] = _to_float16(values[key], key) if array.dtype == np.float16 else values[key]
            array.flush()
        self._manifest["done"] = end
        temporary = self._folder / f"{MANIFEST}.tmp"
        temporary.write_text(json.dumps(self._manifest, indent=2))
        os.replace(temporary, self._folder / MANIFEST)


def _to_float16(x: np.ndarray, name: str) -> np.ndarray:
    if not np.all(np.abs(x) <= np.finfo(np.float16).max):  # NaN fails too
        raise ValueError(f"{name}: features are not finite or too large for float16 (largest {np.abs(x).max()})")
    return x.astype(np.float16)


def _spec(facts: dict) -> TeacherSpec:
    return TeacherSpec(**{**facts, "mean": tuple(facts["mean"]), "std": tuple(facts["std"])})


class FeatureCache:
    """A finished cache: `batches` gives {"image", "index", "features"}, in an order that is a function of the step.

    Epoch e shows every record once, each in one of its views; K epochs in a row show all of a record's views.
    "index" numbers the source's records. `fingerprint` identifies teachers and data recipe; `teachers`: their specs.
    Raises FileNotFoundError when there is no cache, ValueError when it is unfinished.
    """

    def __init__(self, folder: str | os.PathLike):
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise FileNotFoundError(f"no feature cache in {folder} ({MANIFEST} is missing)")
        self.manifest = json.loads((folder / MANIFEST).read_text())
        done, total = self.manifest["done"], self.manifest["entries"]
        if done < total:
            raise ValueError(f"{folder}: unfinished feature cache, {done} of {total} entries; build it again to go on")
        self.recipe = self.manifest["recipe"]
        self.records, self.views = self.recipe["records"], self.recipe["views"]
        self.fingerprint = hashlib.sha256(json.dumps(self.recipe, sort_keys=True).encode()).hexdigest()
        self.teachers = {name: _spec(facts) for name, facts in self.recipe["teachers"].items()}
        self._image = np.load(folder / "image.npy", mmap_mode="r")
        self._index = np.load(folder / "index.npy", mmap_mode="r")
        self._features = {
            name: {
                kind: np.load(folder / f"{name}.{kind}.npy", mmap_mode="r")
                for kind in ("cls", "patches")
                if (folder / f"{name}.{kind}.npy").is_file()
            }
            for name in self.teachers
        }

    def __len__(self) -> int:
        return self.records

    def entries(self, entry: np.ndarray) -> dict:
        """The batch made of these entries (int [b]); features as float32."""
        return {
            "image": np.asarray(self._image[entry]),
            "index": np.asarray(self._index[entry]),
            "features": {
                name: {kind: array[entry].astype(np.float32) for kind, array in kinds.items()}
                for name, kinds in self._features.items()
            },
        }

    def entries_of_step(self, step: int, batch_size: int, seed: int) -> np.ndarray:
        """Entries (int64 [batch_size]) of the global batch of `step`."""
        draws = step * batch_size + np.arange(batch_size)
        record = record_index(seed, draws, self.records)
        shift = (hash_words(seed, 0x76696577, record) % np.uint64(self.views)).astype(np.int64)
        view = (draws // self.records + shift) % self.views
        return view * self.records + record

    def batches(
        self, start_step: int = 0, *, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
    ) -> Iterator[dict]:
        """This host's part of every batch from `start_step` on; endless. Raises ValueError as `Loader` does."""
        if batch_size < 1 or batch_size % process_count or not 0 <= process_index < process_count:
            raise ValueError(f"batch_size {batch_size} does not divide over process {process_index} of {process_count}")
        b = batch_size // process_count
        mine = slice(process_index * b, (process_index + 1) * b)

        def generate(step: int) -> Iterator[dict]:
            while True:
                yield self.entries(self.entries_of_step(step, batch_size, seed)[mine])
                step += 1

        return generate(start_step)
