"""Image folders."""

import os
import tarfile

from eupe_jax.data.sources.base import IMAGE_SUFFIXES, Record, digest_of, is_image


class ImageFolder:
    """Every image below a folder, sorted by path; images inside uncompressed .tar files count too, without extraction.

    path: a folder (searched recursively, links followed) or one .tar file. Hidden files and other suffixes are passed
    over. Only names, offsets and sizes are kept in memory. Raises FileNotFoundError when there is no such path, and
    ValueError when it holds no image. What a file holds is found out when it is read.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        if "://" in self.path:
            raise ValueError(f"{self.path}: an image folder is a local path; for remote data use a tfds source")
        if not os.path.exists(self.path):
            raise FileNotFoundError(f"no such image folder: {self.path}")
        # (file relative to path, member of the tar or "", offset, size); offset -1: the whole file.
        self._entries: list[tuple[str, str, int, int]] = []
        for file in _walk(self.path):
            relative = os.path.relpath(file, self.path) if os.path.isdir(self.path) else ""
            if file.lower().endswith(".tar"):
                self._entries += [(relative, *member) for member in _tar_images(file)]
            elif is_image(file):
                self._entries.append((relative, "", -1, os.path.getsize(file)))
        if not self._entries:
            raise ValueError(
                f"{self.path}: no images found; looked for files (and members of uncompressed .tar files) that end in "
                + ", ".join(sorted(IMAGE_SUFFIXES))
            )
        self.digest = digest_of(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def name(self, index: int) -> str:
        """Path of record `index`; a tar member as FILE.tar:MEMBER."""
        file, member, _, _ = self._entries[index]
        return os.path.join(self.path, file).rstrip(os.sep) + (f":{member}" if member else "")

    def __getitem__(self, index: int) -> Record:
        file, _, offset, size = self._entries[index]
        with open(os.path.join(self.path, file) if file else self.path, "rb") as f:
            if offset < 0:
                return Record(f.read(), self.name(index))
            f.seek(offset)
            return Record(f.read(size), self.name(index))


def _walk(path: str) -> list[str]:
    if os.path.isfile(path):
        return [path]
    files, seen = [], set()
    for folder, below, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up
            below.clear()
            continue
        seen.add(real)
        below[:] = [b for b in below if not b.startswith(".")]
        files += [os.path.join(folder, n) for n in names if not n.startswith(".")]
    return sorted(files)


def _tar_images(file: str) -> list[tuple[str, int, int]]:
    """(member, offset of its bytes, size) of every image in a tar file, in the order in which they lie there."""
    try:
        with tarfile.open(file, "r:") as tar:
            return [(m.name, m.offset_data, m.size) for m in tar if m.isreg() and not m.issparse() and is_image(m.name)]
    except tarfile.TarError as e:
        raise ValueError(f"{file}: cannot be read as an uncompressed tar file ({e}); decompress or remove it") from e
