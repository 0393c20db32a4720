"""Hugging Face datasets on disk: parquet files, and the Arrow files of `save_to_disk`."""

import json
import os
import posixpath
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from eupe_jax.data.sources import storage
from eupe_jax.data.sources.base import Record, RecordError, digest_of, in_range, is_plain_name
from eupe_jax.data.sources.index_cache import IndexCache, default_folder
from eupe_jax.data.sources.splits import choose_split

# One row a row group: its rows, and what tells its content from another's (bytes, where the column begins).
_GROUP = [("rows", "<i8"), ("bytes", "<i8"), ("offset", "<i8")]


class Parquet:
    """One record for every row of a folder of .parquet files (local or in a bucket), or of a `save_to_disk` folder.

    path: a folder, a file, a glob or brace pattern, or several. column: holds the images, as bytes or as Hugging Face's
      struct {bytes, path}; only the bytes count: no path in a data file is followed.
    split: of a folder whose files are of several, e.g. "train"; "*" takes all.
    cache_mib: memory of a process for decoded row groups. Parquet is read a row group at a time, so in shuffled order
      every record costs a whole one unless the cache holds them all: pack such a data set (`launch/pack.py`).
    index_dir: where the row groups of each file are noted (default $XDG_CACHE_HOME/eupe_jax/parquet_index).
    Raises FileNotFoundError or ValueError for what cannot be opened, and a column that is not there or has no bytes.
    """

    def __init__(
        self,
        path: str | os.PathLike | Sequence[str | os.PathLike],
        column: str = "image",
        split: str = "",
        cache_mib: int = 512,
        index_dir: str | None = None,
    ):
        if cache_mib < 0:
            raise ValueError(f"cache_mib must not be negative, got {cache_mib}")
        files = _saved_files(path, split)
        if files is None:
            files = choose_split(storage.find(path, _is_parquet, "parquet files"), split, str(path))
        self._column, self._cache = column, _Cache(cache_mib << 20)
        folder = index_dir or default_folder("parquet_index")
        cache = IndexCache(partial(_groups, column=column), f"row groups of {column}", folder)
        indices = cache.indices(files)
        self._files = [i.file for i in indices]
        rows = [cache.table(i)["rows"].astype(np.int64) for i in indices]
        self._ends = np.cumsum(np.concatenate([np.zeros(0, np.int64), *rows]))  # of row groups, in rows
        self._first_groups = np.cumsum([0] + [len(r) for r in rows])  # of files
        if not len(self):
            raise ValueError(f"{path}: no rows in {len(files)} files")
        self.digest = digest_of((posixpath.basename(i.file.path), i.file.size, i.digest, column) for i in indices)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Record:
        index = in_range(index, len(self))
        group = int(np.searchsorted(self._ends, index, side="right"))
        number = int(np.searchsorted(self._first_groups, group, side="right")) - 1
        file, first = self._files[number], int(self._first_groups[number])
        name = f"{file.path}[{index - self._end_of(first - 1)}]"
        load = partial(_load_group, file, group - first, self._column)
        try:
            value = self._cache.get(group, load)[index - self._end_of(group - 1)]
            return _record(value, name)
        except RecordError as e:
            raise RecordError(name, e.reason) from e
        except ValueError as e:  # pyarrow's
            raise RecordError(name, f"its row group cannot be read: {e}") from e

    def _end_of(self, group: int) -> int:
        return int(self._ends[group]) if group >= 0 else 0


_MOST_MAPPED = 256  # Arrow files open at once


class _Cache:
    """The row groups used last, of all threads; one that several ask for is loaded once. Pickles empty.

    `load` gives the values and the memory they take; a mapped file takes none, but stays open.
    """

    def __init__(self, limit: int):
        self._limit, self._lock = limit, threading.Lock()
        self._groups: OrderedDict[int, tuple[object, int]] = OrderedDict()
        self._loading: dict[int, threading.Lock] = {}

    def __reduce__(self):
        return _Cache, (self._limit,)

    def get(self, key: int, load: Callable[[], tuple[object, int]]):
        with self._lock:
            if key in self._groups:
                self._groups.move_to_end(key)
                return self._groups[key][0]
            loading = self._loading.setdefault(key, threading.Lock())
        with loading:
            with self._lock:
                if key in self._groups:  # another thread was faster
                    return self._groups[key][0]
            try:
                group = load()
            except BaseException:
                with self._lock:
                    self._loading.pop(key, None)
                raise
            with self._lock:
                self._groups[key] = group
                self._loading.pop(key, None)
                while len(self._groups) > 1 and self._full():
                    self._groups.popitem(last=False)
            return group[0]

    def _full(self) -> bool:
        return len(self._groups) > _MOST_MAPPED or sum(size for _, size in self._groups.values()) > self._limit


def _is_parquet(path: str) -> bool:
    return path.lower().endswith(".parquet")


