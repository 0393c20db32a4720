"""DINOv3's second global crop as torchvision computes it on Pillow images, for benchmarks/data_pipeline.py.

torchvision itself does not install beside this project's PyTorch. What it does to a Pillow image is Pillow and torch
calls, made here in its order and with its random draws: crop then resize (bicubic), ImageOps, ImageEnhance, hue through
an 8-bit HSV image, blur as a depthwise 9x9 convolution of a float tensor (both of its APIs turn a Pillow image into a
tensor and back for that, and neither separates so small a kernel; doing so takes as long), then a float tensor with
normalised channels.
"""

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

BICUBIC = Image.Resampling.BICUBIC
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def chance(p: float) -> bool:
    return torch.rand(1).item() < p


def uniform(low: float, high: float) -> float:
    return torch.empty(1).uniform_(low, high).item()


def open_rgb(data: bytes) -> Image.Image:
    """What torchvision's folder datasets do to a file."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def crop_box(width: int, height: int, scale=(0.32, 1.0), ratio=(3 / 4, 4 / 3)) -> tuple[int, int, int, int]:
    """RandomResizedCrop's box (left, top, right, bottom)."""
    low, high = (math.log(r) for r in ratio)
    for _ in range(10):
        area = width * height * uniform(*scale)
        aspect = math.exp(uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(0, height - h + 1, (1,)))
            left = int(torch.randint(0, width - w + 1, (1,)))
            return left, top, left + w, top + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def resized_crop(image: Image.Image, size: int) -> Image.Image:
    return image.crop(crop_box(*image.size)).resize((size, size), BICUBIC)


def shift_hue(image: Image.Image, turns: float) -> Image.Image:
    h, s, v = image.convert("HSV").split()
    shifted = np.asarray(h) + np.array(int(turns * 255)).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(shifted), s, v)).convert("RGB")


def colour_jitter(image: Image.Image) -> Image.Image:
    """ColorJitter(0.4, 0.4, 0.2, 0.1), operations in random order."""
    factors = [uniform(0.6, 1.4), uniform(0.6, 1.4), uniform(0.8, 1.2), uniform(-0.1, 0.1)]
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for i in torch.randperm(4).tolist():
        image = shift_hue(image, factors[3]) if i == 3 else enhancers[i](image).enhance(factors[i])
    return image


def grayscale(image: Image.Image) -> Image.Image:
    grey = np.asarray(image.convert("L"))
    return Image.fromarray(np.dstack([grey, grey, grey]))


def gaussian_blur(image: Image.Image, taps: int = 9) -> Image.Image:
    sigma = uniform(0.1, 2.0)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    weights = torch.exp(-0.5 * (torch.linspace(-(taps // 2), taps // 2, taps) / sigma) ** 2)
    weights = weights / weights.sum()
    kernel = torch.mm(weights[:, None], weights[None, :]).expand(3, 1, taps, taps)
    padded = torch.nn.functional.pad(x[None].float(), [taps // 2] * 4, mode="reflect")
    blurred = torch.nn.functional.conv2d(padded, kernel, groups=3)[0].round_().to(torch.uint8)
    return Image.fromarray(blurred.permute(1, 2, 0).numpy())


def to_tensor(image: Image.Image) -> torch.Tensor:
    """ToTensor: float32 [3, H, W] in [0, 1]."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return x.to(torch.float32).div(255)


def normalize(x: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.as_tensor(v, dtype=x.dtype).view(-1, 1, 1) for v in (MEAN, STD))
    return x.clone().sub_(mean).div_(std)


@dataclass(frozen=True)
class Transform:
    """File to normalised float32 [3, size, size]; blur_p: how often blur fires."""

    size: int
    blur_p: float
    flip_p: float = 0.5

    def __call__(self, data: bytes) -> torch.Tensor:
        image = resized_crop(open_rgb(data), self.size)
        if chance(self.flip_p):
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if chance(0.8):
            image = colour_jitter(image)
        if chance(0.2):
            image = grayscale(image)
        if chance(self.blur_p):
            image = gaussian_blur(image)
        if chance(0.2):
            image = ImageOps.solarize(image, 128)
        return normalize(to_tensor(image))
