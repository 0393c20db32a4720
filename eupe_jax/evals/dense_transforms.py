"""Augmentations of an image and its map, on the host: Pillow and NumPy, random by the generator given.

Images come out as float32 [H, W, 3] in [0, 1]; padding has the colour that pixel normalisation maps to zero.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from eupe_jax.evals.seg_metrics import IGNORE

_BILINEAR, _NEAREST = Image.Resampling.BILINEAR, Image.Resampling.NEAREST
IMAGENET_MEAN = (0.485, 0.456, 0.406)


def to_float(image: Image.Image | np.ndarray) -> np.ndarray:
    """uint8 or float in [0, 255] -> float32 in [0, 1]."""
    return np.asarray(image, np.float32) / np.float32(255)


def short_side_size(width: int, height: int, short: int) -> tuple[int, int]:
    """(width, height) whose short side is `short`; the long one rounds half up."""
    long = int(short * max(width, height) / min(width, height) + 0.5)
    return (short, long) if width <= height else (long, short)


def centre_pad(
    images_BxHxWx3: np.ndarray, multiple: int, colour: tuple[float, ...]
) -> tuple[np.ndarray, tuple[int, int]]:
    """Float images padded around the centre to sides that are multiples; (images, (top, left) of the padding).

    An odd pixel goes to the bottom or the right.
    """
    _, height, width, _ = images_BxHxWx3.shape
    extra_h, extra_w = -height % multiple, -width % multiple
    top, left = extra_h // 2, extra_w // 2
    if not extra_h and not extra_w:
        return images_BxHxWx3, (0, 0)
    out = np.empty((len(images_BxHxWx3), height + extra_h, width + extra_w, 3), np.float32)
    out[:] = np.asarray(colour, np.float32)
    out[:, top : top + height, left : left + width] = images_BxHxWx3
    return out, (top, left)


@dataclass(frozen=True)
class SegmentationAugment:
    """The authors' training view for ADE20k, in their order.

    short_side, scale_range: the short side becomes int(short_side * U(scale_range)).
    crop: side of the square crop; smaller pictures are padded at the right and the bottom.
    cat_max_ratio, crop_tries: a crop is drawn again, up to so often, while one class holds that share of its known
      pixels or more (or all of them).
    flip: probability of mirroring.
    distort: photometric distortion on or off. brightness (of 255), contrast, saturation: ranges; hue: turns.
    """

    short_side: int = 512
    scale_range: tuple[float, float] = (0.5, 2.0)
    crop: int = 512
    cat_max_ratio: float = 0.75
    crop_tries: int = 10
    flip: float = 0.5
    distort: bool = True
    brightness: float = 32.0
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: float = 0.5
    pad_colour: tuple[float, ...] = IMAGENET_MEAN

    def __call__(
        self, image: Image.Image, label: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """(float32 [crop, crop, 3], uint8 [crop, crop]) from an RGB picture and its classes (IGNORE: unknown)."""
        short = max(int(self.short_side * rng.uniform(*self.scale_range)), 1)
        size = short_side_size(*image.size, short)
        label = np.asarray(Image.fromarray(label).resize(size, _NEAREST))
        box = self._choose(label, rng)
        pixels = np.asarray(image.resize(size, _BILINEAR))[box]
        label = label[box]
        if rng.random() < self.flip:
            pixels, label = pixels[:, ::-1], label[:, ::-1]
        if self.distort:
            pixels = self._distorted(pixels, rng)
        out = np.empty((self.crop, self.crop, 3), np.float32)
        out[:] = np.asarray(self.pad_colour, np.float32)
        out_label = np.full((self.crop, self.crop), IGNORE, np.uint8)
        height, width = label.shape
        out[:height, :width], out_label[:height, :width] = to_float(pixels), label
        return out, out_label

    def _choose(self, label: np.ndarray, rng: np.random.Generator) -> tuple[slice, slice]:
        for tries in range(self.crop_tries + 1):
            top = int(rng.integers(max(label.shape[0] - self.crop, 0) + 1))
            left = int(rng.integers(max(label.shape[1] - self.crop, 0) + 1))
            box = slice(top, top + self.crop), slice(left, left + self.crop)
            if self.cat_max_ratio >= 1.0 or tries == self.crop_tries:
                break
            counts = np.bincount(label[box].reshape(-1), minlength=IGNORE + 1)[:IGNORE]
            if np.count_nonzero(counts) > 1 and counts.max() < self.cat_max_ratio * counts.sum():
                break
        return box

    def _distorted(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """brightness, (contrast), saturation, hue, (contrast): a fair coin says which contrast, each has p = 1/2."""
        x = pixels.astype(np.float32)
        contrast_first = rng.random() < 0.5
        if rng.random() < 0.5:
            x = np.clip(x + np.float32(rng.uniform(-self.brightness, self.brightness)), 0, 255)
        if contrast_first:
            x = self._contrasted(x, rng)
        if rng.random() < 0.5:
            grey = (x @ np.float32([0.2989, 0.587, 0.114]))[..., None]
            x = np.clip(grey + np.float32(rng.uniform(*self.saturation)) * (x - grey), 0, 255)
        if rng.random() < 0.5:
            hsv = np.array(Image.fromarray(np.rint(x).astype(np.uint8)).convert("HSV"))
            turned = hsv[..., 0].astype(np.int64) + int(rng.uniform(-self.hue, self.hue) * 255)
            hsv[..., 0] = (turned % 256).astype(np.uint8)
            x = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"), np.float32)
        if not contrast_first:
            x = self._contrasted(x, rng)
        return x

    def _contrasted(self, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return np.clip(x * np.float32(rng.uniform(*self.contrast)), 0, 255) if rng.random() < 0.5 else x


@dataclass(frozen=True)
class DepthAugment:
    """The authors' training view for NYUv2, in their order.

    box: (x1, y1, x2, y2) cut out first (it takes NYUv2's white frame away); () for none.
    rotation, rotation_p: degrees to either side (image bilinear, depth nearest) and how often.
    flip: probability of mirroring. crop: (height, width) of the random crop.
    colour_p, gamma, brightness, channel: probability and ranges of the colour change.
    gamma_on_255: the power is taken of values in 0..255, as the authors do; False: of values in 0..1.
    """

    box: tuple[int, ...] = (43, 45, 608, 472)
    rotation: float = 2.5
    rotation_p: float = 0.5
    flip: float = 0.5
    crop: tuple[int, int] = (416, 544)
    colour_p: float = 0.5
    gamma: tuple[float, float] = (0.9, 1.1)
    brightness: tuple[float, float] = (0.75, 1.25)
    channel: tuple[float, float] = (0.9, 1.1)
    gamma_on_255: bool = True

    def __post_init__(self):
        if self.box and (self.box[3] - self.box[1] < self.crop[0] or self.box[2] - self.box[0] < self.crop[1]):
            raise ValueError(f"the training crop {self.crop} does not fit into the box {self.box} cut out first")

    def smallest(self) -> tuple[int, int]:
        """(height, width) that a picture must have at least."""
        return (self.box[3], self.box[2]) if self.box else self.crop

    def __call__(
        self, image: Image.Image, depth: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """(float32 [h, w, 3] in [0, 1], float32 [h, w] metres) from an RGB picture and its depth (0: unknown)."""
        depth_image = Image.fromarray(depth.astype(np.float32))
        if self.box:
            image, depth_image = image.crop(self.box), depth_image.crop(self.box)
        if rng.random() < self.rotation_p:
            angle = rng.uniform(-self.rotation, self.rotation)
            image, depth_image = image.rotate(angle, _BILINEAR), depth_image.rotate(angle, _NEAREST)
        pixels, depth = np.asarray(image), np.asarray(depth_image)
        if rng.random() < self.flip:
            pixels, depth = pixels[:, ::-1], depth[:, ::-1]
        height, width = self.crop
        top = int(rng.integers(depth.shape[0] - height + 1))
        left = int(rng.integers(depth.shape[1] - width + 1))
        box = slice(top, top + height), slice(left, left + width)
        pixels, depth = pixels[box].astype(np.float32), np.ascontiguousarray(depth[box])
        if rng.random() < self.colour_p:
            pixels = self._recoloured(pixels, rng)
        return to_float(pixels), depth

    def _recoloured(self, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        unit = np.float32(1 if self.gamma_on_255 else 255)
        x = (x / unit) ** np.float32(rng.uniform(*self.gamma)) * unit
        x = x * np.float32(rng.uniform(*self.brightness)) * rng.uniform(*self.channel, size=3).astype(np.float32)
        return np.clip(x, 0, 255)
