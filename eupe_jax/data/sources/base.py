"""What every source of records has in common."""

import errno
import hashlib
import operator
import os
from collections.abc import Iterable
from typing import NamedTuple, Protocol, SupportsIndex

import numpy as np

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})


class Record(NamedTuple):
    """data: encoded image bytes, or a uint8 array [H, W, 3] or [H, W]. name: how errors and logs call it."""

    data: bytes | np.ndarray
    name: str


class Source(Protocol):
    """Random-access records; `digest` identifies them."""

    digest: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class ReadError(OSError):
    """What sources raise. name: of the record or file. reason: in words."""

    def __init__(self, name: str, reason: str):
        super().__init__(errno.EIO, reason, name)
        self.name, self.reason = name, reason

    def __reduce__(self):
        return type(self), (self.name, self.reason)

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class RecordError(ReadError):
    """One record that cannot be read, by itself (damaged, empty, gone); the others may be fine."""


class Unavailable(ReadError):
    """Storage did not answer or could not be reached: it says nothing of the record, and may be over in a while."""


class Refused(Unavailable):
    """There is no such file, or it is forbidden: the storage does answer, or is not mounted."""


class Changed(ReadError):
    """A file is not what it was when the source was opened: going on would give other records."""

    def __init__(self, name: str, reason: str = "changed since the source was opened; start again"):
        super().__init__(name, reason)


def digest_of(parts: Iterable[object]) -> str:
    """sha256 over the `repr` of plain values."""
    h = hashlib.sha256()
    for part in parts:
        h.update(repr(part).encode())
    return h.hexdigest()


def in_range(index: SupportsIndex, length: int) -> int:
    """A plain int from 0 on, for an index that may be NumPy's or count from the end. Raises IndexError."""
    i = operator.index(index)
    if not -length <= i < length:
        raise IndexError(f"record {i} of {length}")
    return i % length


def is_plain_name(name: object) -> bool:
    """Whether `name`, out of a manifest or an archive, is that of a file in the very folder it is looked for in."""
    return isinstance(name, str) and 0 < len(name) < 256 and name not in (".", "..") and not set(name) & set("/\\\0")


def is_image(name: str) -> bool:
    """Whether a path ends like an image; hidden files do not count."""
    base = os.path.basename(name)
    return not base.startswith(".") and os.path.splitext(base)[1].lower() in IMAGE_SUFFIXES
