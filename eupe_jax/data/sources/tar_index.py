"""Where the images lie in an uncompressed tar file."""

import tarfile
from typing import BinaryIO

import numpy as np

from eupe_jax.data.sources.base import is_image
from eupe_jax.data.sources.storage import File, explained, open_file

_MOST_HEADER = 16 << 20  # bytes of a header: of names, mostly


def is_tar(path: str) -> bool:
    """Whether a path ends like a tar file that is not compressed."""
    return path.lower().endswith(".tar")


def member_name(row: np.void) -> str:
    """The name in a row of `tar_images`."""
    return str(row["name"], "utf-8", "surrogateescape")


def tar_images(file: File) -> np.ndarray:
    """A row (offset and size of its bytes, name) for every image member, in the order in which they lie there.

    Returns: array of fields "offset", "size" (uint64) and "name" (bytes; UTF-8, or what bytes the archive has).
    Raises ValueError naming the file, and the byte where it stops making sense, when it is no uncompressed tar file, or
    one that is cut off, damaged or made to be read for ever or into memory whole.
    """
    rows = []
    with explained(file.path), open_file(file) as f:
        at = 0
        try:
            with tarfile.open(fileobj=_Headers(f), mode="r:") as tar:
                for member in tar:
                    tar.members.clear()  # it would keep them all
                    if tar.offset <= at:
                        raise tarfile.ReadError(f"the size of {member.name[:100]!r} leads backwards")
                    at = tar.offset
                    if member.isreg() and not member.issparse() and is_image(member.name):
                        rows.append((member.offset_data, member.size, member.name))
                end = tar.offset
        except tarfile.TarError as e:
            if at:
                raise ValueError(f"{file.path}: the tar file is cut off or damaged near byte {at} ({e})") from e
            raise ValueError(
                f"{file.path}: cannot be read as an uncompressed tar file ({e}); decompress or remove it"
            ) from e
        _check_end(file, f, end)
    names = [name.encode("utf-8", "surrogateescape") for _, _, name in rows]
    width = max(map(len, names), default=1)
    table = np.zeros(len(rows), [("offset", "<u8"), ("size", "<u8"), ("name", f"S{width}")])
    for column, values in (("offset", [r[0] for r in rows]), ("size", [r[1] for r in rows]), ("name", names)):
        table[column] = values
    return table


class _Headers:
    """A tar file whose headers are read from it: none is larger than `_MOST_HEADER`, whatever it claims."""

    def __init__(self, file: BinaryIO):
        self._file = file

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MOST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)

    def __getattr__(self, name: str):
        return getattr(self._file, name)


def _check_end(file: File, f, end: int) -> None:
    """tarfile ends quietly at a header that it cannot read; only a block of zeros ends an archive."""
    f.seek(end)
    block = f.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        at = end + len(block)
        raise ValueError(f"{file.path}: the tar file is cut off at byte {at}, before its end mark; copy it again")
    if any(block):
        raise ValueError(f"{file.path}: the tar file is damaged at byte {end}: there is no valid header")
