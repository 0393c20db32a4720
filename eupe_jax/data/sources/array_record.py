"""ArrayRecord shards, the format for pods."""

import json
import os
import posixpath
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from eupe_jax.data.sources import riegeli, storage
from eupe_jax.data.sources.base import Record, RecordError, digest_of
from eupe_jax.data.sources.index_cache import Index, IndexCache, Tables, default_folder
from eupe_jax.data.sources.record_codec import is_packed, unpack_record
from eupe_jax.data.sources.splits import choose_split
from eupe_jax.data.sources.tf_example import bytes_feature

MANIFEST = "manifest.json"

# How the image formats begin that are told apart from anything else by it.
_IMAGES = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n|GIF8|BM|RIFF....WEBP|II\*\0|MM\0\*|P[2356]\s", re.DOTALL)


class ArrayRecordSource:
    """One record for every record of ArrayRecord shards.

    path: a folder of .array_record files, one file, a glob or brace pattern, or several of those.
    layout: "packed", as launch/pack.py writes them, "raw", each record an image file, or "", which finds out which of
      the two by a manifest or the first record. key: for records that are tf.train.Example, the image's feature.
    split: of a folder whose files are of several, e.g. "train"; "*" takes all.
    index_dir: where the places of each shard's records are kept (default $XDG_CACHE_HOME/eupe_jax/array_record_index);
      of a packed folder a shard's are looked up when it is first read, so opening takes one look at its manifest.

    Shards with group_size:1 and without compression, as pack writes them, are read by byte ranges, and so is everything
    in buckets (but for transposed records); others go through array_record's own reader.
    Raises FileNotFoundError or ValueError for what cannot be opened; a damaged record is a RecordError when it is read.
    """

    def __init__(
        self,
        path: str | os.PathLike | Sequence[str | os.PathLike],
        layout: str = "",
        key: str = "",
        split: str = "",
        index_dir: str | None = None,
    ):
        if layout not in ("", "packed", "raw") or (layout and key):
            raise ValueError(f"layout must be 'packed' or 'raw', or key a feature's name; got {layout!r}, {key!r}")
        files = choose_split(storage.find(path, _is_array_record, "array_record files"), split, str(path))
        cache = IndexCache(_table, "array_record", index_dir or default_folder("array_record_index"))
        manifest = _manifest(path)
        indices = cache.indices(files) if manifest is None else _listed(files, manifest, str(path))
        self._tables, self._reader, self._fallback = Tables(cache, indices), storage.RangeReader(), _Readers()
        if not len(self):
            raise ValueError(f"{path}: no records in {len(files)} array_record files")
        self._key = key
        self._layout = "example" if key else layout or ("packed" if manifest is not None else self._find_layout())
        if manifest is None:
            shards = [(posixpath.basename(i.file.path), i.file.size, i.digest) for i in indices]
        else:
            shards = [(posixpath.basename(i.file.path), manifest[posixpath.basename(i.file.path)]) for i in indices]
        self.digest = digest_of([self._layout, self._key, *shards])

    def __len__(self) -> int:
        return len(self._tables)

    def __getitem__(self, index: int) -> Record:
        shard, number = self._tables.locate(index)
        where = f"{self._tables.indices[shard].file.path}[{number}]"
        data = self._bytes(shard, number)
        if self._layout == "packed":
            return unpack_record(data, where)
        if self._layout == "raw":
            return Record(data, where)
        try:
            return Record(bytes_feature(data, self._key), where)
        except ValueError as e:
            raise RecordError(where, str(e)) from e

    def _bytes(self, shard: int, number: int) -> bytes:
        file, row = self._tables.indices[shard].file, self._tables.row(shard, number)
        try:
            return riegeli.read_record(file, self._reader, row) if row["offset"] else self._fallback.read(file, number)
        except RecordError as e:
            raise RecordError(f"{file.path}[{number}]", e.reason) from e
        except (riegeli.NotPlain, riegeli.Unreadable) as e:  # the others of the shard are
            raise RecordError(f"{file.path}[{number}]", f"damaged: {e}") from e

    def _find_layout(self) -> str:
        shard, number = self._tables.locate(0)
        first = self._bytes(shard, number)
        if is_packed(first):
            return "packed"
        if _IMAGES.match(first):
            return "raw"
        path = self._tables.indices[shard].file.path
        raise ValueError(
            f"{path}: its first record begins with {first[:4]!r}, neither a packed image nor an image file: give "
            "layout='raw', or key='image' (say) where records are tf.train.Example"
        )


