"""Where a run shows its figures beside its own files: TensorBoard, and W&B and MLflow where they are installed.

TensorBoard's events are part of the run: a disk that takes none stops it. W&B and MLflow are somebody else's machines:
each has a thread of its own here, and whatever happens to them, the run goes on and says so once. Who they are talked
to as, and where, is said in their own environment variables (WANDB_PROJECT, WANDB_MODE, MLFLOW_TRACKING_URI, ...).
"""

import html
import logging
import os
import queue
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from importlib import util
from typing import Any, Protocol

import numpy as np
from etils import epath

from eupe_jax.data import threads
from eupe_jax.files import write_whole
from eupe_jax.training.events import Events

LOGGER = logging.getLogger(__name__)

TENSORBOARD = "tensorboard"
FOLDER = "loggers"  # of a workdir: which W&B and MLflow run it is, and W&B's own files
PROJECT = "eupe_jax"  # W&B project and MLflow experiment, where the environment names none
BINS = 64  # of a histogram
WAITING = 1000  # calls that wait for another machine; more are dropped
PATIENCE = 60.0  # seconds that closing waits for another machine


class Logger(Protocol):
    """What shows a run. Names are "GROUP/NAME"; a step that comes again, as after a resume, brings the same again."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """scalars: finite."""

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        """values: finite, [N]."""

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """picture: uint8 RGB [H, W, 3]."""

    def text(self, step: int, name: str, words: str) -> None:
        """words: Markdown."""

    def close(self) -> None:
        """Sends what is left."""


class _WandB:
    """A run of Weights & Biases. A workdir's run keeps its id, so that a resumed run goes on in the same one.

    Lines are shown over the metric "step", not over W&B's own count, which cannot go back to a checkpoint.
    """

    def __init__(self, workdir: epath.Path, config: Mapping[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        known = _Id(workdir, "wandb")
        if known.value is None:
            known.write(secrets.token_hex(8))
        folder = tempfile.mkdtemp(prefix="wandb_") if "://" in str(workdir) else workdir / FOLDER
        # finish_timeout: else it waits at the end, in the interpreter's own exit too, as long as the network is gone
        settings = wandb.Settings(
            console="off", x_disable_stats=True, x_disable_machine_info=True, finish_timeout=PATIENCE / 2
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), id=known.value, resume="allow", name=workdir.name,
            dir=str(folder), config=dict(config), settings=settings,
        )  # fmt: skip
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({**scalars, "step": step})

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        self.write(step, {name: self._wandb.Histogram(np_histogram=np.histogram(values, BINS))})

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        self.write(step, {name: self._wandb.Image(picture)})

    def text(self, step: int, name: str, words: str) -> None:
        self.write(step, {name: self._wandb.Html(f"<pre>{html.escape(words)}</pre>")})

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """A run of MLflow; a workdir's run keeps its id. It knows no histograms: they are JSON files."""

    def __init__(self, workdir: epath.Path, config: Mapping[str, Any]) -> None:
        import mlflow

        self._entities, self._client = mlflow.entities, mlflow.MlflowClient()
        known = _Id(workdir, "mlflow")
        if known.value is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name)
            known.write(self._client.create_run(experiment, run_name=workdir.name).info.run_id)
            self._client.log_dict(known.value, dict(config), "config.json")
        else:
            self._client.update_run(known.value, status="RUNNING")
        self._run = known.value

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        now = time.time_ns() // 10**6
        metrics = [self._entities.Metric(name, float(value), now, step) for name, value in scalars.items()]
        self._client.log_batch(self._run, metrics)

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        counts, edges = np.histogram(values, BINS)
        content = {"counts": counts.tolist(), "edges": edges.tolist()}
        self._client.log_dict(self._run, content, f"histograms/{name}/{step}.json")

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        self._client.log_image(self._run, picture, f"images/{name}/{step}.png")

    def text(self, step: int, name: str, words: str) -> None:
        self._client.log_text(self._run, words, f"texts/{name}/{step}.md")

    def close(self) -> None:
        self._client.set_terminated(self._run)


