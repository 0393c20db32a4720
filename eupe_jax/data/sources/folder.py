"""Image folders."""

import bisect
import os

import numpy as np

from eupe_jax.data.sources import storage
from eupe_jax.data.sources.base import IMAGE_SUFFIXES, Record, RecordError, Refused, digest_of, in_range, is_image
from eupe_jax.data.sources.bucket_listing import list_bucket
from eupe_jax.data.sources.index_cache import IndexCache, Tables
from eupe_jax.data.sources.tar_index import is_tar, member_name, tar_images


class ImageFolder:
    """Every image below a folder, sorted by path; images inside uncompressed .tar files count too, without extraction.

    path: a folder (searched recursively, links followed) or one .tar file, local or in a bucket. Hidden files and other
      suffixes are passed over. Only names, offsets and sizes are kept in memory.
    index_dir: a folder to keep what was found inside tar files, so that they are scanned once; by default only the
      listing of a bucket is kept, in $XDG_CACHE_HOME/eupe_jax/listings. relist: list a bucket again, for new objects.
    Raises FileNotFoundError when there is no such path, and ValueError when it holds no image. What a file holds is
    found out when it is read: one that is gone by then, while others are there, is a RecordError.
    """

    def __init__(self, path: str | os.PathLike, index_dir: str | None = None, relist: bool = False):
        self.path = os.fspath(path)
        if storage.is_remote(self.path):
            files = list_bucket(self.path, _is_wanted, index_dir, relist)
        else:
            files = storage.list_files(self.path, _is_wanted)
        cache = IndexCache(tar_images, "tar images", index_dir)
        tars = cache.indices([f for f in files if is_tar(f.path)])
        self._tars, self._reader = Tables(cache, tars), storage.RangeReader()
        # Loose files by name below `path`; runs of them and tar files lie as they are sorted: (first of the tars, or
        # -1 - first of the loose files; number of records).
        self._loose: list[str] = []
        parts: list[tuple[int, int]] = []
        facts, shard = [], 0
        for file in files:
            relative = self._relative(file.path)
            if is_tar(file.path):
                parts.append((shard, tars[shard].rows))
                facts.append((relative, file.size, tars[shard].digest))
                shard += 1
                continue
            if parts and parts[-1][0] < 0:
                parts[-1] = (parts[-1][0], parts[-1][1] + 1)
            else:
                parts.append((-1 - len(self._loose), 1))
            self._loose.append(relative)
            facts.append((relative, file.size))
        self._firsts = np.array([first for first, _ in parts], np.int64)
        self._ends = np.cumsum([count for _, count in parts], dtype=np.int64)
        if not len(self):
            raise ValueError(
                f"{self.path}: no images found; looked for files (and members of uncompressed .tar files) that end in "
                + ", ".join(sorted(IMAGE_SUFFIXES))
            )
        self.digest = digest_of(facts)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def name(self, index: int) -> str:
        """Path of record `index`; a tar member as FILE.tar:MEMBER."""
        file, row = self._find(index)
        return file if row is None else f"{file.path}:{member_name(row)}"

    def __getitem__(self, index: int) -> Record:
        file, row = self._find(index)
        if row is None:
            return Record(self._read(file), file)
        return Record(self._reader.read(file, int(row["offset"]), int(row["size"])), f"{file.path}:{member_name(row)}")

    def _read(self, file: str) -> bytes:
        """Raises RecordError where that file alone is gone or forbidden, and Refused where others of its folder are."""
        try:
            return storage.read_file(file)
        except Refused as e:
            if any(map(_is_readable, self._others(file))):
                raise RecordError(file, e.reason) from e
            raise Refused(file, f"{e.reason}, nor can others of {self.path} be read: is it mounted?") from e

    def _others(self, file: str) -> list[str]:
        """Up to 16 loose files: those of its own folder that lie next to it, or, without any, some of all folders."""
        number = bisect.bisect_left(self._loose, self._relative(file))
        near = self._loose[max(number - 8, 0) : number] + self._loose[number + 1 : number + 9]
        folder = os.path.dirname(self._relative(file))
        spread = self._loose[:: -(-len(self._loose) // 16)]
        chosen = [n for n in near if os.path.dirname(n) == folder] or spread
        return [path for n in chosen if (path := self._path(n)) != file]

    def _path(self, relative: str) -> str:
        return os.path.join(self.path, relative).rstrip(os.sep)

    def _relative(self, file: str) -> str:
        return file[len(self.path) :].lstrip("/")

    def _find(self, index: int) -> tuple[str, None] | tuple[storage.File, np.void]:
        """A loose file's path, or a tar file and the row of its member."""
        index = in_range(index, len(self))
        part = int(np.searchsorted(self._ends, index, side="right"))
        first, within = int(self._firsts[part]), index - (int(self._ends[part - 1]) if part else 0)
        if first < 0:
            return self._path(self._loose[within - 1 - first]), None
        return self._tars.indices[first].file, self._tars.row(first, within)


def _is_readable(file: str) -> bool:
    try:
        storage.read_file(file)
    except Refused:
        return False
    return True


def _is_wanted(path: str) -> bool:
    return is_image(path) or is_tar(path)
