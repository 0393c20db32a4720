"""What the rest of the trainer needs to know about a teacher, in graph or on the host."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TeacherSpec:
    """Facts of one frozen teacher.

    name: the teacher's name in configs, batches and statistics files.
    cls_dim: width of its class token; None when it has none.
    patch_dim: width of its patch tokens.
    stride: pixels per patch token at `resolution`; the grid is resolution // stride.
    resolution: side of the square input in pixels.
    mean, std: pixel statistics for RGB scaled to 0..1, so that its input is (rgb / 255 - mean) / std.
    fingerprint: hex digest of the weights, the token choice and the pixel normalisation (not of the resolution).
    """

    name: str
    cls_dim: int | None
    patch_dim: int
    stride: int
    resolution: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fingerprint: str

    @property
    def grid(self) -> int:
        """Patch tokens along one side."""
        return self.resolution // self.stride


def fingerprint(weights: str, tokens: Mapping[str, Any], mean, std) -> str:
    """Hex digest of `weights` (itself a digest of the weights), the token choice and the pixel normalisation."""
    facts = {
        "weights": weights,
        "tokens": dict(tokens),
        "mean": [float(m) for m in mean],
        "std": [float(s) for s in std],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
