"""Profiler traces of chosen steps: what every process's host and devices did, for XProf or Perfetto."""

import contextlib
import logging
import re
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

import jax
from etils import epath

from eupe_jax.files import write_whole

LOGGER = logging.getLogger(__name__)

MOST = 100  # steps: traces are large, and the profiler drops events beyond some millions


def parse_steps(text: str) -> tuple[int, int]:
    """(first, last) step of "FIRST:LAST" or "STEP", numbered as in metrics.jsonl: the first step of a run is 1.

    Raises:
      ValueError: names the flag and the form.
    """
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    if not found:
        raise ValueError(f"--profile={text} must be FIRST:LAST, the steps to trace, such as 100:105")
    first, last = int(found[1]), int(found[2] or found[1])
    if not 1 <= first <= last or last - first >= MOST:
        raise ValueError(f"--profile={text}: FIRST must be at least 1, and LAST not less than it, nor {MOST} steps on")
    return first, last


class Profiler:
    """Traces the steps of a range while the loop runs; devices are waited for where the range begins and ends, only.

    Every process writes its trace to `folder`/plugins/profile/steps_FIRST_LAST/HOST_PROCESS.xplane.pb, which is where
    XProf and TensorBoard look.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: epath.PathLike, *, start: int, end: int) -> None:
        """steps: (first, last), None: nothing is traced. start, end: steps done before and after this run.

        Raises:
          ValueError: the range lies beyond the end of the run.
        """
        if steps is not None and steps[1] > end:
            raise ValueError(f"--profile={steps[0]}:{steps[1]}: this run ends with step {end}")
        if steps is not None and steps[1] <= start:  # the same command resumes a run, which must not fail for this
            LOGGER.warning("--profile=%d:%d: the run resumes after step %d, nothing to trace", *steps, start)
            steps = None
        self._first, self._last = (max(steps[0], start + 1), steps[1]) if steps else (0, 0)
        self._folder = epath.Path(folder)
        self._local: Path | None = None

    @property
    def tracing(self) -> bool:
        """Whether a trace is being taken."""
        return self._local is not None

    def begins(self, step: int) -> bool:
        """Whether `start` is due, before this step."""
        return self._last > 0 and step == self._first

    def ends(self, step: int) -> bool:
        """Whether `stop` is due, after this step."""
        return self.tracing and step == self._last

    def start(self, state: Any) -> None:
        """Traces from now on, once everything earlier is done."""
        jax.block_until_ready(state)
        self._local = Path(tempfile.mkdtemp(prefix="eupe_jax_profile_"))
        jax.profiler.start_trace(self._local)

    def step(self, step: int) -> contextlib.AbstractContextManager:
        """Around the dispatch of a step: XProf tells steps apart by it."""
        return jax.profiler.StepTraceAnnotation("train", step_num=step) if self.tracing else contextlib.nullcontext()

    def stop(self, state: Any) -> None:
        """Writes the trace, once its last step is done."""
        jax.block_until_ready(state)
        local, self._local = self._local, None
        try:
            jax.profiler.stop_trace()
            target = self._folder / "plugins" / "profile" / f"steps_{self._first}_{self._last}"
            target.mkdir(parents=True, exist_ok=True)
            for ending in (".xplane.pb", ".trace.json.gz"):
                for path in local.rglob(f"*{ending}"):
                    write_whole(target / f"{socket.gethostname()}_{jax.process_index()}{ending}", path.read_bytes())
            LOGGER.info(
                "trace of steps %d:%d in %s; to see it: pip install xprof, then xprof --logdir=%s (or open the "
                ".trace.json.gz file at ui.perfetto.dev)",
                self._first, self._last, target, self._folder,
            )  # fmt: skip
        finally:
            shutil.rmtree(local, ignore_errors=True)

    def close(self) -> None:
        """Ends a trace that an error cut short, without writing it."""
        if self.tracing:
            local, self._local = self._local, None
            jax.profiler.stop_trace()
            shutil.rmtree(local, ignore_errors=True)
