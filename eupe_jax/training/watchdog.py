"""Says so when a run stands still, and where: a stuck bucket, a dead host or a full pipe leaves no other trace."""

import contextlib
import logging
import multiprocessing
import os
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from eupe_jax.data.threads import stacks

LOGGER = logging.getLogger(__name__)

FACTOR = 10.0  # times the median step is a stall
LEAST_SECONDS = 10.0  # and no shorter: on a fast step a hiccup is no stall
RECENT = 100  # steps that the median is taken over
ENOUGH = 5  # steps before there is a median: the first ones compile


class Watchdog:
    """Reports a step that takes `factor` times the median of recent ones, with the stack of every thread.

    It reports again whenever the stall has doubled, and when it is over. It ends nothing: a bucket that answers again
    after minutes is no reason to lose a run. A factor of 0 reports nothing.
    """

    def __init__(self, factor: float = FACTOR, least_seconds: float = LEAST_SECONDS) -> None:
        self._factor, self._least = factor, least_seconds
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._changed = threading.Condition()
        self._began: float | None = None  # of the step that runs; None: paused
        self._step, self._reported, self._closed = 0, 0.0, False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def stepped(self, step: int) -> None:
        """To be called after every step."""
        now = time.monotonic()
        with self._changed:
            if self._began is not None:
                self._recent.append(now - self._began)
                if self._reported:
                    LOGGER.warning("step %d is over, after %.0f s", step, now - self._began)
            self._began, self._step, self._reported = now, step, 0.0
            self._changed.notify_all()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no step: an evaluation, the wait for a save."""
        with self._changed:
            self._began = None
        try:
            yield
        finally:
            with self._changed:
                self._began = time.monotonic()
                self._changed.notify_all()

    @property
    def limit(self) -> float | None:
        """Seconds after which a step is reported; None while too few steps are known."""
        if len(self._recent) < ENOUGH or not self._factor:
            return None
        return max(self._factor * statistics.median(self._recent), self._least)

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                if self._began is None or self.limit is None:
                    self._changed.wait()
                    continue
                due = self._began + (2 * self._reported or self.limit)
                if (left := due - time.monotonic()) > 0:
                    self._changed.wait(left)
                    continue
                self._reported = time.monotonic() - self._began
                LOGGER.warning(
                    "step %d has taken %.1f s so far, the median is %.2f s; what the threads are doing:\n%s",
                    self._step + 1, self._reported, statistics.median(self._recent), stacks(),
                )  # fmt: skip
                ask_workers()


def ask_workers() -> None:
    """Has the worker processes of this one print their stacks on stderr: those that take SIGUSR1 (Linux can tell)."""
    for worker in multiprocessing.active_children():
        with contextlib.suppress(OSError):  # it has ended, or this is no Linux
            status = Path(f"/proc/{worker.pid}/status").read_text()
            (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
            if int(caught, 16) >> (signal.SIGUSR1 - 1) & 1:  # it would end any other
                LOGGER.warning("what worker process %d is doing:", worker.pid)
                os.kill(worker.pid, signal.SIGUSR1)
