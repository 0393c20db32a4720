"""TensorBoard events of a run.

tensorboardX's own writer fills a queue; once the thread that empties it has met a full disk, a run that logs hangs.
Here the next write raises what went wrong.
"""

import queue
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import wait

import numpy as np
from etils import epath
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from eupe_jax.data import threads
from eupe_jax.files import naming

FLUSH_SECONDS = 120.0
BINS = 64  # of a histogram
PATIENCE = 60.0  # seconds that closing waits for what is still to be written


class Events:
    """One file of events in a folder, written by a thread of its own: a bucket is slow. A `loggers.Logger`.

    Every method but the first raises OSError, naming the folder, where an earlier write failed.
    """

    def __init__(self, folder: epath.Path, resume_step: int) -> None:
        """Raises OSError where the file cannot be made."""
        self._folder, self._flushed = folder, time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        with naming(folder):
            self._file = EventsWriter(str(folder / "events"), filename_suffix=f".{resume_step}")
        # TensorBoard forgets what a stopped run had already written past its last checkpoint.
        forget = Event(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START))
        self._coming: queue.SimpleQueue[list[Event] | None] = queue.SimpleQueue()  # None: the end
        self._coming.put([forget])
        self._written = threads.start(self._write_all, name="tensorboard")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """scalars: finite."""
        self._put(step, [summary.scalar(name, value) for name, value in scalars.items()])

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        """values: finite, of any shape [...]."""
        self._put(step, [summary.histogram(name, np.ravel(values).astype(np.float64), BINS)])

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """picture: uint8 RGB [H, W, 3]."""
        self._put(step, [summary.image(name, np.asarray(picture, np.uint8), dataformats="HWC")])

    def text(self, step: int, name: str, words: str) -> None:
        """words: Markdown."""
        self._put(step, [summary.text(name, words)])

    def _put(self, step: int, summaries: Sequence[summary.Summary]) -> None:
        if self._written.done():
            self._raise()
        self._coming.put([Event(step=step, summary=each) for each in summaries])

    def close(self) -> None:
        """Raises OSError also where writing hangs: its thread is left behind then."""
        self._coming.put(None)
        if not wait([self._written], PATIENCE).done:
            raise TimeoutError(f"{self._folder} has taken no events for {PATIENCE:g} s: the last ones are lost")
        self._raise()

    def _write_all(self) -> None:
        while (events := self._coming.get()) is not None:
            for event in events:
                event.wall_time = time.time()
                self._file.write_event(event)
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self._file.flush()
                self._flushed = time.monotonic()
        self._file.close()

    def _raise(self) -> None:
        with naming(self._folder):
            self._written.result()
