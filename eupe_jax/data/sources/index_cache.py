"""Tables of what shards hold (a NumPy array a shard), made once and kept on disk.

A table is one file: a line of JSON that says whose it is, padded with blanks to 64 bytes' multiple, then the array's
bytes, which are mapped into memory when they are needed. It counts while the shard's path, size and version (time of
modification, or a bucket's etag) are what they were; a table that is stale, of another format or damaged is made again.
"""

import hashlib
import json
import logging
import os
import tempfile
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from eupe_jax.data.sources.base import RecordError, in_range
from eupe_jax.data.sources.storage import File, is_remote

log = logging.getLogger(__name__)

_FORMAT = "eupe_jax shard index 1"
_ALIGN = 64


class Index(NamedTuple):
    """What is known of one shard: its file, the number of rows of its table, a digest of them, where the table is."""

    file: File
    rows: int
    digest: str
    table: np.ndarray | None  # when it is not on disk
    path: str = ""  # of the table on disk

    def load(self) -> np.ndarray:
        """The table. Raises ValueError or OSError when the file on disk was damaged meanwhile."""
        return self.table if self.table is not None else _read(Path(self.path), self.file)[1]


def default_folder(name: str) -> str:
    """$XDG_CACHE_HOME/eupe_jax/NAME."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "eupe_jax", name)


def make_indices(
    files: Sequence[File], build: Callable[[File], np.ndarray], kind: str, folder: str | None, threads: int = 16
) -> list[Index]:
    """The index of every shard, from `folder` where that has a good one, else built (and written there).

    build: the table of a shard; runs in threads. kind: which function that is, with its settings and version.
    folder: None keeps tables in memory. Errors of `build` are passed on.
    """

    def one(file: File) -> Index:
        if folder is None:
            return _in_memory(file, build(file))
        path = Path(folder) / f"{_digest(kind, _identity(file.path))[:32]}.idx"
        try:
            header, _ = _read(path, file)
            if header["kind"] == kind:
                return Index(file, header["rows"], header["digest"], None, str(path))
        except FileNotFoundError:
            pass
        except _Stale as e:
            log.info("%s: indexing again: %s", file.path, e)
        except (OSError, ValueError, KeyError, TypeError) as e:
            log.warning("%s: the index %s is damaged (%s); making it again", file.path, path, e)
        return _store(path, file, kind, build(file))

    if not files:
        return []
    with ThreadPoolExecutor(min(threads, len(files))) as pool:
        # A bar only where it takes long enough to wonder.
        return list(tqdm(pool.map(one, files), total=len(files), desc=f"index {kind}", delay=3, leave=False))


class _Stale(ValueError):
    pass


def _identity(path: str) -> str:
    return path if is_remote(path) else os.path.realpath(path)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def _in_memory(file: File, table: np.ndarray) -> Index:
    return Index(file, len(table), hashlib.sha256(table.tobytes()).hexdigest(), table)


def _store(path: Path, file: File, kind: str, table: np.ndarray) -> Index:
    index = _in_memory(file, table)
    header = {
        "format": _FORMAT, "kind": kind, "path": _identity(file.path), "size": file.size, "version": file.version,
        "rows": index.rows, "digest": index.digest, "dtype": np.lib.format.dtype_to_descr(table.dtype),
        "crc32": zlib.crc32(table.tobytes()),
    }  # fmt: skip
    line = json.dumps(header).encode()
    line += b" " * (-(len(line) + 1) % _ALIGN) + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as f:
            try:
                f.write(line + table.tobytes())
                f.close()
                os.replace(f.name, path)
            except BaseException:
                os.unlink(f.name)
                raise
    except OSError as e:
        log.warning("%s: its index cannot be kept in %s (%s); it is made again next time", file.path, path.parent, e)
        return index
    return index._replace(table=None, path=str(path))


def _read(path: Path, file: File) -> tuple[dict, np.ndarray]:
    """Header and mapped table, checked against the shard and against the checksum."""
    with open(path, "rb") as f:
        line = f.readline(1 << 20)
        header = json.loads(line)
        if header["format"] != _FORMAT:
            raise _Stale(f"it has format {header['format']!r}")
        if (header["path"], header["size"], header["version"]) != (_identity(file.path), file.size, file.version):
            raise _Stale(f"it was made of {header['size']} bytes, version {header['version']}")
        dtype = np.lib.format.descr_to_dtype([tuple(x) for x in header["dtype"]])
        expected = len(line) + header["rows"] * dtype.itemsize
        if not line.endswith(b"\n") or os.fstat(f.fileno()).st_size != expected:
            raise ValueError(f"it has {os.fstat(f.fileno()).st_size} bytes, not {expected}")
    if not header["rows"]:
        return header, np.zeros(0, dtype)
    table = np.memmap(path, dtype, "r", len(line), (header["rows"],))
    if zlib.crc32(table.view(np.uint8)) != header["crc32"]:
        raise ValueError("its checksum does not match")
    return header, table


class Tables:
    """The rows of many shards' tables under one global index. Few tables are in memory at once; none is pickled."""

    def __init__(self, indices: Sequence[Index], limit: int = 128):
        self.indices, self._limit = list(indices), limit
        self._ends = np.cumsum([0] + [i.rows for i in self.indices])[1:]
        self._loaded: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self):
        return Tables, (self.indices, self._limit)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, index: int) -> tuple[int, int]:
        """(shard, row in its table). Raises IndexError outside of them all."""
        index = in_range(index, len(self))
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard]) + self.indices[shard].rows

    def row(self, shard: int, row: int) -> np.void:
        """One row. Raises RecordError when the table on disk is gone or damaged."""
        with self._lock:
            table = self._loaded.get(shard)
            if table is None:
                try:
                    table = self._loaded[shard] = self.indices[shard].load()
                except (OSError, ValueError) as e:
                    index = self.indices[shard]
                    raise RecordError(
                        index.file.path, f"its index {index.path} cannot be read ({e}); start again"
                    ) from e
                while len(self._loaded) > self._limit:
                    self._loaded.popitem(last=False)
            self._loaded.move_to_end(shard)
        return table[row]