def _is_array_record(path: str) -> bool:
    return re.search(r"\.array_?record(-\d+-of-\d+)?$", path.lower()) is not None


def _table(file: storage.File) -> np.ndarray:
    """Places of a shard's records; with offset 0 those of a shard that array_record's own reader is for."""
    reader = storage.RangeReader()
    try:
        return riegeli.record_table(file, reader)
    except (riegeli.NotPlain, riegeli.Unreadable):
        if not storage.is_remote(file.path):
            return np.zeros(_Readers().count(file), riegeli.ROW)
    try:
        return riegeli.record_table(file, reader, plain=False)
    except riegeli.Unreadable as e:
        raise ValueError(f"{e}; such shards are not read from buckets: mount it as a folder (gcsfuse)") from e


def _manifest(path) -> dict[str, dict] | None:
    """Shards by file name as the manifest of a packed folder lists them; None where there is none."""
    if not isinstance(path, str | os.PathLike):
        return None
    file = posixpath.join(os.fspath(path), MANIFEST)
    if not storage.exists(file):
        return None
    try:
        shards = json.loads(storage.read_file(file))["shards"]
        return {s["file"]: {k: s[k] for k in ("records", "bytes", "sha256")} for s in shards}
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise ValueError(f"{file}: not the manifest of packed shards ({type(e).__name__}: {e})") from e


def _listed(files: Sequence[storage.File], manifest: dict[str, dict], where: str) -> list[Index]:
    """The shards that the manifest lists. Raises ValueError where the folder holds others, or of another size."""
    names = [posixpath.basename(f.path) for f in files]
    if missing := sorted(set(manifest) - set(names)):
        raise ValueError(f"{where}: its manifest lists {missing[0]}, which is not there ({len(missing)} are missing)")
    for file, name in zip(files, names, strict=True):
        if name not in manifest:
            raise ValueError(f"{where}: {name} is not in its manifest: remove it, or pack again")
        if manifest[name]["bytes"] != file.size:
            raise ValueError(
                f"{file.path}: {file.size} bytes, its manifest says {manifest[name]['bytes']}: copy it again"
            )
    return [Index(f, int(manifest[n]["records"])) for f, n in zip(files, names, strict=True)]


class _Readers:
    """array_record's readers of the shards read last. Pickles empty."""

    def __init__(self, limit: int = 64):
        self._limit, self._lock = limit, threading.Lock()
        self._open: OrderedDict[str, object] = OrderedDict()

    def __reduce__(self):
        return _Readers, (self._limit,)

    def count(self, file: storage.File) -> int:
        return self._get(file).num_records()

    def read(self, file: storage.File, number: int) -> bytes:
        reader = self._get(file)
        try:
            return reader.read([number])[0]  # threads may share it
        except (RuntimeError, ValueError) as e:
            with self._lock:
                self._open.pop(file.path, None)
            _check_storage(file)
            raise RecordError(file.path, f"cannot be read: {e}") from e

    def _get(self, file: storage.File):
        with self._lock:
            reader = self._open.get(file.path)
            if reader is None:
                reader = self._open[file.path] = _open(file)
                while len(self._open) > self._limit:
                    self._open.popitem(last=False)  # closed when the last thread lets go of it
            self._open.move_to_end(file.path)
            return reader


def _check_storage(file: storage.File) -> None:
    """Raises what keeps a file from being read at all: array_record says the same of damage and of a lost disk."""
    storage.RangeReader().read(file, 0, 1)


def _open(file: storage.File):
    from array_record.python.array_record_module import ArrayRecordReader

    _check_storage(file)
    reader = ArrayRecordReader(file.path, options="readahead_buffer_size:0", file_reader_buffer_size=1 << 15)
    if not reader.ok():
        try:
            reader.close()
            reason = "it is not ok"
        except (RuntimeError, ValueError) as e:
            reason = str(e)
        raise RecordError(file.path, f"not a whole ArrayRecord file: {reason}")
    return reader
