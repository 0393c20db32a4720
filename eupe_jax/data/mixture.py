"""Homogeneous batches: every step draws its whole global batch from one source.

EUPE §3.4 mixes ImageNet-1k with probability 0.1 into the large corpus that way. The choice is a pure function of
(seed, step), the same on every host.
"""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from eupe_jax.data.order import uniform

_BLOCK = 1 << 16


class Mixture:
    """weights: probability weight of each source by name, in order; they need not sum to 1.

    Raises ValueError for an empty mixture, or a weight that is negative or not finite, or all of them zero.
    """

    def __init__(self, weights: Mapping[str, float], seed: int):
        values = np.asarray(list(weights.values()), np.float64)
        if not len(values) or not np.all(np.isfinite(values)) or values.min() < 0 or values.sum() == 0:
            raise ValueError(f"mixture weights must be finite, not negative and not all zero, got {dict(weights)}")
        self.names = tuple(weights)
        self.probabilities = values / values.sum()
        edges = np.cumsum(values)
        self._edges = (edges / edges[-1])[:-1]
        self._seed = seed
        self._choices = lru_cache(maxsize=4)(self._choices_of_block)
        self._before = lru_cache(maxsize=None)(self._count_before_block)

    def choice(self, steps: np.ndarray) -> np.ndarray:
        """Index of the source of each step (int64, steps' shape)."""
        return np.searchsorted(self._edges, uniform(self._seed, 0x6D6978, np.asarray(steps, np.int64)), side="right")

    def draws_before(self, step: int) -> tuple[int, int]:
        """(source of `step`, how many earlier steps drew from the same source)."""
        block, offset = divmod(step, _BLOCK)
        choices = self._choices(block)
        source = int(choices[offset])
        return source, int(self._before(block)[source] + np.count_nonzero(choices[:offset] == source))

    def _choices_of_block(self, block: int) -> np.ndarray:
        return self.choice(np.arange(block * _BLOCK, (block + 1) * _BLOCK))

    def _count_before_block(self, block: int) -> np.ndarray:
        counts = np.zeros(len(self.names), np.int64)
        for earlier in range(block):
            counts += np.bincount(self._choices_of_block(earlier), minlength=len(self.names))
        return counts

    def __reduce__(self):
        return Mixture, (dict(zip(self.names, self.probabilities, strict=True)), self._seed)
