"""Building a feature cache: views are read, augmented, shown to the teachers and written, shard after shard.

While a cache is being built, `progress.json` lists the shards that are done; building again goes on after them, and the
same recipe gives the same bytes. Shards of a finished cache that are gone or damaged are built anew in the same way.
`.lock` keeps a second process out.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors.numpy import save
from tqdm import tqdm

from eupe_jax.data.decode import naming, open_picture
from eupe_jax.data.feature_cache import FORMAT, MANIFEST, PROGRESS, FeatureCache, read_manifest
from eupe_jax.data.feature_codec import PRECISIONS, encode_features, pack_arrays
from eupe_jax.data.host import BrokenRecord, HostConfig, RecordReader, make_image, random_crop_box, random_generator
from eupe_jax.data.shard_files import ShardWriter, alone, write_json
from eupe_jax.data.sources import Record, Source
from eupe_jax.data.teacher_stage import Features
from eupe_jax.distill.teacher_spec import TeacherSpec
from eupe_jax.files import move_whole, write_whole
from eupe_jax.hashing import sha256_file

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
    verify: bool = False,
) -> FeatureCache:
    """Computes, finishes or repairs the cache in `folder` and opens it.

    The first `records` of the source (all by default) in `views` views each. View v of record i is cropped and
    augmented with the keys of step v, position i. `forward` augments up to `piece` images and runs the teachers on
    them. facts: what else made the features, plain values that the recipe records. chains: {teacher: {"header": plain
    values, "arrays": {name: array}}}, kept beside the features. shards: default, of about 256 MiB each. verify: whether
    shards that are there already are read and hashed, beyond looking at their sizes.

    Raises:
      ValueError: the folder holds a cache of something else, or a field is wrong.
      OSError: another process is building there, the disk is full, or the source's storage fails.
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
    read = _ViewReader(source, count, config, seed)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder / ".lock", f"{folder}: another process is building this feature cache"):
        build = _Build(folder, recipe, chains or {}, verify)
        bar = tqdm(total=total, initial=build.entries_done, desc="teacher features", unit="img", disable=not progress)
        with bar, ThreadPoolExecutor(threads) as pool:
            for name, (first, end) in build.missing():
                with ShardWriter(folder / name, folder / f"{name}.partial") as writer:
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
                build.record(writer.entry)
        build.finish()
    return FeatureCache(folder)


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
    """File name of shard number `shard`, counted from 0, of `shards`."""
    return f"views-{shard:05d}-of-{shards:05d}.array_record"


class _Build:
    """What of a cache is done: `progress.json` lists finished shards, and becomes `manifest.json` with the last."""

    def __init__(self, folder: Path, recipe: dict, chains: Mapping[str, Mapping], verify: bool):
        self.folder = folder
        self._recipe = json.loads(json.dumps(recipe))  # as it will be read back
        total, n = recipe["records"] * recipe["views"], recipe["shards"]
        self._wanted = {shard_name(s, n): (s * total // n, (s + 1) * total // n) for s in range(n)}
        held = self._held()
        whole = [shard for shard in held["shards"] if self._is_whole(shard, verify)]
        self._done = {shard["file"]: shard for shard in whole}
        self._chains = {name: self._keep_chain(name, **chain) for name, chain in chains.items()}
        if self._state() != held:
            self._save()
        if (folder / PROGRESS).is_file():  # a finished cache that has lost something is unfinished again
            (folder / MANIFEST).unlink(missing_ok=True)

    def _held(self) -> dict:
        """The manifest, finished or not, that is there. Raises ValueError when it is of another recipe."""
        for path in (self.folder / PROGRESS, self.folder / MANIFEST):  # of both, the manifest is the older one
            if path.is_file():
                held, recipe = read_manifest(path), self._recipe
                if held["recipe"] != recipe:
                    keys = sorted(k for k in {*recipe, *held["recipe"]} if held["recipe"].get(k) != recipe.get(k))
                    message = f"holds a feature cache of another {', '.join(keys)}; remove it first"
                    raise ValueError(f"{self.folder} {message}")
                return held
        return {"shards": []}

    def _is_whole(self, shard: dict, verify: bool) -> bool:
        path, (first, end) = self.folder / shard["file"], self._wanted.get(shard["file"], (0, 0))
        if not path.is_file() or (path.stat().st_size, end - first) != (shard["bytes"], shard["records"]):
            return False
        return not verify or sha256_file(path) == shard["sha256"]

    def _keep_chain(self, name: str, header: dict, arrays: Mapping[str, np.ndarray]) -> dict:
        """What the manifest says of a chain, whose file is written where it is not there as it should be."""
        path = self.folder / f"chain-{name}.safetensors"
        data = save({k: np.ascontiguousarray(v) for k, v in arrays.items()})
        if not path.is_file() or path.read_bytes() != data:
            write_whole(path, data)
        return {"header": json.loads(json.dumps(header)), "sha256": hashlib.sha256(data).hexdigest()}

    def _state(self) -> dict:
        shards = [self._done[name] for name in self._wanted if name in self._done]
        return {"format": FORMAT, "recipe": self._recipe, "chains": self._chains, "shards": shards}

    @property
    def entries_done(self) -> int:
        return sum(shard["records"] for shard in self._done.values())

    def missing(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """(file, (first entry, end)) of the shards to be written, in order."""
        for name, entries in self._wanted.items():
            if name not in self._done:
                yield name, entries

    def record(self, shard: dict) -> None:
        self._done[shard["file"]] = shard
        self._save()

    def _save(self) -> None:
        write_json(self.folder / PROGRESS, self._state())

    def finish(self) -> None:
        for half_written in self.folder.glob(".*.partial"):  # of runs that were killed
            half_written.unlink()
        if (self.folder / PROGRESS).is_file():
            move_whole(self.folder / PROGRESS, self.folder / MANIFEST)


class _ViewReader:
    """Reads view v of record i: (image, the record it really came from, the crop's box)."""

    def __init__(self, source: Source, count: int, config: HostConfig, seed: int):
        self._source, self._count, self._config, self._seed = source, count, config, seed
        self._reader = RecordReader(config, seed)

    def __call__(self, view: int, i: int) -> tuple[np.ndarray, np.int64, np.ndarray]:
        seen = _Seen(self._source, self._count)
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
    """The first `count` records of a source, whence stand-ins come too; it remembers what was read."""

    def __init__(self, source: Source, count: int):
        self._source, self._count, self.records = source, count, []

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        self.records.append(self._source[index])
        return self.records[-1]
