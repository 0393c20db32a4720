"""What happens to a record on the host: bytes -> RGB -> one square uint8 image at the canonical size.

NumPy and Pillow only, so it runs in threads (Pillow lets go of the interpreter lock) and in worker processes.
"""

import io
import logging
import math
import threading
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from eupe_jax.data.order import hash_words
from eupe_jax.data.sources import Record, Source

log = logging.getLogger(__name__)

_ORIENTATION = 0x0112  # EXIF tag
_ATTEMPTS = 16


class BrokenRecord(ValueError):
    """A record that cannot be turned into an image. `name`: the record's."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self):
        return f"{self.name}: {self.reason}"


class TooManyBroken(RuntimeError):
    """More records than allowed were broken; the message lists them."""


@dataclass(frozen=True)
class HostConfig:
    """How a record becomes an image of `size` x `size`.

    mode: "crop": a random-resized crop, bicubic, of `scale` of the area and an aspect ratio in `ratio` (log-uniform).
      "resize": the whole picture squashed, bicubic. "none": it must already have that size.
    The default scale and ratio are DINOv3's for global crops. max_pixels bounds what is decoded (decompression bombs).
    max_broken_fraction: of the records read (of 200 at least), how many may be broken before the run stops.
    """

    size: int = 256
    mode: Literal["crop", "resize", "none"] = "crop"
    scale: tuple[float, float] = (0.32, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    max_pixels: int = 80_000_000
    max_broken_fraction: float = 0.1

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"data.size must be positive, got {self.size}")
        if self.mode not in ("crop", "resize", "none"):
            raise ValueError(f"data.mode must be 'crop', 'resize' or 'none', got {self.mode!r}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"data.scale must be 0 < low <= high <= 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"data.ratio must be 0 < low <= high, got {self.ratio}")
        if not 0 <= self.max_broken_fraction <= 1:
            raise ValueError(f"data.max_broken_fraction must be in [0, 1], got {self.max_broken_fraction}")


def random_generator(seed: int, step: int, position: int) -> np.random.Generator:
    """Philox stream of one place in the run: the same whatever host, process or thread asks."""
    key = [int(hash_words(seed, 0x63726F70)), int(hash_words(seed, 0x70697865))]
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, position, step]))


def decode(record: Record, *, max_pixels: int = 80_000_000) -> np.ndarray:
    """Whole record as upright RGB, uint8 [H, W, 3]. Raises BrokenRecord, which names the record."""
    with _naming(record):
        return np.asarray(_to_rgb(_load(_open(record, max_pixels))))


def make_image(record: Record, config: HostConfig, generator: np.random.Generator) -> np.ndarray:
    """One image, uint8 [size, size, 3], from a record. Raises BrokenRecord, which names the record."""
    s = config.size
    with _naming(record):
        image = _open(record, config.max_pixels)
        width, height = _upright_size(image)
        if config.mode == "none":
            if (width, height) != (s, s):
                raise ValueError(f"it is {width}x{height} and mode 'none' takes {s}x{s} as it is")
            return np.asarray(_to_rgb(_load(image)))
        box = (0.0, 0.0, float(width), float(height))
        if config.mode == "crop":
            box = random_crop_box(width, height, config.scale, config.ratio, generator)
        # A JPEG decodes at 1/2, 1/4 or 1/8 of its size for a fraction of the time: allowed if the crop stays >= s.
        image = _load(image, shrink=min(box[2] - box[0], box[3] - box[1]) / s)
        fx, fy = image.width / width, image.height / height
        box = (box[0] * fx, box[1] * fy, min(box[2] * fx, image.width), min(box[3] * fy, image.height))
        return np.asarray(_to_rgb(image).resize((s, s), Image.Resampling.BICUBIC, box=box))


def random_crop_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], generator: np.random.Generator
) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) in whole pixels: ten draws of area and aspect ratio, then the largest central crop
    of an allowed ratio (torchvision's RandomResizedCrop)."""
    for _ in range(10):
        area = width * height * generator.uniform(*scale)
        aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1))
            return (float(left), float(top), float(left + w), float(top + h))
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
    left, top = (width - w) // 2, (height - h) // 2
    return (float(left), float(top), float(left + w), float(top + h))


