"""Metrics: averaged between logs with clu.metrics, written as JSON lines and shown by the run's loggers."""

import contextlib
import json
import math
import time
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from clu.metrics import Average
from etils import epath

from eupe_jax.files import naming, write_whole
from eupe_jax.training import loggers

UPLOAD_SECONDS = 60.0  # how often lines for a bucket are uploaded between two saves, for those who look on


class RunningMetrics:
    """Averages of step metrics since the last `pop`, computed on the host: devices have a step under way.

    A step whose gradients were not finite is told by "skipped"; its losses do not spoil those of the others.
    `add` keeps the newest step's values unread until the next call: reading a step late means that the host never
    waits for the step it has just dispatched.
    """

    def __init__(self, unlogged: Mapping | None = None) -> None:
        """unlogged: what `unlogged` gave where this run goes on."""
        self._pending: dict[str, jax.Array] = {}
        unlogged = unlogged or {"averages": {}, "counts": {}}
        self._averages = {
            name: Average(total=np.asarray(each["total"], each["dtype"]), count=np.asarray(each["count"]))
            for name, each in unlogged["averages"].items()
        }
        self._counts = Counter(unlogged["counts"])

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Takes the scalars of the step that was just dispatched; waits for those of the one before."""
        previous, self._pending = self._pending, metrics
        self._merge(previous)

    def _merge(self, metrics: dict[str, jax.Array]) -> None:
        for name, value in jax.device_get(metrics).items():
            finite = np.isfinite(value)
            average = Average(total=np.where(finite, value, 0), count=np.where(finite, 1, 0))
            self._averages[name] = self._averages[name].merge(average) if name in self._averages else average

    def count(self, counts: Mapping[str, int]) -> None:
        """Takes what is added up, not averaged."""
        self._counts.update(counts)

    def unlogged(self) -> dict[str, dict]:
        """All that was added since the last `pop`, the newest step included, as JSON takes it: a run that goes on from
        a checkpoint between two lines writes the line that it would have written."""
        self.add({})
        averages = {
            name: {"total": each.total.item(), "dtype": each.total.dtype.name, "count": each.count.item()}
            for name, each in self._averages.items()
        }
        return {"averages": averages, "counts": dict(self._counts)}

    def pop(self, *, final: bool = False) -> dict[str, float]:
        """Averages of every step but the newest (`final`: including it), and counts, then starts afresh.

        Values that are not finite are left out; NaN where no other is left.
        """
        if final:
            self.add({})
        averages, counts = self._averages, self._counts
        self._averages, self._counts = {}, Counter()
        scalars = {name: float(each.compute()) if each.count else math.nan for name, each in averages.items()}
        return scalars | counts


class MetricWriter:
    """Writes scalars as JSON lines and gives them to the run's loggers; silent where `enabled` is False.

    What was computed stands in metrics.jsonl: a run that was stopped and resumed has the same lines as one that never
    stopped. How fast it went stands in timings.jsonl, which no two runs have alike. JSON has no NaN: what is not finite
    is null there. In a bucket both are uploaded before each save: see `upload_waiting`.
    """

    def __init__(
        self,
        workdir: epath.Path,
        *,
        resume_step: int = 0,
        enabled: bool = True,
        names: Sequence[str] = (loggers.TENSORBOARD,),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """names: of loggers, which show `config`.

        Raises:
          ValueError, ImportError, OSError: as `loggers.connect`; or a file of lines is damaged, or cannot be written.
        """
        self._metrics = self._timings = None
        self._loggers: list[loggers.Logger] = []
        if enabled:
            self._metrics = _Lines(workdir / "metrics.jsonl", resume_step)
            self._timings = _Lines(workdir / "timings.jsonl", resume_step)
            self._loggers = loggers.connect(names, workdir, resume_step, config)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """What was computed."""
        self._write(self._metrics, step, scalars)

    def write_timings(self, step: int, scalars: dict[str, float]) -> None:
        """How long it took."""
        self._write(self._timings, step, scalars)

    def _write(self, lines: "_Lines | None", step: int, scalars: dict[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        if lines is None or not scalars or not lines.append({"step": step, **finite}):
            return
        known = {name: value for name, value in finite.items() if value is not None}
        for each in self._loggers:
            each.write(step, known)

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """{name: uint8 RGB [H, W, 3]}, for the loggers."""
        for each in self._loggers:
            for name, picture in pictures.items():
                each.image(step, name, picture)

    def begin(self, config: Mapping[str, Any], statistics: Mapping[str, Mapping[str, Mapping]]) -> None:
        """What a run begins with, for the loggers: its config, and how the statistics of its targets are distributed.

        statistics: {teacher: {"mean", "std": {kind: [D]}}}.
        """
        recipe = "\n".join(f"    {line}" for line in json.dumps(config, indent=2).splitlines())  # code, in Markdown
        for each in self._loggers:
            each.text(0, "config", recipe)
            for teacher, arrays in statistics.items():
                for what, kinds in arrays.items():
                    for kind, values in kinds.items():
                        each.histogram(0, f"statistics/{teacher}/{kind}_{what}", np.asarray(values))

    def close(self) -> None:
        """Waits for what is still to be written."""
        with contextlib.ExitStack() as closing:  # the first failure keeps none of the others open
            for each in (*self._loggers[::-1], self._timings, self._metrics):
                if each is not None:
                    closing.callback(each.close)


def in_bucket(path: epath.PathLike) -> bool:
    """Whether it is an object, which is written whole or not at all: gcsfs takes "append" for "replace"."""
    return "://" in str(path)


def replace_lines(path: epath.Path, lines: list[str]) -> None:
    """Replaces a file whole, with these lines.

    Raises:
      OSError: names the file.
    """
    if not in_bucket(path):
        write_whole(path, "".join(lines))
        return
    with naming(path):
        path.write_text("".join(lines))  # an object is there once all of it has arrived; renaming one takes requests


def upload_waiting() -> None:
    """Uploads all lines that wait for a bucket. To be called before a checkpoint is begun: a run that goes on from it
    computes no line before it again.

    Raises:
      OSError: names the file.
    """
    for each in list(_WAITING):
        each.upload()


class _Lines:
    """A file of JSON lines, one a step.

    Resuming cuts lines from the step on that a stopped run had already written past its last checkpoint; what is
    written again at that very step, as an evaluation that is run again does, stands there once.

    On a disk a line is written at once. Objects of a bucket do not grow: there the whole file is, by `upload_waiting`,
    when it is closed, and now and then.
    """

    def __init__(self, path: epath.Path, resume_step: int) -> None:
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step] if path.exists() else []
        self._there = [line for line in kept if line["step"] == resume_step]
        self._written = [_json_line(line) for line in kept]
        self._uploaded, self._uploaded_at = len(kept), time.monotonic()
        replace_lines(path, self._written)
        self._path, self._file = path, None
        if in_bucket(path):
            _WAITING.add(self)
        else:
            self._written.clear()
            self._file = path.open("a")

    def append(self, line: dict) -> bool:
        """Whether the line was new."""
        if line in self._there:
            return False
        if self._file is None:
            self._written.append(_json_line(line))
            if time.monotonic() - self._uploaded_at > UPLOAD_SECONDS:
                self.upload()
            return True
        with naming(self._path):
            self._file.write(_json_line(line))
            self._file.flush()
        return True

    def upload(self) -> None:
        """To a bucket, if it lacks a line."""
        if len(self._written) > self._uploaded:
            replace_lines(self._path, self._written)
            self._uploaded, self._uploaded_at = len(self._written), time.monotonic()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            return
        _WAITING.discard(self)
        self.upload()


_WAITING: "weakref.WeakSet[_Lines]" = weakref.WeakSet()  # files in buckets that are open


def _json_line(line: dict) -> str:
    return json.dumps(line, allow_nan=False) + "\n"


def read_metrics(path: epath.PathLike) -> list[dict]:
    """The lines of a metrics.jsonl; a last line cut short by a kill is dropped.

    Raises:
      ValueError: another line is damaged; names it.
    """
    written, lines = epath.Path(path).read_text().splitlines(), []
    for number, line in enumerate(written, 1):
        try:
            lines.append(json.loads(line, parse_constant=lambda _: None))
        except json.JSONDecodeError as error:
            if number == len(written):
                break
            raise ValueError(f"{path}, line {number} is damaged ({error}): mend or remove that line") from None
    return lines
