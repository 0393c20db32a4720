"""Frozen features of many images, in batches."""

from collections.abc import Callable, Mapping

import jax
import numpy as np


def extract(
    encode: Callable[[np.ndarray], Mapping[str, jax.Array]], images_NxHxWx3: np.ndarray, batch_size: int = 50
) -> dict[str, np.ndarray]:
    """Runs `encode` (a LoadedEncoder, a host teacher, ...) over uint8 images: {"cls": [N, D], "patches": [N, h, w, D]}.

    The last batch is padded to `batch_size`, so that one compiled program serves all.
    """
    parts: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(images_NxHxWx3), batch_size):
        batch = images_NxHxWx3[start : start + batch_size]
        count = len(batch)
        batch = np.concatenate([batch, np.repeat(batch[-1:], batch_size - count, axis=0)])
        for kind, value in encode(batch).items():
            if kind in ("cls", "patches"):
                parts.setdefault(kind, []).append(np.asarray(value[:count], np.float32))
    return {kind: np.concatenate(values) for kind, values in parts.items()}
