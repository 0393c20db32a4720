"""Metrics: averaged between logs with clu.metrics, written as TensorBoard events and as JSON lines."""

import json

import jax
from clu.metrics import Average
from etils import epath
from tensorboardX import SummaryWriter


class RunningMetrics:
    """Averages of step metrics since the last `pop`.

    `add` keeps the newest step's values unread until the next call: reading a step late means that the host never
    waits for the step it has just dispatched.
    """

    def __init__(self) -> None:
        self._pending: dict[str, jax.Array] = {}
        self._averages: dict[str, Average] = {}

    def add(self, metrics: dict[str, jax.Array]) -> None:
        previous, self._pending = self._pending, metrics
        self._merge(previous)

    def _merge(self, metrics: dict[str, jax.Array]) -> None:
        for name, value in jax.device_get(metrics).items():
            average = Average.from_model_output(value)
            self._averages[name] = self._averages[name].merge(average) if name in self._averages else average

    def pop(self, *, final: bool = False) -> dict[str, float]:
        """Averages of every step but the newest (`final`: including it), then starts afresh."""
        if final:
            self.add({})
        averages, self._averages = self._averages, {}
        return {name: float(average.compute()) for name, average in averages.items()}


class MetricWriter:
    """Writes scalars to `workdir/tensorboard` and `workdir/metrics.jsonl`; silent where `enabled` is False.

    Resuming cuts lines from the step on that a stopped run had already written past its last checkpoint; what is
    written again at that very step, as an evaluation that is run again does, stands there once.
    """

    def __init__(self, workdir: epath.Path, *, resume_step: int = 0, enabled: bool = True) -> None:
        self._events = self._lines = None
        self._there: list[dict] = []
        if not enabled:
            return
        path = workdir / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step] if path.exists() else []
        self._there = [line for line in kept if line["step"] == resume_step]
        partial = workdir / ".metrics.jsonl.partial"
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.replace(path)
        self._lines = path.open("a")
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        if self._lines is None or not scalars or {"step": step, **scalars} in self._there:
            return
        self._lines.write(json.dumps({"step": step, **scalars}) + "\n")
        self._lines.flush()
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()
            self._events.close()


def read_metrics(path: epath.PathLike) -> list[dict]:
    """The lines of a metrics.jsonl; a last line cut short by a kill is dropped."""
    lines = []
    for line in epath.Path(path).read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
