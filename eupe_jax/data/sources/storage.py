"""Files of local disks and of buckets behind the same few calls.

A path with "://" is fsspec's: gs:// (through gcsfs), s3:// (s3fs), memory://, ...; anything else is local. Retries and
credentials are fsspec's own (environment variables FSSPEC_GS_TOKEN, STORAGE_EMULATOR_HOST, ...).
"""

import glob
import itertools
import logging
import os
import re
import stat as stat_module
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

from eupe_jax.data.sources.base import Changed, ReadError, RecordError, Refused, Unavailable

PathLike = str | os.PathLike

_REQUESTS = 32  # at once, to look files up
MOST_BYTES = 1 << 30  # of one record: twice the largest picture that is decoded, uncompressed


class File(NamedTuple):
    """size: in bytes. version: differs when the content does (modification time in ns, or a bucket's etag)."""

    path: str
    size: int
    version: str


def is_remote(path: PathLike) -> bool:
    """Whether a path belongs to fsspec."""
    return "://" in os.fspath(path)


def list_files(path: str, wanted: Callable[[str], bool]) -> list[File]:
    """Wanted files below a folder (searched recursively, links followed, hidden ones passed over), sorted by path, or
    the one file. Raises FileNotFoundError where there is neither."""
    forget_listings(path)
    found = _find(path, wanted)
    if found is None:
        raise FileNotFoundError(f"no such image folder: {path}")
    return found


def find(path: PathLike | Sequence[PathLike], wanted: Callable[[str], bool], what: str) -> list[File]:
    """The files that a path, or each of several, stands for, in that order and sorted by path within each.

    path: a file, a folder (as `list_files` has it), a glob pattern, or one with braces, "train-{000000..000003}.tar" or
      "{train,val}.tar", each of whose readings must exist.
    wanted: which files of a folder or pattern count; a file named in full always does.
    what: what errors call such files, e.g. "tar shards".
    Raises FileNotFoundError for a path that stands for nothing, ValueError for a folder without a wanted file.
    """
    if not isinstance(path, str | os.PathLike):
        return [file for p in path for file in find(p, wanted, what)]
    path = os.fspath(path)
    forget_listings(path)
    readings = [path] if not is_remote(path) and os.path.exists(path) else expand_braces(path)
    with ThreadPoolExecutor(min(len(readings), _REQUESTS)) as pool:
        found = list(pool.map(lambda one: _find(one, lambda p: p == one or wanted(p)), readings))
    for one, files in zip(readings, found, strict=True):
        if files is None:
            raise FileNotFoundError(f"{one}: no such file or folder")
    if not any(found):
        raise ValueError(f"{path}: no {what} found")
    return [file for files in found for file in files]


def _find(path: str, wanted: Callable[[str], bool]) -> list[File] | None:
    """None where there is nothing of that path."""
    with explained(path):
        if is_remote(path):
            found = _find_remote(path)
            return [f for f in found if wanted(f.path)] if found else None
        if os.path.exists(path):
            return [_local_file(p) for p in walk(path) if wanted(p)]
        matches = [p for p in sorted(glob.glob(path, recursive=True)) if os.path.isfile(p)]
        return [_local_file(p) for p in matches if wanted(p)] if matches else None


def expand_braces(pattern: str) -> list[str]:
    """Every reading of "a-{000..012}.tar" (numbers keep their width) and "{x,y}.tar"; without braces, the pattern."""
    pieces = []
    for text, braced in re.findall(r"([^{]*)(?:\{([^{}]*)\})?", pattern):
        pieces.append([text])
        if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", braced):
            first, last = numbers.groups()
            pieces.append([f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)])
        elif braced:
            pieces.append(braced.split(","))
    return ["".join(choice) for choice in itertools.product(*pieces)]


def stat(path: str) -> File:
    """Size and version of one file. Raises Refused where there is none."""
    with explained(path):
        return _remote_file(path, _filesystem(path).info(path)) if is_remote(path) else _local_file(path)