def _is_arrow(path: str) -> bool:
    return path.lower().endswith(".arrow")


def _saved_files(path, split: str) -> list[storage.File] | None:
    """The Arrow files of a `save_to_disk` folder, as its state lists them; None where `path` is no such folder."""
    if not isinstance(path, str | os.PathLike) or storage.is_remote(path) or not os.path.isdir(path):
        return None
    folder = os.fspath(path)
    splits_file = os.path.join(folder, "dataset_dict.json")
    if os.path.exists(splits_file):
        splits = _json(splits_file).get("splits", [])
        if split not in splits:
            raise ValueError(f"{folder} holds the splits {sorted(splits)}: name one, split=...; got {split!r}")
        folder = os.path.join(folder, os.path.basename(split))
    state_file = os.path.join(folder, "state.json")
    if not os.path.exists(state_file):
        return None
    state = _json(state_file)
    if state.get("_indices_data_files"):
        raise ValueError(f"{folder} holds a selection by indices; write it with .flatten_indices() first")
    names = [str(entry["filename"]) for entry in state.get("_data_files", [])]
    if outside := [n for n in names if not is_plain_name(n)]:
        raise ValueError(f"{state_file} names {outside[0]!r}, which is not a file of its folder")
    return [storage.stat(os.path.join(folder, n)) for n in names]


def _json(path: str) -> dict:
    try:
        with open(path, "rb") as f:
            found = json.load(f)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is damaged: {e}") from e
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no object")
    return found


def _groups(file: storage.File, column: str) -> np.ndarray:
    """The row groups of a file; an Arrow file, which is mapped into memory, is one."""
    import pyarrow as pa

    try:
        with storage.explained(file.path):
            if _is_arrow(file.path):
                values, _ = _load_group(file, 0, column)
                return np.array([(len(values), values.nbytes, 0)], _GROUP)
            with _open_parquet(file) as f:
                _check_column(f.schema_arrow, column)
                return _parquet_groups(f.metadata, column)
    except pa.ArrowInvalid as e:
        raise ValueError(f"{file.path}: not a whole parquet or Arrow file ({e})") from e
    except ValueError as e:
        raise ValueError(f"{file.path}: {e}") from e


def _parquet_groups(metadata, column: str) -> np.ndarray:
    """Raises ValueError where the file's own counts say that no row has image bytes."""
    paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    number = paths.index(column if column in paths else f"{column}.bytes")
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    chunks = [g.column(number) for g in groups]
    nulls = [c.statistics.null_count if c.is_stats_set and c.statistics.has_null_count else 0 for c in chunks]
    if metadata.num_rows and sum(nulls) == metadata.num_rows:
        raise ValueError(_no_bytes(column))
    rows = [(g.num_rows, c.total_compressed_size, c.data_page_offset) for g, c in zip(groups, chunks, strict=True)]
    return np.array(rows, _GROUP)


def _no_bytes(column: str) -> str:
    return (
        f"column {column!r} holds paths and no image bytes, and paths out of a data file are not followed; write the "
        "data set with its images embedded, or read their folder as kind 'images'"
    )


def _check_column(schema, column: str) -> None:
    import pyarrow.types as t

    if column not in schema.names:
        raise ValueError(f"no column {column!r}, only {schema.names}")
    type_ = schema.field(column).type
    if t.is_struct(type_):
        type_ = next((f.type for f in type_ if f.name == "bytes"), type_)
    if not (t.is_binary(type_) or t.is_large_binary(type_)):
        raise ValueError(f"column {column!r} is {type_}, not image bytes (binary, or a struct with a field 'bytes')")


def _open_parquet(file: storage.File):
    from pyarrow.parquet import ParquetFile

    source = storage.open_file(file) if storage.is_remote(file.path) else file.path
    return ParquetFile(source, page_checksum_verification=True)


def _load_group(file: storage.File, group: int, column: str) -> tuple[Any, int]:
    """(pyarrow values of one row group, the memory that they take)."""
    storage.check_same(file)
    if not _is_arrow(file.path):
        with storage.explained(file.path), _open_parquet(file) as f:
            try:
                values = f.read_row_group(group, columns=[column]).column(0)
            except OSError as e:
                if e.errno is None:  # pyarrow's own, of damaged pages
                    raise RecordError(file.path, f"cannot be read: {e}") from e
                raise
            return values, values.nbytes
    import pyarrow as pa

    with storage.explained(file.path), pa.memory_map(file.path) as mapped, pa.ipc.open_stream(mapped) as stream:
        _check_column(stream.schema, column)
        return stream.read_all().column(column), 0


def _record(value, name: str) -> Record:
    found = value.as_py()
    if isinstance(found, dict):
        name += f":{found['path']}" if found.get("path") else ""
        found = found["bytes"]
    if found is None:
        raise RecordError(name, "it has no image bytes")
    return Record(found, name)
