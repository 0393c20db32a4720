"""Learning rates and Adam's beta1 in force at each iteration of the authors' dense heads.

Both are a one-cycle cosine with a warm-up in front, but not the same one: each keeps the quirks of its own code
(EUPE App. C.3 and C.4 name only the peaks). Pure functions of the 0-based iteration, in float64.
"""

import math
from dataclasses import dataclass


def _cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * fraction))


def scaled(iterations: int, scale: float, least: int = 1) -> int:
    """A duration of the authors' under a `schedule_scale`."""
    return max(round(iterations * scale), least)


@dataclass(frozen=True)
class SegmentationSchedule:
    """ADE20k: a warm-up that multiplies a *linear* decay, then the cosine where it would have been without warm-up.

    At the end of the warm-up the rate therefore jumps from peak * (1 - warmup / total) to just under the peak.

    Attributes:
      peak: learning rate. total, warmup: iterations.
      warmup_ratio: what the warm-up starts from, as a fraction of the peak.
      skip_first: the scheduler is not stepped after iteration 0, so that every later one lags by an iteration.
      b1: Adam's beta1, constant.
    """

    peak: float = 1e-3
    total: int = 40_000
    warmup: int = 1_500
    warmup_ratio: float = 1e-6
    skip_first: bool = True
    b1: float = 0.9

    def learning_rate(self, iteration: int) -> float:
        """Rate of the update at `iteration`, counted from 0."""
        step = max(iteration - 1, 0) if self.skip_first else iteration
        if step < self.warmup:
            ramp = 1 - (1 - step / self.warmup) * (1 - self.warmup_ratio)
            return self.peak * ramp * (1 - step / self.total)
        return _cosine(self.peak, 0.0, (step + 1) / self.total)

    def beta1(self, iteration: int) -> float:
        """Momentum at `iteration`: constant."""
        del iteration
        return self.b1


@dataclass(frozen=True)
class DepthSchedule:
    """NYUv2: the warm-up *adds* a ramp times the cosine to a small first rate; beta1 moves against the rate afterwards.

    Attributes:
      peak: learning rate. total, warmup: iterations.
      start_factor: the first rate is peak / start_factor.
      end_factor: the last rate is peak / end_factor.
      warmup_b1: beta1 while warming up: 0, so that Adam has no momentum there.
      b1_low, b1_high: beta1 goes from the one to the other, on a cosine, after the warm-up.
    """

    peak: float = 3e-4
    total: int = 38_400
    warmup: int = 12_800
    start_factor: float = 1_000.0
    end_factor: float = 25_000.0
    warmup_b1: float = 0.0
    b1_low: float = 0.85
    b1_high: float = 0.95

    def learning_rate(self, iteration: int) -> float:
        """Rate of the update at `iteration`, counted from 0."""
        if iteration < self.warmup:
            regular = _cosine(self.peak, 0.0, iteration / self.total)
            return self.peak / self.start_factor + regular * iteration / self.warmup
        return _cosine(self.peak, self.peak / self.end_factor, (iteration + 1) / self.total)

    def beta1(self, iteration: int) -> float:
        """Momentum at `iteration`: constant in the warm-up, then a cosine from `b1_low` to `b1_high`."""
        if iteration < self.warmup:
            return self.warmup_b1
        return _cosine(self.b1_low, self.b1_high, (iteration - self.warmup) / (self.total - self.warmup))