def check_same(file: File) -> None:
    """Raises Changed where a file is not what it was, and Refused where it is gone."""
    if stat(file.path) != file:
        raise Changed(file.path)


def forget_listings(path: str) -> None:
    """Makes fsspec ask the bucket again, where it remembers what a folder held."""
    if is_remote(path):
        with explained(path):
            _filesystem(path).invalidate_cache()


def exists(path: str) -> bool:
    """Whether there is such a file."""
    if not is_remote(path):
        return os.path.isfile(path)
    with explained(path):
        try:
            return _filesystem(path).info(path)["type"] == "file"  # its `isfile` takes any failure for a no
        except FileNotFoundError:
            return False


def _local_file(path: str) -> File:
    status = os.stat(path)
    if not stat_module.S_ISREG(status.st_mode):  # a pipe or a device would be read for ever
        raise Refused(path, "not a regular file: remove it")
    return File(path, status.st_size, str(status.st_mtime_ns))


def walk(path: str) -> list[str]:
    """Every file below a folder, sorted; hidden ones are passed over, links followed, but none back up.

    A folder that several links lead to counts under each of them.
    """
    return [path] if os.path.isfile(path) else sorted(_below(path, frozenset()))


def _below(folder: str, above: frozenset[str]) -> Iterator[str]:
    """Files below `folder`. above: the real paths of the folders that led to it."""
    real = os.path.realpath(folder)
    if real in above:  # a link back up
        return
    with os.scandir(folder) as found:
        entries = [entry for entry in found if not entry.name.startswith(".")]
    for entry in entries:
        if entry.is_dir():
            yield from _below(entry.path, above | {real})
        else:
            yield entry.path


def _filesystem(path: str):
    """fsspec's file system of a path: looked up each time, since fsspec keeps one a process."""
    import fsspec

    if not path.startswith(("gs://", "gcs://")):
        return fsspec.core.url_to_fs(path)[0]
    # The plain class: the other one asks for the kind of the bucket before every read where it lacks the right to know.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        from gcsfs.core import GCSFileSystem
    except ImportError as e:
        raise ImportError(f"{path}: buckets of Google Cloud need gcsfs; run: pip install gcsfs ({e})") from e
    if logging.getLogger("gcsfs").level == logging.NOTSET:
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what it logs as errors it raises as well
    return GCSFileSystem()


def _find_remote(path: str) -> list[File]:
    fs = _filesystem(path)
    found = fs.glob(path, detail=True) if glob.has_magic(path) else fs.find(path, detail=True)
    scheme = path.split("://")[0]
    files = [
        _remote_file(f"{scheme}://{name.lstrip('/')}", info) for name, info in found.items() if info["type"] == "file"
    ]
    return sorted(f for f in files if not re.search(r"/\.", f.path[len(path) :]))


def _remote_file(path: str, info: dict) -> File:
    keys = ("etag", "ETag", "generation", "md5Hash", "crc32c", "updated", "LastModified", "mtime", "created")
    version = next((info[k] for k in keys if info.get(k)), "")
    if hasattr(version, "timestamp"):  # listings and single answers may say it differently
        version = version.timestamp()
    return File(path, int(info["size"]), str(version))


def read_file(path: str) -> bytes:
    """All of a file. Raises RecordError for a local one of more than `MOST_BYTES`."""
    with explained(path):
        if is_remote(path):
            return _filesystem(path).cat_file(path)
        with open(path, "rb") as f:
            if (size := os.fstat(f.fileno()).st_size) > MOST_BYTES:
                raise RecordError(path, f"a file of {size} bytes: more than {MOST_BYTES}")
            return f.read()


def open_file(file: File) -> BinaryIO:
    """A seekable binary file; of a bucket, blocks are fetched as they are needed."""
    if not is_remote(file.path):
        return open(file.path, "rb")
    with explained(file.path):
        fs = _filesystem(file.path)
        return _Explained(file.path, fs.open(file.path, "rb", block_size=8 << 20, cache_type="readahead"))


