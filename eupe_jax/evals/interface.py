"""What every evaluation takes and gives: an encoder and data in, named metrics and artefacts out.

An evaluation is one file with a frozen dataclass `Settings` (every field documented, the authors' values the defaults),
`load(folder, settings)` that reads and checks its data, and `run(encoder, data, settings, workdir)` that measures.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import numpy as np

Tokens = Mapping[str, jax.Array | np.ndarray]


class DataError(ValueError):
    """A data set is broken; the message names the file (and line) and what was expected there."""


class Encoder(Protocol):
    """A frozen encoder under evaluation.

    Attributes:
      name: what tables and figures call it.
      fingerprint: hex digest of its weights, token choice and pixel normalisation; equal digest, equal features.
      cls_dim, patch_dim: widths of its tokens; None for an encoder without a class token.
      patch_size: pixels per patch token along one side; sides of images must be multiples of it.
      resolution: native side in pixels.
    """

    name: str
    fingerprint: str
    cls_dim: int | None
    patch_dim: int
    patch_size: int
    resolution: int

    def __call__(self, images_BxHxWx3: np.ndarray, *, key: jax.Array | None = None) -> Tokens:
        """Tokens of RGB images, uint8 or float in [0, 1], at the very size given: nothing is resized or cropped.

        The encoder normalises pixels with its own statistics. With `key` it runs in training mode, which for ViTs
        rescales the RoPE coordinates; encoders without such a mode ignore it.

        Returns:
          {"cls": [B, Dc] (absent without a class token), "patches": [B, H // p, W // p, Dp]}, float32.

        Raises:
          ValueError: a size it cannot take; the message says which it can.
        """
        ...


@dataclass(frozen=True)
class Result:
    """What one evaluation found.

    Attributes:
      metrics: scalars by name, e.g. {"top1": 0.841}; fractions, not percentages.
      tables: CSV tables by name: a list of rows, all with the same keys.
      images: pictures by name, uint8 RGB [H, W, 3].
      details: anything else a JSON file can hold.
    """

    metrics: dict[str, float]
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    images: dict[str, np.ndarray] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
