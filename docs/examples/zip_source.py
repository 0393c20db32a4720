"""Images inside zip files, as a kind of source. Its place is eupe_jax/data/sources/zip_files.py.

A source is random access: `len(source)`, `source[i] -> Record`, and a `digest` that changes when its records do.
Decoding, shuffling, broken images and augmentation are not its business.
"""

import zipfile
import zlib
from pathlib import Path

from eupe_jax.data.sources.base import Record, RecordError, digest_of, in_range, is_image

MAX_BYTES = 256 << 20  # of one image, unpacked: an archive of kilobytes can claim to hold terabytes


class ZipFiles:
    """Every image in one zip file, or in all zip files of a folder, sorted by path.

    Only names are kept in memory, and nothing is extracted, so no name in an archive can lead anywhere. Raises
    FileNotFoundError where there is no such path, ValueError for files that are no zip files or hold no image.
    """

    def __init__(self, path: str):
        root = Path(path)
        if not root.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        files = sorted(root.rglob("*.zip")) if root.is_dir() else [root]
        self._members: list[tuple[Path, str]] = []
        facts = []
        for file in files:
            try:
                with zipfile.ZipFile(file) as archive:
                    found = [m for m in archive.infolist() if not m.is_dir() and is_image(m.filename)]
            except zipfile.BadZipFile as error:
                raise ValueError(f"{file}: is no whole zip file ({error}); copy it again or remove it") from None
            self._members += [(file, m.filename) for m in found]
            # Names below the folder: the same files elsewhere are the same data.
            below = file.relative_to(root) if root.is_dir() else file.name
            facts += [(str(below), m.filename, m.file_size, m.CRC) for m in found]
        if not self._members:
            raise ValueError(f"{path}: no images found in {len(files)} zip files")
        self.digest = digest_of(facts)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> Record:
        """Encoded bytes; RecordError where this one record is damaged. Opened anew each time: it can be pickled, and
        any number of threads may read."""
        file, member = self._members[in_range(index, len(self))]
        name = f"{file}:{member}"
        try:
            with zipfile.ZipFile(file) as archive:
                if (size := archive.getinfo(member).file_size) > MAX_BYTES:
                    raise RecordError(name, f"claims to be {size:,} bytes long, more than {MAX_BYTES:,}")
                return Record(archive.read(member), name)
        except (zipfile.BadZipFile, zlib.error, KeyError, RuntimeError) as error:  # RuntimeError: encrypted
            raise RecordError(name, f"cannot be unpacked ({error})") from error
