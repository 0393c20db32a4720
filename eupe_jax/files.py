"""Files that are whole or not there: a kill, a full disk or a lost permission leaves the old file or the new one."""

import contextlib
import os
from collections.abc import Iterator

from etils import epath


def write_whole(path: epath.PathLike, data: bytes | str) -> None:
    """Replaces a file whole, local or in a bucket; a local one is on the disk when this returns. Text is UTF-8.

    Raises:
      OSError: names the file; what it held before is still there, and nothing half-written beside it.
    """
    path = epath.Path(path)
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    with naming(path):
        try:
            partial.write_bytes(data.encode() if isinstance(data, str) else data)
            move_whole(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def move_whole(partial: epath.PathLike, path: epath.PathLike) -> None:
    """Gives a file, or a local folder, that is written its name, on the same disk; a file of that name is gone then."""
    partial, path = epath.Path(partial), epath.Path(path)
    if "://" in str(path):
        partial.replace(path)
        return
    for folder, _, names in os.walk(partial):
        for name in names:
            flush(epath.Path(folder) / name)
        flush(epath.Path(folder))
    if not partial.is_dir():
        flush(partial)
    os.replace(partial, path)
    flush(path.parent)


def flush(path: epath.PathLike) -> None:
    """Waits until a local file, or what a local folder lists, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def naming(path: epath.PathLike) -> Iterator[None]:
    """Around writing to `path`: a full disk is noticed by a write, whose error names no file; the one raised does."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
