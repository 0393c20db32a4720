"""What a run does when its machine, or that of another process, is taken away: leave in time, with nothing lost, and
say that it wants to go on.

The notice is SIGTERM. Python runs signal handlers between two lines of the main thread, so one that comes while XLA
compiles would wait for minutes: a thread is woken by it instead. Where several processes train together, JAX's
preemption service has a handler of its own; it tells all of them, and makes them stop after the same step.
"""

import contextlib
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

# JAX is imported where it is asked: commands that do without it listen too, and from the start.

LOGGER = logging.getLogger(__name__)

RESUME_ME = 75  # exit status: EX_TEMPFAIL of sysexits.h, "run the same command again"
AGAIN = "run the same command again"
GRACE_SECONDS = 25.0  # clouds give 30
EAR_SECONDS = 0.5  # how often a process asks whether another one was told
# A process that leaves while others wait for it in a collective makes them fail. They are all told within a second or
# two; the first process keeps the service that tells them, so it goes last.
LINGER_SECONDS, LINGER_SECONDS_FIRST = 1.5, 3.0
# Where JAX 0.10's preemption service (XLA's preemption_sync_manager.cc) notes that one of the processes was told.
NOTICE_KEY = "RECEIVED_PREEMPTION_NOTICE"

# How JAX's errors read when the process at the other end is gone; and those of any connection, a bucket's as well.
_LOST = re.compile(
    r"Gloo \w+ failed|heartbeat|coordination service|barrier (failed|timed out)|task .*(died|crashed|unhealthy)",
    re.IGNORECASE,
)
_CUT_OFF = re.compile(r"connection (was )?(closed|reset|refused)|socket closed|broken pipe", re.IGNORECASE)


class ResumeMe(Exception):
    """Nothing is wrong with the run, but it cannot go on now. `again`: what resumes it, in words."""

    def __init__(self, message: str, again: str = AGAIN) -> None:
        super().__init__(message)
        self.again = again


class Preempted(ResumeMe):
    """The run was told to leave, and all of it is saved."""


