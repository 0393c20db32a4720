"""Which source every place of every global batch draws from: a pure function of (seed, step, position).

Two ways of mixing. "batch": a step draws its whole global batch from one source (EUPE §3.4 mixes ImageNet-1k with
probability 0.1 into the large corpus that way). "record": every batch holds every source, in proportion to its weight;
a fractional share is rounded up or down at random, so that each place has the exact probability on average.
"""

import threading
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

import numpy as np

from eupe_jax.data.order import hash_words, permute, uniform

Mixing = Literal["batch", "record"]
MIXINGS = ("batch", "record")

_BLOCK = 1 << 14  # steps whose counts are computed at once


class Mixture:
    """weights: probability weight of each source by name, in order; they need not sum to 1.

    batch_size: places of a global batch. No step is far: counts of earlier steps are summed in whole blocks of steps,
    a million of them in some 50 ms, and only once.
    Raises ValueError for an empty mixture, for a weight that is negative or not finite, for all of them zero, and for
    an unknown `mixing`.
    """

    def __init__(self, weights: Mapping[str, float], seed: int, batch_size: int, mixing: Mixing = "batch"):
        values = np.asarray(list(weights.values()), np.float64)
        if not len(values) or not np.all(np.isfinite(values)) or values.min() < 0 or values.sum() == 0:
            raise ValueError(f"mixture weights must be finite, not negative and not all zero, got {dict(weights)}")
        if mixing not in MIXINGS:
            raise ValueError(f"data.mixing must be one of {MIXINGS}, got {mixing!r}")
        self.names = tuple(weights)
        self._edges = np.cumsum(values) / np.cumsum(values)[-1]  # so that the last is 1 exactly
        self._arguments = (dict(weights), seed, batch_size, mixing)
        self._seed, self._batch_size, self._mixing = seed, batch_size, mixing
        self._before_block = [np.zeros(len(values), np.int64)]
        self._lock = threading.Lock()
        self._before_steps = lru_cache(maxsize=2)(self._before_steps_of_block)
        self._places_lock = threading.Lock()
        self._places = lru_cache(maxsize=32)(self._places_of_step)

    def of_step(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(source of every place, how many draws from that source came before it), int64 [batch_size] each.

        Draws of a source are numbered in the order of steps, and of positions within one. Kept for the steps that
        threads are at, which share them: leave the arrays as they are.
        """
        with self._places_lock:  # one thread computes them, the others wait
            return self._places(step)

    def _places_of_step(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        b = self._batch_size
        before, after = self.draws_before(step), self.draws_before(step + 1)
        counts = after - before
        if np.count_nonzero(counts) == 1:
            source = int(np.argmax(counts))
            return np.full(b, source), before[source] + np.arange(b)
        places = permute(np.arange(b), b, hash_words(self._seed, 0x706C616365, step))
        sources = np.searchsorted(np.cumsum(counts), places, side="right")
        draws = np.empty(b, np.int64)
        for source in np.flatnonzero(counts):
            draws[sources == source] = before[source] + np.arange(counts[source])
        return sources, draws

    def draws_before(self, step: int) -> np.ndarray:
        """How many records the steps before `step` draw from each source (int64 [sources])."""
        block, offset = divmod(step, _BLOCK)
        return self._before_whole_block(block) + self._before_steps(block)[offset]

    def _before_whole_block(self, block: int) -> np.ndarray:
        with self._lock:
            while len(self._before_block) <= block:
                last = len(self._before_block) - 1
                self._before_block.append(self._before_block[last] + self._before_steps(last)[-1])
            return self._before_block[block]

    def _before_steps_of_block(self, block: int) -> np.ndarray:
        """Draws within a block before each of its steps and at its end: int64 [_BLOCK + 1, sources]."""
        counts = self._counts(np.arange(block * _BLOCK, (block + 1) * _BLOCK))
        return np.concatenate([np.zeros_like(counts[:1]), np.cumsum(counts, axis=0)])

    def _counts(self, steps: np.ndarray) -> np.ndarray:
        """Records of each step from each source: int64 [steps, sources]."""
        u = uniform(self._seed, 0x6D6978, steps)
        if self._mixing == "batch":
            chosen = np.searchsorted(self._edges[:-1], u, side="right")
            return (chosen[:, None] == np.arange(len(self.names))) * np.int64(self._batch_size)
        # Systematic sampling: of the points (i + u) / batch_size, those between two edges.
        upto = np.ceil(self._edges * self._batch_size - u[:, None]).astype(np.int64)
        return np.diff(upto, axis=1, prepend=0)

    def __reduce__(self):
        return Mixture, self._arguments
