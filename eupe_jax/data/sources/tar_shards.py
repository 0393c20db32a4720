"""WebDataset-style tar shards."""

import os
import posixpath
from collections.abc import Sequence
from functools import partial

import numpy as np

from eupe_jax.data.sources import storage
from eupe_jax.data.sources.base import Record, RecordError, digest_of
from eupe_jax.data.sources.index_cache import IndexCache, Tables, default_folder
from eupe_jax.data.sources.tar_index import is_tar, member_name, tar_images


class TarShards:
    """One record for every sample of WebDataset-style shards: the image member of each key, read in place.

    path: a folder of .tar files, one file, a glob pattern, or one with braces ("train-{000000..000003}.tar"), local or
      in a bucket; or several of those. A key is a member's path up to the first dot of its last part.
    member: for samples with several images, what follows the key's dot in the one to read, e.g. "jpg".
    index_dir: where the index of each shard is kept (default $XDG_CACHE_HOME/eupe_jax/tar_index); it is made once, and
      again when a shard's size or time of modification (in a bucket, its etag) is another.
    Members are records of bytes and never files: no path of an archive is opened. Raises FileNotFoundError for a shard
    that is not there, ValueError for one that is cut off or damaged (with the byte), a sample with several images and
    no `member`, or no image at all.
    """

    def __init__(
        self, path: str | os.PathLike | Sequence[str | os.PathLike], member: str = "", index_dir: str | None = None
    ):
        files = storage.find(path, is_tar, "tar shards")
        folder = index_dir or default_folder("tar_index")
        cache = IndexCache(partial(_samples, member=member), f"tar samples {member}".strip(), folder)
        indices = cache.indices(files)
        self._tables, self._reader = Tables(cache, indices), storage.RangeReader()
        if not len(self):
            raise ValueError(f"{path}: no images in {len(files)} tar shards" + (f" as KEY.{member}" if member else ""))
        self.digest = digest_of((posixpath.basename(i.file.path), i.file.size, i.digest) for i in indices)

    def __len__(self) -> int:
        return len(self._tables)

    def __getitem__(self, index: int) -> Record:
        shard, row = self._tables.locate(index)
        file, found = self._tables.indices[shard].file, self._tables.row(shard, row)
        name = f"{file.path}:{member_name(found)}"
        try:
            return Record(self._reader.read(file, int(found["offset"]), int(found["size"])), name)
        except RecordError as e:
            raise RecordError(name, e.reason) from e


def _samples(file: storage.File, member: str) -> np.ndarray:
    """The rows of `tar_images` that are the image of their key."""
    table = tar_images(file)
    keys = [_key(member_name(row)) for row in table]
    if member:
        return table[np.array([ext == member for _, ext in keys], bool)]
    for i in range(1, len(keys)):
        if keys[i][0] == keys[i - 1][0]:
            both = " and ".join(member_name(table[j]) for j in (i - 1, i))
            raise ValueError(f"{file.path}: one sample has several images, {both}; name one: member={keys[i][1]!r}")
    return table


def _key(name: str) -> tuple[str, str]:
    """(key, the rest) of a member, as WebDataset cuts names: at the first dot of the last part."""
    folder, base = posixpath.split(name)
    key, _, rest = base.partition(".")
    return posixpath.join(folder, key), rest
