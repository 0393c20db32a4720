"""Steps that were not healthy: written down one by one, and a stop when too many come in a row.

The step itself keeps a student as it was where its gradients are not finite (distill/step.py); here is what a person
finds out about it. What the devices say is read a step late, so that nobody waits for the step just dispatched.
"""

import json
import math
from collections.abc import Callable, Mapping

import jax
import numpy as np
from etils import epath
from jax.experimental.multihost_utils import broadcast_one_to_all
from ml_collections import ConfigDict

from eupe_jax import files
from eupe_jax.training.metrics import in_bucket, read_metrics, replace_lines, upload_waiting

FILE = "bad_steps.jsonl"
READ = ("skipped", "loss", "grad_norm")


class Diverged(ValueError):
    """Too many bad steps in a row. `step`: the last of them, 0-based; `students`: those that had them."""

    def __init__(self, message: str, step: int, students: tuple[str, ...]) -> None:
        super().__init__(message)
        self.step, self.students = step, students


class Health:
    """Watches the steps of one run; all hosts must call it alike, the first one writes.

    A step is bad for a student where its update was not applied, or its loss is not finite. WORKDIR/bad_steps.jsonl
    has a line for each: "step" (0-based: the one that `launch/replay.py --step` takes), "students": {name: {"applied",
    "loss", "grad_norm"}} of those it was bad for, and what `describe(step)` tells of its batch. A run that goes on from
    a checkpoint takes the lines past it off the file: it comes to those steps again.
    """

    def __init__(
        self, workdir: epath.PathLike, config: ConfigDict, describe: Callable[[int], Mapping], *, enabled: bool
    ) -> None:
        """`describe`: what to write down of a step, as JSON takes it. `enabled`: whether this host writes."""
        self._path = epath.Path(workdir) / FILE
        self._students, self._limit = tuple(config.students), config.faults.max_skipped
        self._describe, self._enabled = describe, enabled
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._text: list[str] = []  # of a file in a bucket, line by line
        self._in_a_row: dict[str, int] | None = None  # known once the first step is

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of the step (0-based) that was just dispatched; waits for nothing."""
        if self._in_a_row is None:
            self._in_a_row = self._before(step, self._lines_before(step) if self._enabled else [])
        kept = {f"{name}/{what}": metrics[f"{name}/{what}"] for name in self._students for what in READ}
        for value in kept.values():
            value.copy_to_host_async()
        self._pending.append((step, kept))

    def check(self, *, final: bool = False) -> None:
        """Looks at every step added but the newest (`final`: including it, because the run is about to be saved; every
        line that was written until then is in the run's folder when this returns).

        Raises:
          Diverged: a student had `config.faults.max_skipped` bad steps in a row.
        """
        keep = 0 if final else 1
        while len(self._pending) > keep:
            step, metrics = self._pending.pop(0)
            self._look(step, {name: float(value) for name, value in jax.device_get(metrics).items()})
        if final:
            upload_waiting()

    def _look(self, step: int, found: Mapping[str, float]) -> None:
        bad = {}
        for name in self._students:
            loss, norm = found[f"{name}/loss"], found[f"{name}/grad_norm"]
            applied = found[f"{name}/skipped"] == 0
            if applied and math.isfinite(loss):
                self._in_a_row[name] = 0
                continue
            self._in_a_row[name] += 1
            bad[name] = {"applied": applied, "loss": _plain(loss), "grad_norm": _plain(norm)}
        if not bad:
            return
        if self._enabled:
            self._append({"step": step, "students": bad, **self._describe(step)})
        if students := tuple(name for name, count in self._in_a_row.items() if count >= self._limit):
            values = {name: f"loss {bad[name]['loss']}, gradient norm {bad[name]['grad_norm']}" for name in students}
            said = "; ".join(f"{name}: {value}" for name, value in values.items())
            raise Diverged(
                f"{self._limit} steps in a row, up to step {step}, did student(s) {', '.join(students)} no good "
                f"({said}); {self._path} has their records, and launch/replay.py --workdir={self._path.parent} "
                f"--step={step} runs the last one again",
                step,
                students,
            )

    def _append(self, line: dict) -> None:
        if in_bucket(self._path):
            self._text.append(_json_line(line))
            replace_lines(self._path, self._text)
            return
        with files.naming(self._path), self._path.open("a") as file:
            file.write(_json_line(line))

    def _lines_before(self, step: int) -> list[dict]:
        """Those of the file for steps before `step`; others are taken off it, and one that a kill cut short."""
        if not self._path.exists():
            return []
        kept = [line for line in read_metrics(self._path) if line["step"] < step]
        text = [_json_line(line) for line in kept]
        if self._path.read_text() != "".join(text):
            replace_lines(self._path, text)
        if in_bucket(self._path):
            self._text = text
        return kept

    def _before(self, step: int, lines: list[dict]) -> dict[str, int]:
        """How many steps in a row were bad for each student just before `step`, in the run that this one resumes."""
        students = {line["step"]: line["students"] for line in lines}
        counts = []
        for name in self._students:
            first = step
            while name in students.get(first - 1, ()):
                first -= 1
            counts.append(step - first)
        counts = broadcast_one_to_all(np.asarray(counts, np.int32))  # only the first host has read the file
        return dict(zip(self._students, (int(count) for count in counts), strict=True))


def _json_line(line: Mapping) -> str:
    return json.dumps(line, allow_nan=False, separators=(",", ":")) + "\n"


def _plain(value: float) -> float | str:
    """JSON has no NaN and no infinities: "nan", "inf" and "-inf" instead."""
    return value if math.isfinite(value) else str(value)