class _naming:
    """Turns whatever Pillow raises on a bad file into BrokenRecord with the record's name."""

    def __init__(self, record: Record):
        self._name = record.name

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, IndexError ... on broken files.
        if isinstance(error, UnidentifiedImageError):
            raise BrokenRecord(self._name, "not an image that Pillow can identify") from error
        if isinstance(error, Exception) and not isinstance(error, MemoryError):
            raise BrokenRecord(self._name, f"{type(error).__name__}: {error}") from error


def _open(record: Record, max_pixels: int) -> Image.Image:
    if isinstance(record.data, np.ndarray):
        image = Image.fromarray(record.data)
    elif not record.data:
        raise ValueError("the file is empty")
    else:
        image = Image.open(io.BytesIO(record.data))
    if image.width * image.height > max_pixels:
        raise ValueError(f"{image.width}x{image.height} pixels are more than max_pixels={max_pixels}")
    return image


def _orientation(image: Image.Image) -> int:
    return image.getexif().get(_ORIENTATION, 1)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    w, h = image.size
    return (h, w) if _orientation(image) in (5, 6, 7, 8) else (w, h)


def _load(image: Image.Image, shrink: float = 1.0) -> Image.Image:
    """Pixels in memory, turned upright; a JPEG is decoded up to `shrink` times smaller."""
    if shrink >= 2 and image.format == "JPEG":
        image.draft(None, (math.ceil(image.width / shrink), math.ceil(image.height / shrink)))
    image.load()
    return ImageOps.exif_transpose(image) if _orientation(image) != 1 else image


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB: 16-bit grey scaled (not clipped), transparency laid on white."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # I;16 and friends, or a 16-bit file widened to 32 bits
        grey = np.asarray(image).astype(np.int64)
        if grey.size and (grey.min() < 0 or grey.max() > 65535):
            raise ValueError("an integer image outside 0..65535")
        return Image.fromarray(np.round(grey / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("a floating-point image has no agreed range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _read(source: Source, index: int) -> Record:
    try:
        return source[index]
    except OSError as e:
        raise BrokenRecord(e.filename or f"record {index}", f"cannot be read: {e.strerror or e}") from e


class RecordReader:
    """Reads, decodes and crops the record of one place, and stands in another one for a broken record.

    The stand-in is a function of (seed, step, position) alone, so every host and every resumed run agrees on it.
    Broken records are logged once by name, and counted; past the allowed fraction TooManyBroken lists them.
    Thread-safe; a worker process counts for itself.
    """

    def __init__(self, config: HostConfig, seed: int):
        self._config, self._seed = config, seed
        self._reads = self._broken_reads = 0
        self._lock = threading.Lock()
        self.broken: dict[str, str] = {}  # name -> reason

    def __call__(self, source: Source, index: int, step: int, position: int) -> tuple[np.ndarray, int]:
        """(uint8 [size, size, 3], index of the record it really came from)."""
        generator = random_generator(self._seed, step, position)
        for attempt in range(_ATTEMPTS):
            try:
                image = make_image(_read(source, index), self._config, generator)
            except BrokenRecord as e:
                self._count(e)
                index = int(hash_words(self._seed, 0x72657472, step, position, attempt) % np.uint64(len(source)))
                continue
            self._count()
            return image, index
        raise TooManyBroken(f"{_ATTEMPTS} records drawn in a row were broken:\n{self._list()}")

    def _count(self, error: BrokenRecord | None = None):
        with self._lock:
            self._reads += 1
            if error is None:
                return
            self._broken_reads += 1
            if error.name not in self.broken:
                log.warning("broken record replaced: %s", error)
                self.broken[error.name] = error.reason
            allowed = self._config.max_broken_fraction
            if self._broken_reads > allowed * max(self._reads, 200):
                raise TooManyBroken(
                    f"{self._broken_reads} of {self._reads} records read were broken, more than "
                    f"data.max_broken_fraction={allowed} allows:\n{self._list()}"
                ) from error

    def _list(self, at_most: int = 50) -> str:
        lines = [f"  {name}: {reason}" for name, reason in self.broken.items()]
        return "\n".join(lines[:at_most] + ([f"  and {len(lines) - at_most} more"] if len(lines) > at_most else []))

    def __getstate__(self):
        return self._config, self._seed

    def __setstate__(self, state):
        self.__init__(*state)
