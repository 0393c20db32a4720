"""What a run does when its machine is taken away: leave in time, with nothing lost, and say that it wants to go on.

The notice is SIGTERM, on one host as on many; where several hosts train together, JAX's preemption service hears it on
any of them and makes all of them stop after the same step. Python runs signal handlers between two lines of the main
thread, so one that comes while XLA compiles would wait for minutes: a thread is woken by it instead.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import jax
from jax.experimental.multihost_utils import reached_preemption_sync_point

LOGGER = logging.getLogger(__name__)

RESUME_ME = 75  # exit status: EX_TEMPFAIL of sysexits.h, "run the same command again"
GRACE_SECONDS = 25.0  # clouds give 30


class Preemption:
    """Watches for the notice while it is open (main thread only).

    The training loop asks `requested` after every step, saves and leaves. Where nothing can be lost
    (`nothing_to_save`), and where the loop has not come by within the grace period, the process ends at once with
    status `RESUME_ME`.
    """

    def __init__(self, grace: float = GRACE_SECONDS, leave: Callable[[int], None] = os._exit) -> None:
        """grace: seconds from the notice to the end. leave: how to end the process, at once and from any thread."""
        self._grace, self._leave = grace, leave
        self._noticed: float | None = None
        self._nothing_to_save = False
        self._changed = threading.Condition()
        self._closed = False

    def __enter__(self) -> "Preemption":
        # Several processes: JAX's service has its own handler of SIGTERM, which ours would replace.
        self._own = jax.process_count() == 1
        if self._own:
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._handler = signal.signal(signal.SIGTERM, lambda *_: None)  # wakes the thread below, by the pipe
            self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._listener = threading.Thread(target=self._listen, name="preemption notice", daemon=True)
            self._listener.start()
        self._leaver = threading.Thread(target=self._leave_in_time, name="preemption exit", daemon=True)
        self._leaver.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._leaver.join()
        if self._own:
            signal.set_wakeup_fd(self._wakeup)
            signal.signal(signal.SIGTERM, self._handler or signal.SIG_DFL)
            os.close(self._write)  # ends the listener
            self._listener.join()
            os.close(self._read)

    def requested(self, step: int) -> bool:
        """Whether to save and leave now, after `step` steps; all hosts give the same answer at the same step."""
        if self._own:
            return self._noticed is not None
        if reached_preemption_sync_point(step):
            self._notice()
            return True
        return False

    @contextlib.contextmanager
    def nothing_to_save(self) -> Iterator[None]:
        """Around what is done again from the start when the run resumes: statistics, compilation, an evaluation."""
        with self._changed:
            before, self._nothing_to_save = self._nothing_to_save, True
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._nothing_to_save = before

    def _listen(self) -> None:
        while data := os.read(self._read, 64):
            if signal.SIGTERM in data:
                self._notice()

    def _notice(self) -> None:
        with self._changed:
            if self._noticed is None:
                self._noticed = time.monotonic()
                LOGGER.warning("this machine is being taken away: saving and leaving within %g s", self._grace)
                self._changed.notify_all()

    def _leave_in_time(self) -> None:
        with self._changed:
            while not self._closed:
                left = None if self._noticed is None else self._noticed + self._grace - time.monotonic()
                if left is not None and (self._nothing_to_save or left <= 0):
                    why = "nothing is to be saved now" if left > 0 else "the grace period is over"
                    LOGGER.warning("%s: leaving with status %d, run the same command again to go on", why, RESUME_ME)
                    self._leave(RESUME_ME)
                    return
                self._changed.wait(left)
