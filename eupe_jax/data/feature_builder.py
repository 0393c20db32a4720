"""Building a feature cache: views are read, augmented, shown to the teachers and written, shard after shard.

While a cache is being built, `progress.json` lists the shards that are done; building again goes on after them, and the
same recipe gives the same bytes.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
from array_record.python import array_record_module
from safetensors.numpy import save
from tqdm import tqdm

from eupe_jax.data.decode import naming, open_picture
from eupe_jax.data.feature_cache import FORMAT, MANIFEST, PROGRESS, FeatureCache, read_manifest
from eupe_jax.data.feature_codec import PRECISIONS, encode_features, pack_arrays
from eupe_jax.data.host import BrokenRecord, HostConfig, RecordReader, make_image, random_crop_box, random_generator
from eupe_jax.data.pack_shard import WRITER_OPTIONS, flush
from eupe_jax.data.packing import write_json
from eupe_jax.data.sources import Record, Source
from eupe_jax.data.teacher_stage import Features
from eupe_jax.distill.teacher_spec import TeacherSpec, sha256_file

SHARD_BYTES = 1 << 28  # of a shard, where their number is not given: what a killed run may lose
# (view, uint8 [b, S, S, 3], first position) -> (augmented pixels, key words uint32 [b, 2], features of them)
Forward = Callable[[int, np.ndarray, int], tuple[np.ndarray, np.ndarray, Features]]


def build_feature_cache(
    folder: str | os.PathLike,
    source: Source,
    config: HostConfig,
    teachers: Mapping[str, TeacherSpec],
    forward: Forward,
    *,
    seed: int,
    views: int = 1,
    records: int | None = None,
    precision: str = "bf16",
    shards: int | None = None,
    facts: Mapping | None = None,
    chains: Mapping[str, Mapping] | None = None,
    piece: int = 64,
    threads: int = 4,
    progress: bool = True,
) -> FeatureCache:
    """Computes (or finishes) the cache in `folder` and opens it.

    The first `records` of the source (all by default) in `views` views each. View v of record i is cropped and
    augmented with the keys of step v, position i. `forward` augments up to `piece` images and runs the teachers on
    them. facts: what else made the features, plain values that the recipe records. chains: {teacher: {"header": plain
    values, "arrays": {name: array}}}, kept beside the features. shards: default, of about 256 MiB each.

    Raises:
      ValueError: the folder holds a cache of something else, or a field is wrong.
      TooManyBroken: more records are broken than `config` allows.
    """
    if "://" in os.fspath(folder):
        raise ValueError(f"{folder}: a feature cache is written to a local folder or a mount; copy it afterwards")
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}: use one of {PRECISIONS}")
    count = min(records or len(source), len(source))
    total = views * count
    if total < 1 or piece < 1 or not 1 <= (shards or 1) <= total:
        raise ValueError(f"{views} views of {count} records make no cache of {shards or 1} shards, {piece} at a time")
    recipe = {
        "source": source.digest,
        "records": count,
        "views": views,
        "seed": seed,
        "precision": precision,
        "shards": shards or min(total, -(-total * _entry_bytes(config, teachers, precision) // SHARD_BYTES)),
        "host": asdict(config),
        "teachers": {name: asdict(spec) for name, spec in teachers.items()},
        **(facts or {}),
    }
    build = _Build(Path(folder), recipe, chains or {})
    read = _ViewReader(source, config, seed)
    bar = tqdm(total=total, initial=build.entries_done, desc="teacher features", unit="img", disable=not progress)
    with _alone_in(build.folder), bar, ThreadPoolExecutor(threads) as pool:
        for name, (first, end) in build.missing():
            with _ShardWriter(build.folder / name) as writer:
                for view, i, n in _pieces(first, end, count, piece):
                    images, index, box = zip(*pool.map(read, [view] * n, range(i, i + n)), strict=True)
                    pixels, keys, features = forward(view, np.stack(images), i)
                    stored = {"image": pixels, "index": np.stack(index), "box": np.stack(box), "key": keys}
                    for teacher, tokens in features.items():
                        stored |= encode_features(teacher, tokens, precision)
                    for j in range(n):
                        entry = {key: x[j] for key, x in stored.items()}
                        writer.write(pack_arrays(f"view {view} of record {i + j}", entry))
                    bar.update(n)
            build.record(name, end - first)
    build.finish()
    return FeatureCache(folder)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Locks a folder against a second build, until this one ends, however it does."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is building this feature cache") from None
        yield
    finally:
        os.close(handle)


def _entry_bytes(config: HostConfig, teachers: Mapping[str, TeacherSpec], precision: str) -> int:
    size = 3 * config.size**2
    for spec in teachers.values():
        size += spec.grid**2 * spec.patch_dim * (1 if precision == "int8" else 2) + 2 * (spec.cls_dim or 0)
    return size


def _pieces(first: int, end: int, count: int, piece: int) -> Iterator[tuple[int, int, int]]:
    """(view, first record, how many) of the entries from `first` to `end`; a piece lies inside one view."""
    while first < end:
        view, i = divmod(first, count)
        n = min(piece, count - i, end - first)
        yield view, i, n
        first += n


def shard_name(shard: int, shards: int) -> str:
    return f"views-{shard:05d}-of-{shards:05d}.array_record"


class _Build:
    """What of a cache is done: `progress.json` lists finished shards, and becomes `manifest.json` with the last."""

    def __init__(self, folder: Path, recipe: dict, chains: Mapping[str, Mapping]):
        self.folder = folder
        recipe = json.loads(json.dumps(recipe))  # as it will be read back
        self._state = {"format": FORMAT, "recipe": recipe, "chains": {}, "shards": []}
        for held in (folder / MANIFEST, folder / PROGRESS):
            if held.is_file():
                old = read_manifest(held)
                if old["recipe"] != recipe:
                    keys = sorted(k for k in {*recipe, *old["recipe"]} if old["recipe"].get(k) != recipe.get(k))
                    raise ValueError(f"{folder} holds a feature cache of another {', '.join(keys)}; remove it first")
                self._state = old
                return
        folder.mkdir(parents=True, exist_ok=True)
        for name, chain in chains.items():
            data = save({k: np.ascontiguousarray(v) for k, v in chain["arrays"].items()})
            (folder / f"chain-{name}.safetensors").write_bytes(data)
            flush(folder / f"chain-{name}.safetensors")
            self._state["chains"][name] = {"header": chain["header"], "sha256": hashlib.sha256(data).hexdigest()}
        self._save()

    @property
    def entries_done(self) -> int:
        return sum(shard["records"] for shard in self._state["shards"])

    def missing(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """(file, (first entry, end)) of the shards to be written, in order."""
        recipe, done = self._state["recipe"], len(self._state["shards"])
        total, n = recipe["records"] * recipe["views"], recipe["shards"]
        for s in range(done, n):
            yield shard_name(s, n), (s * total // n, (s + 1) * total // n)

    def record(self, name: str, records: int) -> None:
        path = self.folder / name
        entry = {"file": name, "records": records, "bytes": path.stat().st_size, "sha256": sha256_file(path)}
        self._state["shards"].append(entry)
        self._save()

    def _save(self) -> None:
        write_json(self.folder / PROGRESS, self._state)

    def finish(self) -> None:
        for half_written in self.folder.glob(f".{PROGRESS}.*.partial"):  # of runs that were killed
            half_written.unlink()
        if not (self.folder / MANIFEST).is_file():
            os.replace(self.folder / PROGRESS, self.folder / MANIFEST)
            flush(self.folder)


class _ShardWriter:
    """Writes one shard under a temporary name; it gets its own when all is on disk, and is removed after an error."""

    def __init__(self, path: Path):
        self._path, self._partial = path, path.with_name(f"{path.name}.partial")

    def __enter__(self):
        self._partial.unlink(missing_ok=True)  # of a run that was killed
        with self._naming():
            self._writer = array_record_module.ArrayRecordWriter(str(self._partial), WRITER_OPTIONS)
        return self

    def write(self, record: bytes) -> None:
        with self._naming():
            self._writer.write(record)

    def __exit__(self, kind, error, trace):
        try:
            with self._naming():
                self._writer.close()
            if kind is not None:
                return
            flush(self._partial)
            os.replace(self._partial, self._path)
            flush(self._path.parent)
        finally:
            self._partial.unlink(missing_ok=True)

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """The writer's errors (a full disk, no permission) name the file and what failed."""
        try:
            yield
        except RuntimeError as error:
            raise OSError(f"{self._partial}: {error}") from error


