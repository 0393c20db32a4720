"""Effective rank of the features of unlabelled images (RankMe, arXiv 2210.02885): how many dimensions they really use.

exp(entropy) of the singular values of the class tokens, as shares of their sum: 1 where all images look the same to the
encoder, at most the width. No labels are needed. Its place is eupe_jax/evals/effective_rank.py.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eupe_jax.evals.features import CentreCrop, extract
from eupe_jax.evals.folders import Subset, read_folder
from eupe_jax.evals.interface import Encoder, Result


@dataclass(frozen=True)
class Settings:
    """Attributes:
    images: how many, evenly spread over the folder; ranks are only comparable for the same number.
    token: "cls", or "patch_mean" for encoders without a class token.
    resize, crop: short side after a bicubic resize, and side of the centre crop, in pixels.
    batch_size: images a forward pass; 0: what suits the device.
    """

    images: int = 2000
    token: str = "cls"
    resize: int = 256
    crop: int = 224
    batch_size: int = 0

    def __post_init__(self):
        if self.token not in ("cls", "patch_mean"):
            raise ValueError(f"token must be 'cls' or 'patch_mean', got {self.token!r}")
        if self.images < 2:
            raise ValueError(f"images must be at least 2, got {self.images}")


def load(folder: Path, settings: Settings) -> Subset:
    """The images of a folder; raises DataError where there are none."""
    source = read_folder(Path(folder))
    return Subset(source, np.linspace(0, len(source) - 1, min(settings.images, len(source))).astype(int))


def run(encoder: Encoder, data: Subset, settings: Settings, *, workdir: Path | None = None) -> Result:
    """The effective rank, and its share of what this width and number of images allow.

    Raises:
      ValueError: an encoder without the token, or one that does not take the crop.
    """
    crop = CentreCrop(settings.resize, settings.crop).fitted(encoder.patch_size)
    options = {"kinds": (settings.token,), "prepare": crop, "workdir": workdir}
    features_NxD = extract(encoder, data, settings.batch_size, **options)[settings.token]
    rank, shares = effective_rank(features_NxD)
    table = [{"component": i, "share": float(share)} for i, share in enumerate(shares)]
    largest = min(features_NxD.shape)
    return Result(
        {"effective_rank": rank, "of_possible": rank / largest}, {"spectrum": table}, details={"images": len(data)}
    )


def effective_rank(features_NxD: np.ndarray) -> tuple[float, np.ndarray]:
    """exp(entropy) of the singular values' shares of their sum, and the shares."""
    values = np.linalg.svd(features_NxD.astype(np.float64), compute_uv=False)
    shares = values / max(values.sum(), 1e-12)
    return float(np.exp(-np.sum(shares * np.log(shares + 1e-12)))), shares
