"""The gates every conversion passes before a file is written: real images through both sides, compared."""

import functools
from collections.abc import Mapping
from importlib import util
from pathlib import Path

import jax
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import nn

from eupe_jax.data.decode import FORMATS
from eupe_jax.training.encoders import LoadedEncoder

FLAX_VS_TORCH = 1e-4
TORCH_VS_PTE = 1e-3
INT8_COSINE = {"cls": 0.999, "patches": 0.995}  # least mean cosine of int8 features with float ones
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")  # shipped inside scikit-image
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

Features = Mapping[str, np.ndarray]
Report = dict[str, dict[str, float]]


class GateError(ValueError):
    """A conversion changed what the encoder computes; nothing was written."""


def load_images(folder: str | Path | None, height: int, width: int, limit: int = 4) -> np.ndarray:
    """Photographs squashed to [N, height, width, 3] uint8: the first of `folder`, else those scikit-image ships.

    Raises:
      FileNotFoundError: no such folder, no images in it, or no folder given and scikit-image not installed.
      ValueError: a file is no image.
    """
    if folder is None:
        package = util.find_spec("skimage")
        if package is None:
            raise FileNotFoundError("no images to check with: name a folder with --images, or install scikit-image")
        paths = [Path(package.origin).parent / "data" / name for name in PHOTOGRAPHS]
    elif not Path(folder).is_dir():
        raise FileNotFoundError(f"--images {folder}: no such folder")
    else:
        paths = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in SUFFIXES)
        if not paths:
            raise FileNotFoundError(f"--images {folder}: no {', '.join(SUFFIXES)} file in it")
    images = []
    for path in paths[:limit]:
        try:
            with Image.open(path, formats=FORMATS) as image:
                images.append(np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)))
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as e:
            raise ValueError(f"{path} cannot be read as an image: {e}") from None
    return np.stack(images)


def normalise(encoder: LoadedEncoder, images_NxHxWx3: np.ndarray) -> np.ndarray:
    """uint8 images -> float32 with the encoder's pixel mean and std."""
    mean, std = np.float32(encoder.mean), np.float32(encoder.std)
    return (images_NxHxWx3.astype(np.float32) / 255 - mean) / std


@functools.partial(jax.jit, static_argnums=0)
def _apply(module, variables, pixels_NxHxWx3):
    return module.apply(variables, pixels_NxHxWx3)


def flax_features(encoder: LoadedEncoder, pixels_NxHxWx3: np.ndarray) -> dict[str, np.ndarray]:
    """Features of normalised images from the Flax encoder, matrix products in full float32."""
    with jax.default_matmul_precision("highest"):
        return jax.tree.map(np.asarray, _apply(encoder.module, encoder.variables, pixels_NxHxWx3))


def torch_features(module: nn.Module, pixels_NxHxWx3: np.ndarray) -> dict[str, np.ndarray]:
    """Features of the same normalised images from the PyTorch module, in batches of four."""
    pixels = torch.from_numpy(np.ascontiguousarray(pixels_NxHxWx3.transpose(0, 3, 1, 2)))
    with torch.inference_mode():
        batches = [module(batch) for batch in pixels.split(4)]
    return {name: torch.cat([batch[name] for batch in batches]).numpy() for name in batches[0]}


def compare(reference: Features, candidate: Features) -> Report:
    """Per kind of token: `max_abs`, the largest difference with the reference scaled to unit standard deviation; of the
    cosines between corresponding tokens the smallest, `cosine`, and the mean, `mean_cosine`. Kinds with no tokens are
    left out. Raises GateError where a kind is missing or of another shape."""
    report = {}
    for name, expected in reference.items():
        if not expected.size:
            continue
        if name not in candidate or candidate[name].shape != expected.shape:
            got = list(candidate[name].shape) if name in candidate else "nothing"
            raise GateError(f"{name} should be {list(expected.shape)}, got {got}")
        a, b = expected.astype(np.float64), candidate[name].astype(np.float64)
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            cosine = (a * b).sum(-1) / norms
            report[name] = {"max_abs": float(np.abs(a - b).max() / a.std()), "cosine": float(cosine.min())}
            report[name]["mean_cosine"] = float(cosine.mean())
    return report


def require(report: Report, tolerance: float, what: str) -> None:
    """Raises GateError unless every `max_abs` is at most `tolerance`; a NaN never is."""
    bad = [f"{name} {r['max_abs']:.3g}" for name, r in report.items() if not r["max_abs"] <= tolerance]
    if bad or not report:
        raise GateError(f"{what} disagree: max abs difference {', '.join(bad)}, allowed {tolerance:g}; nothing written")


def require_cosine(report: Report, what: str) -> None:
    """Raises GateError unless the mean cosines of class and patch tokens reach INT8_COSINE, which a NaN never does, or
    where there is neither."""
    if not set(INT8_COSINE) & set(report):
        raise GateError(f"{what} cannot be compared without {' or '.join(INT8_COSINE)}; nothing written")
    bad = [
        f"{name} {report[name]['mean_cosine']:.4f} (at least {least:g} is asked for)"
        for name, least in INT8_COSINE.items()
        if name in report and not report[name]["mean_cosine"] >= least
    ]
    if bad:
        raise GateError(f"{what} disagree: mean cosine of {', '.join(bad)}; nothing written")