class _ViewReader:
    """Reads view v of record i: (image, the record it really came from, the crop's box)."""

    def __init__(self, source: Source, config: HostConfig, seed: int):
        self._source, self._config, self._seed = source, config, seed
        self._reader = RecordReader(config, seed)

    def __call__(self, view: int, i: int) -> tuple[np.ndarray, np.int64, np.ndarray]:
        seen = _Seen(self._source)
        image, index = self._reader(seen, i, view, i)
        return image, np.int64(index), self._box(seen.records, random_generator(self._seed, view, i))

    def _box(self, records: list[Record], generator: np.random.Generator) -> np.ndarray:
        """(left, top, right, bottom), float32, in pixels of the upright picture: the draws once more, with those that
        broken records made before it."""
        *broken, record = records
        for each in broken:
            with suppress(BrokenRecord):
                make_image(each, self._config, generator)
        with naming(record):
            picture = open_picture(record.data, self._config.max_pixels)
        box = (0, 0, picture.width, picture.height)
        if self._config.mode == "crop":
            box = random_crop_box(*box[2:], self._config.scale, self._config.ratio, generator)
        return np.asarray(box, np.float32)


class _Seen:
    """A source that remembers what was read."""

    def __init__(self, source: Source):
        self._source, self.records = source, []

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        self.records.append(self._source[index])
        return self.records[-1]
