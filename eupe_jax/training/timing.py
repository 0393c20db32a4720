"""Where the time of a run goes: measured on the host, without waiting for devices any more than the loop does.

A step's metrics are read one step late, so `wait_s` is how long the host waited for devices that were still busy: close
to `step_s` when the devices are what holds the run up, close to zero when data are (`data_s`). With several processes
`log_s` has a wait for the step under way: counts of broken records are gathered across devices.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import jax

from eupe_jax.distill.resolutions import Resolutions
from eupe_jax.sharding.chips import chip_of

# Parts of every step: seconds a step. What happens now and then: seconds in all since the last line.
PARTS = ("data", "dispatch", "wait", "log")
PAUSES = ("save", "eval", "profile")


class Timing:
    """Seconds by part since the last `pop`, and the speed that follows from them.

    Args:
      batch_size: images a step over all devices.
      flops: model FLOPs of one image at each choice of resolutions (None where nobody can count them).
      devices: of all processes.
    """

    def __init__(
        self,
        batch_size: int,
        flops: Mapping[Resolutions, int] | None,
        devices: list[jax.Device],
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._batch_size, self._flops, self._count, self._clock = batch_size, flops, len(devices), clock
        self._chip = chip_of(devices[0])
        self._start_afresh()

    def _start_afresh(self) -> None:
        self._seconds: Counter[str] = Counter()
        self._steps, self._work, self._since = 0, 0, self._clock()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the time of the block as `name`, one of PARTS or PAUSES."""
        began = self._clock()
        try:
            yield
        finally:
            self._seconds[name] += self._clock() - began

    def step(self, chosen: Resolutions) -> None:
        """One more step has been dispatched."""
        self._steps += 1
        self._work += self._batch_size * self._flops[chosen] if self._flops else 0

    def pop(self) -> dict[str, float]:
        """Times and speed since the last call, then starts afresh; {} before the first step.

        "time/step_s" is without PAUSES. "performance/mfu" is model FLOPs (recomputation is no work) over the bfloat16
        peak of all devices; where the chip's peak is unknown, "performance/tflops_per_device" stands instead.
        """
        if not self._steps:
            return {}
        pauses = {name: self._seconds[name] for name in PAUSES if name in self._seconds}
        training = max(self._clock() - self._since - sum(pauses.values()), 1e-9)
        scalars = {"time/step_s": training / self._steps}
        scalars |= {f"time/{name}_s": self._seconds[name] / self._steps for name in PARTS}
        scalars |= {f"time/{name}_s": seconds for name, seconds in pauses.items()}
        scalars["performance/images_per_s"] = self._steps * self._batch_size / training
        if self._work:
            speed = self._work / training / self._count  # FLOP/s of a device
            if self._chip is not None:
                scalars["performance/mfu"] = speed / self._chip.peak_flops
            else:
                scalars["performance/tflops_per_device"] = speed / 1e12
        self._start_afresh()
        return scalars
