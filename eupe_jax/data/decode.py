"""Encoded records to upright RGB pixels: Pillow reads every header, simplejpeg decodes the JPEGs, Pillow the rest.

Both use libjpeg-turbo and give the same pixels, so which of them decoded a file cannot be seen in the result;
simplejpeg skips Pillow's four-byte pixels and the copies out of them. Files are untrusted: few formats, a bound on
pixels before anything is decoded, and one kind of error.
"""

import io
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError
from PIL import TiffImagePlugin as _  # noqa: F401  Image.open knows these two only once they have been imported
from PIL import WebPImagePlugin as _  # noqa: F401, F811

from eupe_jax.data.sources import Record

# What Pillow may take a file for. Some of its other formats start programs (EPS) or have no bound on their work.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

# Kinds of broken records, by which they are counted.
REASONS = ("unreadable", "empty", "unidentified", "truncated", "damaged", "too large", "unsupported")

_ORIENTATION = 0x0112  # EXIF tag
# Passes over the picture that a progressive JPEG may ask for, in units of max_pixels: a small file can hold thousands.
_MAX_PASSES = 16

# Oddities of single files are no news in a run over a billion of them: what cannot be used is counted and named.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BrokenRecord(ValueError):
    """A record that cannot be turned into an image. name: the record's; reason: a sentence; kind: one of REASONS."""

    def __init__(self, name: str, reason: str, kind: str = "damaged"):
        super().__init__(name, reason, kind)
        self.name, self.reason, self.kind = name, reason, kind

    def __str__(self):
        return f"{self.name}: {self.reason}"


class naming:
    """Context that turns whatever a bad file raises into BrokenRecord with the record's name."""

    def __init__(self, record: Record):
        self._name = record.name

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, IndexError ... on broken files.
        if isinstance(error, Exception) and not isinstance(error, (MemoryError, BrokenRecord)):
            raise BrokenRecord(self._name, *_explain(error)) from error


class _Refused(ValueError):
    """(reason, kind) of a file that is whole but not wanted."""


def _explain(error: Exception) -> tuple[str, str]:
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, _Refused):
        return error.args
    if isinstance(error, UnidentifiedImageError):
        return f"not an image that Pillow can identify as one of {', '.join(FORMATS)}", "unidentified"
    if isinstance(error, Image.DecompressionBombError) or "MAX_TEXT" in text or "too large" in text:
        return text, "too large"
    if "truncated" in text.lower() or isinstance(error, (EOFError, struct.error)):
        return text, "truncated"
    return text, "damaged"


@dataclass(frozen=True)
class Picture:
    """An image whose pixels may still have to be decoded; call inside `naming`.

    width, height: of the upright image at full size. decode(scale): its pixels, uint8 [H, W, 3], upright; with scale 2,
    4 or 8 a JPEG may come that many times smaller (sides rounded up), which is much faster. can_shrink: whether it may.
    """

    width: int
    height: int
    decode: Callable[[int], np.ndarray]
    can_shrink: bool = False


def decode(record: Record, *, max_pixels: int = 80_000_000) -> np.ndarray:
    """Whole record as upright RGB, uint8 [H, W, 3]. Raises BrokenRecord, which names the record."""
    with naming(record):
        return open_picture(record.data, max_pixels).decode(1)


def open_picture(data: bytes | np.ndarray, max_pixels: int) -> Picture:
    """Reads the header, and the pixels if the file is no JPEG. Raises ValueError, OSError and what Pillow raises."""
    if isinstance(data, np.ndarray):
        rgb = _from_array(data)
        _check_size(rgb.shape[1], rgb.shape[0], max_pixels)
    elif not data:
        raise _Refused("the file is empty", "empty")
    else:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(*image.size, max_pixels)
        if image.format in ("JPEG", "MPO"):
            return _jpeg(image, data, max_pixels)
        image.load()  # before its orientation is asked for: a TIFF is turned here, a PNG may tell it after the pixels
        orientation = _orientation(image)
        rgb = turn_upright(_to_rgb(image), orientation)
    return Picture(rgb.shape[1], rgb.shape[0], lambda scale: rgb)


def _check_size(width: int, height: int, max_pixels: int):
    if width * height > max_pixels:
        raise _Refused(f"{width}x{height} pixels are more than max_pixels={max_pixels}", "too large")


def _from_array(x: np.ndarray) -> np.ndarray:
    if x.dtype != np.uint8 or not (x.ndim == 2 or x.ndim == 3 and x.shape[2] == 3) or x.size == 0:
        raise _Refused(f"an array must be uint8 [H, W, 3] or [H, W], not {x.dtype} {list(x.shape)}", "unsupported")
    return np.repeat(x[..., None], 3, axis=2) if x.ndim == 2 else x


def _jpeg(image: Image.Image, data: bytes, max_pixels: int) -> Picture:
    if "progressive" in image.info:
        scans = data.count(b"\xff\xda")
        if scans * image.width * image.height > _MAX_PASSES * max_pixels:
            raise _Refused(f"{scans} passes over {image.width}x{image.height} pixels are too many", "too large")
    orientation = _orientation(image)
    width, height = image.size[::-1] if orientation in (5, 6, 7, 8) else image.size
    return Picture(width, height, lambda scale: turn_upright(_jpeg_pixels(image, data, scale), orientation), True)


def _jpeg_pixels(image: Image.Image, data: bytes, scale: int) -> np.ndarray:
    w, h = -(-image.width // scale), -(-image.height // scale)
    if image.mode in ("RGB", "L"):
        try:
            pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=h, min_width=w)
            if pixels.shape == (h, w, 3):
                return pixels
        except (ValueError, OverflowError):
            pass  # anything out of the ordinary: what Pillow says of it counts
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))
    pixels = _to_rgb(image)
    if pixels.shape != (h, w, 3):
        raise ValueError(f"decoding gave {pixels.shape[1]}x{pixels.shape[0]} pixels, not {w}x{h} as the header says")
    return pixels


def _orientation(image: Image.Image) -> int:
    return image.getexif().get(_ORIENTATION, 1)


def turn_upright(x: np.ndarray, orientation: int) -> np.ndarray:
    """View of stored pixels [H, W, C] the way EXIF `orientation` says they are looked at; unknown ones mean 1."""
    if orientation in (5, 6, 7, 8):
        x = x.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        x = x[::-1]
    if orientation in (2, 3, 6, 7):
        x = x[:, ::-1]
    return x


def _to_rgb(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3] of the first frame: 16-bit grey scaled (not clipped), transparency laid on white."""
    image.load()
    if image.mode.startswith("I"):  # I;16 and friends, or a 16-bit file widened to 32 bits
        grey = np.asarray(image).astype(np.int64)
        if grey.size and (grey.min() < 0 or grey.max() > 65535):
            raise _Refused("an integer image outside 0..65535", "unsupported")
        return np.repeat(np.round(grey / 257).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("F", "LAB"):
        raise _Refused(f"pixels of mode {image.mode} have no agreed range", "unsupported")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
