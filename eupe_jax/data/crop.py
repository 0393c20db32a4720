"""Crop boxes, and the one resize of the host: antialiased bicubic, torchvision's and Pillow's filter, in SIMD.

cykooz_resizer computes in fixed point like Pillow, with the same result on every instruction set. It goes over rows
before columns, Pillow the other way: to Pillow asked for one pass and then the other it differs by 0.01 grey levels (2
at most), to Pillow's own order by 0.2 (more at sharp corners, where the first pass clips).
"""

import math
import threading

import numpy as np
from cykooz_resizer import CropBox, FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer

_BICUBIC = ResizeAlg.convolution(FilterType.catmull_rom)  # a = -0.5, widened when it shrinks
_thread = threading.local()  # a Resizer keeps buffers and serves one call at a time

Box = tuple[float, float, float, float]


def random_crop_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], generator: np.random.Generator
) -> Box:
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


def crop_and_resize(pixels_HxWx3: np.ndarray, box: Box, size: int) -> np.ndarray:
    """uint8 [size, size, 3] of the part of a uint8 picture inside `box` (left, top, right, bottom; pixels).

    A fractional box is cut out in whole pixels first; no other pixel outside it has a part in the result.
    """
    left, top = math.floor(box[0]), math.floor(box[1])
    part = pixels_HxWx3[top : math.ceil(box[3]), left : math.ceil(box[2])]
    h, w = part.shape[:2]
    right, bottom = min(box[2] - left, w), min(box[3] - top, h)
    inside = CropBox(box[0] - left, box[1] - top, right - (box[0] - left), bottom - (box[1] - top))
    if not hasattr(_thread, "resizer"):
        _thread.resizer = Resizer()
    out = ImageData(size, size, PixelType.U8x3)
    options = ResizeOptions(_BICUBIC, crop_box=inside)
    _thread.resizer.resize(ImageData(w, h, PixelType.U8x3, part.tobytes()), out, options)
    return np.frombuffer(out.get_buffer(), np.uint8).reshape(size, size, 3)