class Preemption:
    """Listens for the notice while it is open (main thread only; one that was never opened hears nothing).

    Unless something is to be saved, the process ends at once with status `RESUME_ME`: whatever it does is done again,
    or gone on with, when the command is run again. Within `something_to_save` it has until the end of the grace
    period: the training loop asks `requested` after every step, saves, and raises `Preempted`.

    With several processes, an error that follows from the end of another one ends this one with `RESUME_ME` as well.
    """

    def __init__(self, grace: float = GRACE_SECONDS, leave: Callable[[int], None] = os._exit) -> None:
        """grace: seconds from the notice to the end. leave: how to end the process, at once and from any thread."""
        self.again = AGAIN  # what resumes the run, in words
        self._grace, self._leave = grace, leave
        self._noticed: float | None = None
        self._to_save = False
        self._linger = 0.0  # seconds from the notice to leaving with nothing to save
        self._joined = False  # with jax.distributed, whose service then hears SIGTERM
        self._changed = threading.Condition()
        self._closed = False
        self._ear: threading.Thread | None = None

    def __enter__(self) -> "Preemption":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._handler = signal.signal(signal.SIGTERM, lambda *_: None)  # wakes the thread below, by the pipe
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._listener = threading.Thread(target=self._listen, name="preemption notice", daemon=True)
        self._listener.start()
        self._leaver = threading.Thread(target=self._leave_in_time, name="preemption exit", daemon=True)
        self._leaver.start()
        return self

    def joined(self) -> None:
        """To be called after `jax.distributed.initialize`: each process now hears of a notice that any of them got."""
        from jax._src.distributed import global_state

        self._joined, others = True, global_state.num_processes > 1
        if others:
            self._linger = LINGER_SECONDS if global_state.process_id else LINGER_SECONDS_FIRST
        self._ear = threading.Thread(target=self._hear, name="preemption of others", daemon=True)
        self._ear.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        of_its_own = error is not None and not isinstance(error, ResumeMe)
        if self._joined and of_its_own and isinstance(error, Exception):
            self._leave_if_others_did(error)
        with self._changed:
            # else it still sees to it that leaving takes no longer
            self._closed = of_its_own or not (self._joined and self._noticed)
            self._changed.notify_all()
        if self._closed:
            self._leaver.join()
        if self._ear is not None:
            self._ear.join()
        signal.set_wakeup_fd(self._wakeup)
        if not self._joined:  # JAX's own handler is to stay: what it told the others is under way
            signal.signal(signal.SIGTERM, self._handler or signal.SIG_DFL)
        os.close(self._write)  # ends the listener
        self._listener.join()
        os.close(self._read)

    def requested(self, step: int) -> bool:
        """Whether to save and leave now, after `step` steps; all hosts give the same answer at the same step."""
        if not self._joined:
            return self._noticed is not None
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        if reached_preemption_sync_point(step):
            self._notice()
            return True
        return False

    @contextlib.contextmanager
    def something_to_save(self) -> Iterator[None]:
        """Around the training loop, whose steps would be lost; once it is left by an error, `Preempted` or another,
        until the end, so that all is closed in peace and the status is that of the error."""
        before = self._set_to_save(True)
        yield
        self._set_to_save(before)

    @contextlib.contextmanager
    def nothing_to_save(self) -> Iterator[None]:
        """Around what the loop does with all steps saved, and does again when the run resumes: an evaluation."""
        before = self._set_to_save(False)
        try:
            yield
        finally:
            self._set_to_save(before)

    def _set_to_save(self, value: bool) -> bool:
        """Returns what it was before."""
        with self._changed:
            before, self._to_save = self._to_save, value
            self._changed.notify_all()
        return before

    def _listen(self) -> None:
        while data := os.read(self._read, 64):
            if signal.SIGTERM in data:
                self._notice()

    def _hear(self) -> None:
        from jax._src.distributed import global_state  # there is no public way to the service's keys
        from jax.errors import JaxRuntimeError

        while not self._noticed:
            with contextlib.suppress(JaxRuntimeError):  # not found, or the service is gone: JAX itself sees to that
                global_state.client.key_value_try_get(NOTICE_KEY)
                self._notice()
            with self._changed:
                if self._changed.wait_for(lambda: self._closed, EAR_SECONDS):
                    return

    def _notice(self) -> None:
        with self._changed:
            if self._noticed is None:
                self._noticed = time.monotonic()
                LOGGER.warning("this machine is being taken away: leaving within %g s", self._grace)
                self._changed.notify_all()

    def _leave_in_time(self) -> None:
        with self._changed:
            while not self._closed:
                left = self._left()
                if left is not None and left <= 0:
                    why = "the grace period is over" if self._to_save else "nothing is to be saved now"
                    LOGGER.warning("%s: status %d, %s to go on", why, RESUME_ME, self.again)
                    self._leave(RESUME_ME)
                    return
                self._changed.wait(left)

    def _left(self) -> float | None:
        """Seconds until this process ends; None while it has not been told to."""
        if self._noticed is None:
            return None
        return self._noticed + (self._grace if self._to_save else min(self._linger, self._grace)) - time.monotonic()

    def _leave_if_others_did(self, error: Exception) -> None:
        if not is_lost(error) and not (self._noticed and _is_of_jax(error)):  # which may read in any way
            return
        why = "the others have left" if self._noticed else "another process of this run has ended or is out of reach"
        LOGGER.error(
            "%s (%s): status %d, %s on all hosts to go on from the last checkpoint",
            why, " ".join(str(error).split())[:300], RESUME_ME, self.again,
        )  # fmt: skip
        self._leave(RESUME_ME)  # at once: JAX would wait at its end for those that are gone


def is_lost(error: BaseException | None) -> bool:
    """Whether JAX raised this because another process has gone. (Checkpoints make an OSError of it, and of a bucket
    that cannot be reached.)"""
    of_storage = False
    for each in _causes(error):
        of_storage |= isinstance(each, OSError)
        if isinstance(each, ValueError | RuntimeError):
            if _LOST.search(str(each)) or (not of_storage and _CUT_OFF.search(str(each))):
                return True
    return False


def _is_of_jax(error: BaseException) -> bool:
    """Whether JAX's run time raised this, or what it came of."""
    from jax.errors import JaxRuntimeError

    return any(isinstance(each, JaxRuntimeError) for each in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, then what it came of, as a traceback has them."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