class _Explained:
    """A file of a bucket whose reads fail as `explained` has it, also inside of other libraries."""

    def __init__(self, path: str, file: BinaryIO):
        self._path, self._file = path, file

    def read(self, size: int = -1) -> bytes:
        with explained(self._path):
            return self._file.read(size)

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def __enter__(self) -> "_Explained":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()


class RangeReader:
    """Byte ranges of many files, from any thread, with at most `limit` local files held open.

    Pickles as an empty one, so that each process opens files for itself.
    """

    def __init__(self, limit: int = 64):
        self._limit = limit
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self):
        return RangeReader, (self._limit,)

    def read(self, file: File, offset: int, size: int) -> bytes:
        """Bytes offset .. offset + size.

        Raises Changed when the file is shorter or not `file` any more, Unavailable when it cannot be read or is gone,
        and RecordError when it never was that long, or for more than `MOST_BYTES`.
        """
        if size > MOST_BYTES:
            raise RecordError(file.path, f"a record of {size} bytes at byte {offset}: more than {MOST_BYTES}")
        if offset > file.size:
            raise RecordError(file.path, f"ends at byte {file.size}, before a record at byte {offset}")
        if is_remote(file.path):
            with explained(file.path):
                data = _filesystem(file.path).cat_file(file.path, start=offset, end=offset + size) if size else b""
        else:
            data = self._read_local(file, offset, size)
        if len(data) != size:
            if offset + size <= file.size:
                raise Changed(file.path)
            raise RecordError(file.path, f"ends at byte {offset + len(data)}, within a record up to {offset + size}")
        return data

    def _read_local(self, file: File, offset: int, size: int) -> bytes:
        descriptor = self._descriptor(file)
        try:
            return descriptor.read(offset, size)
        except Unavailable:
            with self._lock:  # whoever tries again opens it anew: a stale handle stays stale
                if self._open.get(file.path) is descriptor:
                    del self._open[file.path]
            raise

    def _descriptor(self, file: File) -> "_Descriptor":
        with self._lock:
            if file.path in self._open:
                self._open.move_to_end(file.path)
                return self._open[file.path]
        descriptor = _Descriptor(file)  # two threads may both do so
        with self._lock:
            self._open[file.path] = descriptor
            while len(self._open) > self._limit:
                self._open.popitem(last=False)  # closed when the last reader lets go of it
        return descriptor


class _Descriptor:
    """An open local file; closes itself."""

    def __init__(self, file: File):
        self._number, self._path = -1, file.path
        with explained(file.path):
            self._number = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
            status = os.fstat(self._number)
        if (status.st_size, str(status.st_mtime_ns)) != (file.size, file.version):
            raise Changed(file.path)

    def read(self, offset: int, size: int) -> bytes:
        with explained(self._path):
            data = os.pread(self._number, size, offset)
            while 0 < len(data) < size and (more := os.pread(self._number, size - len(data), offset + len(data))):
                data += more
        return data

    def __del__(self):
        if self._number >= 0:
            os.close(self._number)


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Turns what storage libraries raise into Unavailable or Refused: the path and one clear reason.

    Never into a RecordError: whether one file alone is missing, only its source can tell.
    """
    try:
        yield
    except ReadError:
        raise
    except (FileNotFoundError, NotADirectoryError) as e:
        if is_remote(path):
            raise Refused(path, "no such object, folder or bucket") from e
        raise Refused(e.filename or path, "no such file") from e
    except (ImportError, ValueError, MemoryError):
        raise
    except Exception as e:  # gcsfs and aiohttp have their own classes for HTTP errors and broken connections
        if not (isinstance(e, OSError) or is_remote(path)):
            raise
        said = " ".join((getattr(e, "strerror", None) or str(e) or type(e).__name__).split())
        if isinstance(e, PermissionError) or re.search(r"forbidden|\b40[13]\b|anonymous caller", said, re.IGNORECASE):
            raise Refused(path, f"access is forbidden; check permissions and credentials ({said})") from e
        raise Unavailable(path, f"cannot be read: {said}") from e
