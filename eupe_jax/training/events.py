"""TensorBoard events of a run.

tensorboardX's own writer fills a queue; once the thread that empties it has met a full disk, a run that logs hangs.
Here the next write raises what went wrong.
"""

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from etils import epath
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from eupe_jax.files import naming

FLUSH_SECONDS = 120.0


class Events:
    """One file of events in a folder, written by a thread of its own: a bucket is slow."""

    def __init__(self, folder: epath.Path, resume_step: int) -> None:
        """Raises OSError where the file cannot be made."""
        self._folder, self._flushed = folder, time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        with naming(folder):
            self._file = EventsWriter(str(folder / "events"), filename_suffix=f".{resume_step}")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tensorboard")
        # TensorBoard forgets what a stopped run had already written past its last checkpoint.
        forget = Event(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START))
        self._last: Future = self._thread.submit(self._write, [forget], None)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Raises OSError, naming the folder, where an earlier write failed."""
        if self._last.done():
            self._raise()
        events = [Event(step=step, summary=summary.scalar(name, value)) for name, value in scalars.items()]
        self._last = self._thread.submit(self._write, events, self._last)

    def close(self) -> None:
        """Raises OSError as `write` does."""
        self._thread.shutdown()
        self._raise()
        with naming(self._folder):
            self._file.close()

    def _write(self, events: list[Event], previous: Future | None) -> None:
        if previous is not None:
            previous.result()  # what went wrong is not written over
        for event in events:
            event.wall_time = time.time()
            self._file.write_event(event)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()

    def _raise(self) -> None:
        with naming(self._folder):
            self._last.result()
