"""Tables of what shards hold (a NumPy array a shard), made once and kept on disk.

A table is one file: a line of JSON that says whose it is, behind its CRC-32 and padded with blanks to a multiple of 64
bytes, then the array's bytes, which are mapped into memory when they are needed. It counts while the shard's path, size
and version (time of modification, or a bucket's etag) are what they were; a table that is stale, of another format or
damaged is made again.
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
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from eupe_jax.data.sources.base import Changed, in_range
from eupe_jax.data.sources.storage import File, check_same, is_remote

log = logging.getLogger(__name__)

_FORMAT = "eupe_jax shard index 1"
_ALIGN = 64


class Index(NamedTuple):
    """What is known of one shard without its table. digest: of the table, or "" where only `rows` are known so far.
    table: where it is not kept on disk."""

    file: File
    rows: int
    digest: str = ""
    table: np.ndarray | None = None


@dataclass(frozen=True)
class IndexCache:
    """Tables of one kind.

    build: makes the table of a shard; runs in threads. kind: names that function, its settings and its version.
    folder: where tables are kept; None keeps them in memory.
    """

    build: Callable[[File], np.ndarray]
    kind: str
    folder: str | None

    def indices(self, files: Sequence[File], threads: int = 16) -> list[Index]:
        """The index of every shard: off the disk, or built (and written). Errors of `build` are passed on."""
        if not files:
            return []
        with ThreadPoolExecutor(min(threads, len(files))) as pool:
            # A bar only where it takes long enough to wonder.
            done = pool.map(self._index, files)
            return list(tqdm(done, total=len(files), desc=f"indexing {self.kind}", delay=3, leave=False))

    def table(self, index: Index) -> np.ndarray:
        """The table of a shard, made again where the one on disk is gone or damaged.

        Raises Changed when the shard is not what it was when it was indexed.
        """
        if index.table is not None:
            return index.table
        table = self._read(index.file)
        if table is None:
            check_same(index.file)
            table = self.build(index.file)
            self._store(index.file, table)
        if len(table) != index.rows or index.digest not in ("", _table_digest(table)):
            raise Changed(index.file.path)
        return table

    def forget(self, file: File) -> None:
        """Makes the table of `file` be built again."""
        if self.folder is not None:
            self._path(file).unlink(missing_ok=True)

    def _index(self, file: File) -> Index:
        header = self._checked(file, lambda path: _read_header(path, file, self.kind)[0])
        if header is not None:
            return Index(file, header["rows"], header["digest"])
        table = self.build(file)
        kept = self._store(file, table)
        return Index(file, len(table), _table_digest(table), None if kept else table)

    def _path(self, file: File) -> Path:
        name = hashlib.sha256(f"{self.kind}\0{_identity(file.path)}".encode("utf-8", "surrogateescape")).hexdigest()
        return Path(self.folder) / f"{name[:32]}.idx"

    def _checked(self, file: File, read: Callable[[Path], object]):
        """What `read` finds on disk; None, with a message, where there is nothing of use."""
        if self.folder is None:
            return None
        path = self._path(file)
        try:
            return read(path)
        except FileNotFoundError:
            return None
        except _Stale as e:
            log.info("%s: indexing it again: %s", file.path, e)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
            log.warning("%s: its index %s is damaged (%s); making it again", file.path, path, e)
        return None

    def _read(self, file: File) -> np.ndarray | None:
        return self._checked(file, lambda path: _read_table(path, file, self.kind))

    def _store(self, file: File, table: np.ndarray) -> bool:
        """Whether it could be written; another process may write the same at the same time."""
        if self.folder is None:
            return False
        header = {
            "format": _FORMAT, "kind": self.kind, "path": _identity(file.path), "size": file.size,
            "version": file.version, "rows": len(table), "digest": _table_digest(table),
            "dtype": np.lib.format.dtype_to_descr(table.dtype), "crc32": zlib.crc32(table.tobytes()),
        }  # fmt: skip
        text = json.dumps(header).encode()
        text += b" " * (-(len(text) + 10) % _ALIGN)
        line = b"%08x %s\n" % (zlib.crc32(text), text)
        path = self._path(file)
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
            log.warning(
                "%s: its index cannot be kept in %s (%s); it is made again next time", file.path, self.folder, e
            )
            return False
        return True


class Tables:
    """The rows of many shards under one global index. Few tables (`limit`; each holds a file open) are mapped at once;
    only those without a file are pickled."""

    def __init__(self, cache: IndexCache, indices: Sequence[Index], limit: int = 128):
        self.cache, self.indices, self._limit = cache, list(indices), limit
        self._ends = np.cumsum([0] + [i.rows for i in self.indices])[1:]
        self._loaded: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self):
        return Tables, (self.cache, self.indices, self._limit)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, index: int) -> tuple[int, int]:
        """(shard, row in its table). Raises IndexError outside of them all."""
        index = in_range(index, len(self))
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard]) + self.indices[shard].rows

    def row(self, shard: int, row: int) -> np.void:
        """One row; errors as `IndexCache.table` has them."""
        with self._lock:
            if shard in self._loaded:
                self._loaded.move_to_end(shard)
                return self._loaded[shard][row]
        table = self.cache.table(self.indices[shard])  # two threads may both do so
        with self._lock:
            self._loaded[shard] = table
            while len(self._loaded) > self._limit:
                self._loaded.popitem(last=False)
        return table[row]


class _Stale(ValueError):
    pass


def default_folder(name: str) -> str:
    """$XDG_CACHE_HOME/eupe_jax/NAME."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "eupe_jax", name)


def _identity(path: str) -> str:
    return path if is_remote(path) else os.path.realpath(path)


def _table_digest(table: np.ndarray) -> str:
    return hashlib.sha256(table.tobytes()).hexdigest()


def _read_header(path: Path, file: File, kind: str) -> tuple[dict, int]:
    """The header of a table that belongs to this state of the shard, and where the table begins."""
    with open(path, "rb") as f:
        line = f.readline(1 << 20)
        checksum, _, text = line.removesuffix(b"\n").partition(b" ")
        if checksum != b"%08x" % zlib.crc32(text):
            raise ValueError("the checksum of its first line does not match")
        header = json.loads(text)
        if (header["format"], header["kind"]) != (_FORMAT, kind):
            raise _Stale(f"it has format {header['format']!r}, kind {header['kind']!r}")
        if (header["path"], header["size"], header["version"]) != (_identity(file.path), file.size, file.version):
            raise _Stale(f"it was made of {header['size']} bytes, version {header['version']}")
        header["dtype"] = np.lib.format.descr_to_dtype([tuple(x) for x in header["dtype"]])
        if header["dtype"].hasobject:  # its bytes would be taken for addresses
            raise ValueError("it holds Python objects")
        size, expected = os.fstat(f.fileno()).st_size, len(line) + header["rows"] * header["dtype"].itemsize
        if size != expected:
            raise ValueError(f"it has {size} bytes, not {expected}")
    return header, len(line)


def _read_table(path: Path, file: File, kind: str) -> np.ndarray:
    """The table, mapped into memory, checked against its checksum."""
    header, start = _read_header(path, file, kind)
    if not header["rows"]:
        return np.zeros(0, header["dtype"])
    table = np.memmap(path, header["dtype"], "r", start, (header["rows"],))
    if zlib.crc32(table.view(np.uint8)) != header["crc32"]:
        raise ValueError("its checksum does not match")
    return table
