"""Where records come from: random access to encoded images, with NumPy and Pillow alone.

A source answers `len(source)` and `source[i] -> Record`, can be pickled (worker processes), and has a `digest`, a
string that changes when its records do (it goes into fingerprints of what is made from them). Decoding is not its
business (`eupe_jax.data.host`).
"""

import hashlib
import importlib.util
import os
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

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


def _digest(parts: Iterable[object]) -> str:
    h = hashlib.sha256()
    for part in parts:
        h.update(repr(part).encode())
    return h.hexdigest()


def _is_image(name: str) -> bool:
    base = os.path.basename(name)
    return not base.startswith(".") and os.path.splitext(base)[1].lower() in IMAGE_SUFFIXES


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
            elif _is_image(file):
                self._entries.append((relative, "", -1, os.path.getsize(file)))
        if not self._entries:
            raise ValueError(
                f"{self.path}: no images found; looked for files (and members of uncompressed .tar files) that end in "
                + ", ".join(sorted(IMAGE_SUFFIXES))
            )
        self.digest = _digest(self._entries)

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
            return [
                (m.name, m.offset_data, m.size) for m in tar if m.isreg() and not m.issparse() and _is_image(m.name)
            ]
    except tarfile.TarError as e:
        raise ValueError(f"{file}: cannot be read as an uncompressed tar file ({e}); decompress or remove it") from e


class ArraySource:
    """Images already in memory: uint8 arrays [H, W, 3] or [H, W], each of its own size, or one array [N, H, W, 3]."""

    def __init__(self, images: Sequence[np.ndarray] | np.ndarray, names: Sequence[str] | None = None):
        if len(images) == 0:
            raise ValueError("ArraySource: no images given")
        if names is not None and len(names) != len(images):
            raise ValueError(f"ArraySource: {len(names)} names for {len(images)} images")
        for i, image in enumerate(images):
            if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
                raise ValueError(f"ArraySource: image {i} must be uint8 [H, W, 3], got {image.dtype} {image.shape}")
        self._images, self._names = images, names
        self.digest = _digest((x.shape, hashlib.sha256(np.ascontiguousarray(x).data).digest()) for x in images)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        return Record(self._images[index], self._names[index] if self._names else f"array[{index}]")


class PackagedPhotos:
    """The 11 colour photographs that scikit-image and scikit-learn ship: enough to show that a pipeline runs.

    `everyday=True` leaves out the three scientific pictures (retina, tissue, deep field). The two motorcycle pictures
    are a stereo pair: keep both on one side of a split. Only files are read; neither package is imported.
    Raises ImportError when a package is missing.
    """

    FILES = {
        "skimage": ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "motorcycle_right.png",
                    "rocket.jpg", "hubble_deep_field.jpg", "ihc.png", "retina.jpg"),
        "sklearn": ("china.jpg", "flower.jpg"),
    }  # fmt: skip
    FOLDERS = {"skimage": "data", "sklearn": os.path.join("datasets", "images")}
    SCIENTIFIC = frozenset({"hubble_deep_field.jpg", "ihc.png", "retina.jpg"})

    def __init__(self, everyday: bool = False):
        self._paths: list[Path] = []
        for package, files in self.FILES.items():
            found = importlib.util.find_spec(package)
            if found is None or found.origin is None:
                raise ImportError(f"PackagedPhotos needs {package}; run: pip install 'eupe_jax[quickstart]'")
            folder = Path(found.origin).parent / self.FOLDERS[package]
            self._paths += [folder / f for f in files if not (everyday and f in self.SCIENTIFIC)]
        if gone := [str(p) for p in self._paths if not p.is_file()]:
            raise ImportError(f"PackagedPhotos: this version of the package no longer ships {gone}")
        self.names = [p.stem for p in self._paths]
        self.digest = _digest((p.name, p.stat().st_size) for p in self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Record:
        return Record(self._paths[index].read_bytes(), self.names[index])


class Tfds:
    """A prepared TensorFlow Datasets split, read as ArrayRecord without TensorFlow; images stay encoded until decoded.

    name: e.g. "imagenet2012"; split, data_dir: as in `tfds.data_source` (data_dir may be remote).
    Raises ValueError when the split cannot be opened or has no image feature `image_key`.
    """

    def __init__(self, name: str, split: str = "train", data_dir: str | None = None, image_key: str = "image"):
        self._args = (name, split, data_dir, image_key)
        self._open()

    def _open(self):
        import tensorflow_datasets as tfds

        name, split, data_dir, key = self._args
        try:
            builder = tfds.builder(name, data_dir=data_dir)
            features = builder.info.features
            if features is None or key not in features:
                raise ValueError(f"it has no feature {key!r}, only {sorted(features or ())}")
            decoders = {key: tfds.decode.SkipDecoding()}
            self._data = builder.as_data_source(split=split, decoders=decoders)
            self.digest = _digest((builder.info.full_name, split, len(self._data)))
        except Exception as e:  # tfds raises many kinds
            where = f" in {data_dir}" if data_dir else ""
            raise ValueError(f"tfds {name!r} split {split!r}{where} cannot be opened: {e}") from e

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Record:
        name, split, _, key = self._args
        image = self._data[int(index)][key]
        return Record(image if isinstance(image, bytes) else np.asarray(image), f"{name}/{split}[{index}]")

    def __getstate__(self):
        return self._args

    def __setstate__(self, args):
        self._args = args
        self._open()
