"""Images that need no data set: arrays in memory, photographs of installed packages, smooth random pictures."""

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eupe_jax.data.sources import storage
from eupe_jax.data.sources.base import Record, digest_of


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
        self.digest = digest_of((x.shape, hashlib.sha256(np.ascontiguousarray(x).data).digest()) for x in images)

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
        self.digest = digest_of((p.name, p.stat().st_size) for p in self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Record:
        return Record(storage.read_file(str(self._paths[index])), self.names[index])


def synthetic(size: int, count: int = 64) -> ArraySource:
    """`count` random pictures of `size` x `size`, each of 8 x 8 flat squares: for smoke tests."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return ArraySource(coarse.repeat(-(-size // 8), 1).repeat(-(-size // 8), 2)[:, :size, :size])
