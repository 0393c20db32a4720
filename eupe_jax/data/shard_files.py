"""What packs and feature caches share: files that are whole or not there, and folders that one process writes."""

import errno
import fcntl
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from eupe_jax.data.sources.record_codec import unpack_record
from eupe_jax.files import move_whole, write_whole
from eupe_jax.hashing import sha256_file

# One record a chunk, so that a random access reads nothing else; images are compressed already.
WRITER_OPTIONS = "group_size:1,uncompressed"


class BusyError(OSError):
    """Another process holds the lock."""


@contextmanager
def alone(lock: Path, busy: str | None = None) -> Iterator[None]:
    """Holds a lock file, made if need be, until the block or the process ends, however it does.

    When another process holds it: waits; or, where `busy` is given, raises BusyError, saying so. File systems without
    locks are let pass.
    """
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError as e:
            raise BusyError(busy) from e
        except OSError:
            pass
        yield


def write_json(path: Path, value: object) -> None:
    """`write_whole` of a plain value."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=True) + "\n")


class ShardWriter:
    """Writes one ArrayRecord shard of packed records (record_codec.py), as a context manager.

    It is written to `temporary`, read back, flushed to the disk and only then renamed to `path`; `temporary` is gone
    afterwards in any case. Then `entry` is what a manifest says of it: {"file", "records", "bytes", "sha256"}.
    Raises OSError, which names the file, when it cannot be written or does not read back.
    """

    def __init__(self, path: Path, temporary: Path):
        self._path, self._temporary = path, temporary
        self._sums: list[bytes] = []
        self.entry: dict = {}

    def __enter__(self) -> "ShardWriter":
        from array_record.python.array_record_module import ArrayRecordWriter

        self._temporary.parent.mkdir(parents=True, exist_ok=True)
        self._temporary.write_bytes(b"")  # says what is wrong with the place
        try:
            self._writer = self._call(ArrayRecordWriter, str(self._temporary), WRITER_OPTIONS)
        except OSError:
            self._temporary.unlink()
            raise
        return self

    def write(self, record: bytes) -> None:
        """Appends a record. Raises OSError, which names the file."""
        self._call(self._writer.write, record)
        self._sums.append(record[-4:])

    def __exit__(self, kind, error, trace) -> None:
        try:
            try:
                self._call(self._writer.close)
            except OSError:
                if error is None:
                    raise
            if error is None:
                self._finish()
        finally:
            self._temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        _read_back(self._temporary, self._sums)
        self.entry = {
            "file": self._path.name,
            "records": len(self._sums),
            "bytes": self._temporary.stat().st_size,
            "sha256": sha256_file(self._temporary),
        }
        move_whole(self._temporary, self._path)

    def _call(self, function: Callable, *arguments):
        """array_record's errors become OSErrors."""
        try:
            return function(*arguments)
        except RuntimeError as e:
            if "No space left" in str(e):
                text = "the disk is full; finished shards are kept: make room and run the same command again"
                raise OSError(errno.ENOSPC, text, str(self._temporary.parent)) from e
            raise OSError(f"{self._temporary} cannot be written: {e}") from e


def open_shard(path: Path):
    """array_record's reader, without read-ahead."""
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(str(path), options="readahead_buffer_size:0")


def _read_back(path: Path, sums: list[bytes]) -> None:
    reader = open_shard(path)
    if not reader.ok() or reader.num_records() != len(sums):
        raise OSError(f"{path} does not read back as it was written: run the same command again")
    for number, expected in enumerate(sums):
        data = reader.read([number])[0]
        unpack_record(data, f"{path}[{number}]")  # computes its checksum
        if data[-4:] != expected:
            raise OSError(f"{path}[{number}] does not read back as it was written: run the same command again")
    reader.close()