class _Id:
    """Which run of a service a workdir's run is, kept in a file there."""

    def __init__(self, workdir: epath.Path, service: str) -> None:
        self._path = workdir / FOLDER / f"{service}.id"
        self.value = self._path.read_text().strip() if self._path.exists() else None

    def write(self, value: str) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, f"{value}\n")
        self.value = value


REMOTE: dict[str, Callable[[epath.Path, Mapping[str, Any]], Logger]] = {"wandb": _WandB, "mlflow": _MLflow}
PACKAGES = {"wandb": "wandb>=0.31", "mlflow": "mlflow-skinny>=3"}  # what to install for them
NAMES = (TENSORBOARD, *REMOTE)


class Remote:
    """A logger that cannot stop a run, nor hold it up: it lives in a thread of its own, and its failures are told once.

    What it does not take is lost, but for what it sends again by itself; the next call is tried all the same.
    """

    def __init__(self, name: str, connect: Callable[[], Logger]) -> None:
        """connect: called in that thread, again before every call where it failed."""
        self._name, self._connect, self._told = name, connect, False
        self._coming: queue.Queue[tuple[str, tuple] | None] = queue.Queue(WAITING)  # None: the end
        self._ended = threads.start(self._work, name=name)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """As `Logger.write`, later."""
        self._put("write", step, dict(scalars))

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        """As `Logger.histogram`, later. values: [N]."""
        self._put("histogram", step, name, np.array(values))

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """As `Logger.image`, later. picture: uint8 RGB [H, W, 3]."""
        self._put("image", step, name, np.array(picture))

    def text(self, step: int, name: str, words: str) -> None:
        """As `Logger.text`, later."""
        self._put("text", step, name, words)

    def close(self) -> None:
        """Waits for what is still to be sent, but not for ever: its thread is left behind then."""
        try:
            self._coming.put(None, timeout=PATIENCE)
        except queue.Full:
            pass
        if not wait([self._ended], PATIENCE).done:
            self._tell(f"has not taken all in {PATIENCE:g} s: what it lacks is lost")

    def _put(self, method: str, *arguments: Any) -> None:
        try:
            self._coming.put_nowait((method, arguments))
        except queue.Full:
            self._tell(f"has {WAITING} figures waiting: the next ones are lost")

    def _work(self) -> None:
        logger = None
        while (call := self._coming.get()) is not None:
            try:
                logger = logger or self._connect()
                getattr(logger, call[0])(*call[1])
            except Exception as error:
                self._tell(f"failed, figures are lost ({type(error).__name__}: {error})")
        if logger is not None:
            try:
                logger.close()
            except Exception as error:
                self._tell(f"failed at the end ({type(error).__name__}: {error})")

    def _tell(self, words: str) -> None:
        if not self._told:
            self._told = True
            LOGGER.warning("logger %r %s; the run goes on, and this is said once", self._name, " ".join(words.split()))


def check(names: Sequence[str]) -> None:
    """What can be seen to be wrong with `config.loggers` before training.

    Raises:
      ValueError: an unknown name. ImportError: its package is not installed; says how to install it.
    """
    for name in names:
        if name not in NAMES:
            raise ValueError(f"loggers holds {name!r}: use {', '.join(NAMES)}; metrics.jsonl is written in any case")
        if name in REMOTE and util.find_spec(name) is None:
            raise ImportError(f"loggers holds {name!r}, which is not installed: pip install '{PACKAGES[name]}'")


def connect(
    names: Sequence[str], workdir: epath.Path, resume_step: int = 0, config: Mapping[str, Any] | None = None
) -> list[Logger]:
    """The loggers of a run. config: shown by those that show such.

    Raises:
      ValueError, ImportError: as `check`. OSError: TensorBoard's file cannot be made.
    """
    check(names)
    made: list[Logger] = []
    for name in dict.fromkeys(names):
        if name == TENSORBOARD:
            made.append(Events(workdir / TENSORBOARD, resume_step))
        else:
            made.append(Remote(name, lambda kind=REMOTE[name]: kind(workdir, config or {})))
    return made
