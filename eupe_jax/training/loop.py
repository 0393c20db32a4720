"""One training run, top to bottom. The same lines serve all three stages: only the config differs."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from etils import epath
from jax.experimental.multihost_utils import process_allgather
from ml_collections import ConfigDict
from tqdm import tqdm

from eupe_jax.distill import resolutions
from eupe_jax.sharding.mesh import make_mesh
from eupe_jax.sharding.rules import shardings
from eupe_jax.training import assemble, pipeline, program
from eupe_jax.training.checkpoints import Checkpoints
from eupe_jax.training.metrics import MetricWriter, RunningMetrics
from eupe_jax.training.optimizer import make_schedule

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Eval:
    """Something to run inside training: `run(step, state) -> scalars`, every `every` steps and at the end.

    It must leave `state` as it is, and give the same scalars when it is run again on the same state: a run that is
    killed while evaluating evaluates again when it resumes.
    """

    name: str
    every: int
    run: Callable[[int, dict], dict[str, float]]


def train(
    config: ConfigDict, workdir: epath.PathLike, *, evals: Sequence[Eval] = (), stop_at: int | None = None
) -> dict:
    """Trains until `config.total_steps`, resuming from the newest checkpoint in `workdir`; returns the final state.

    Args:
      stop_at: stop early after this step, with a checkpoint, without changing the schedule; run again to go on.

    Raises:
      ValueError, OSError: bad config, data, statistics, checkpoint or workdir, before anything is trained.
    """
    # ---- where the run lives
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    pipeline.check_config(config)
    check_evals(evals, config.log_every)
    main_process = jax.process_index() == 0
    check_workdir(workdir, config)
    data = pipeline.Data(config)
    check_data(workdir, data.facts)
    mesh = make_mesh(**config.mesh)
    LOGGER.info("%d devices, mesh %s", jax.device_count(), dict(mesh.shape))

    # ---- who teaches, and on what scale
    teachers = assemble.load_teachers(config, mesh)
    statistics = assemble.find_statistics(config, teachers.by_name)
    statistics_arrays = {name: s.arrays() for name, s in statistics.items()}

    # ---- who learns, from where
    students = assemble.make_students(config, teachers.by_name, mesh)
    state = assemble.init_state(config, students, mesh)
    saver = Checkpoints(workdir, config.checkpoint)
    if saver.latest_step is not None:
        state = saver.restore(state, saver.latest_step)
        LOGGER.info("resumed from step %d", saver.latest_step)
    manifest = assemble.manifest(config, teachers, statistics)
    start, end = int(state["step"]), min(config.total_steps, stop_at or config.total_steps)

    # ---- what it sees
    batches = data.batches(teachers.hosts, mesh, start_step=start)

    # ---- the step, once for every combination of resolutions
    steps = program.make_steps(config, students, teachers.by_name, mesh, shardings(state, mesh))
    schedule = make_schedule(config.optimizer, config.batch_size, config.total_steps)

    if main_process:
        _record(workdir / "config.json", config.to_dict())
        _record(workdir / "data.json", data.facts)

    # ---- the loop: metrics are read a step late, so the host runs ahead of the devices
    running = RunningMetrics()
    writer = MetricWriter(workdir, resume_step=start, enabled=main_process)
    bar = tqdm(total=config.total_steps, initial=start, unit="step", disable=not main_process, desc=workdir.name)

    def log(step: int, scalars: dict[str, float]) -> None:
        if not scalars:  # logged just before a save
            return
        writer.write(step, scalars | {"learning_rate": float(schedule(step - 1))})
        losses = {name: scalars.get(f"{name}/loss") for name in students}
        bar.set_postfix({name: value for name, value in losses.items() if value is not None})

    def evaluate(due: Sequence[Eval], step: int) -> None:
        for each in due:
            writer.write(step, {f"{each.name}/{k}": v for k, v in each.run(step, state).items()})

    try:
        if start:  # what was due at the step this run resumes from, and may have been killed
            evaluate(evals_due(evals, start, config.total_steps), start)
        for step in range(start, end):
            chosen = resolutions.choose(config.seed, step, config.student_resolutions, pipeline.teacher_sizes(config))
            state, metrics = steps[chosen](state, next(batches), teachers.variables, statistics_arrays)
            running.add(metrics)
            if step > start and step % config.log_every == 0:
                log(step, running.pop() | batches.broken(before=step))
            done = step + 1
            bar.update()
            due = evals_due(evals, done, config.total_steps)
            if due or done == end or done % config.log_every == done % config.checkpoint.save_every == 0:
                # what the next step would log: a run that is killed once this one is saved would lose the line
                log(done, running.pop(final=True) | batches.broken(before=done))
            saver.save(done, state, statistics_arrays, teachers.chains, manifest, force=done == end or bool(due))
            if due:  # saved first: a run that is killed while evaluating loses nothing
                saver.wait()
                evaluate(due, done)
    finally:
        bar.close()
        batches.close()
        writer.close()
        saver.close()
    return state


def check_evals(evals: Sequence[Eval], log_every: int) -> None:
    """Evaluations fall on steps that are logged, so that they move no line of the loss curve.

    Raises:
      ValueError: names the evaluation and the fix.
    """
    for each in evals:
        if each.every < 1 or each.every % log_every:
            raise ValueError(f"evals.{each.name}.every must be a multiple of log_every ({log_every}), got {each.every}")


def evals_due(evals: Sequence[Eval], step: int, total_steps: int) -> list[Eval]:
    """The evaluations that run after `step` steps."""
    return [each for each in evals if step % each.every == 0 or step == total_steps]


# Fields that change what is computed by rounding at most: a resumed run may differ in them. The GELU of teachers is
# none of them: it moves the targets.
FREE_FIELDS = (
    "log_every", "checkpoint", "data.threads", "data.workers", "data.max_broken_fraction", "mesh", "evals",
    "accumulate", "compute.attention", "compute.async_collectives",
)  # fmt: skip


def check_workdir(workdir: epath.Path, config: ConfigDict) -> None:
    """Refuses a workdir that holds a run of another config.

    Raises:
      ValueError: lists every field that differs.
    """
    path = workdir / "config.json"
    if path.exists():
        wanted = json.loads(json.dumps(config.to_dict()))
        differences = list(_differences(json.loads(path.read_text()), wanted))
        if differences:
            raise ValueError(
                f"{workdir} holds a run of another config; choose another workdir or go back to: "
                + "; ".join(f"{field}={old!r} (now {new!r})" for field, old, new in differences)
            )


def check_data(workdir: epath.Path, facts: Mapping[str, Mapping]) -> None:
    """Refuses data that another host, or the run in this workdir so far, does not see: another number of records is
    another order.

    Raises:
      ValueError: names the hosts, or the sources and what changed.
    """
    digest = np.frombuffer(hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest(), np.uint8)
    hosts = process_allgather(digest).reshape(-1, digest.size)
    if others := np.flatnonzero(np.any(hosts != hosts[0], axis=1)).tolist():
        raise ValueError(f"hosts {others} see other data than host 0: give all hosts the same files; here: {facts}")
    path = workdir / "data.json"
    if path.exists() and (differences := list(_differences(json.loads(path.read_text()), facts, "data."))):
        raise ValueError(
            f"{workdir} holds a run on other data: bring it back, or choose another workdir: "
            + "; ".join(f"{field} was {old!r}, not {new!r}" for field, old, new in differences)
        )


def _record(path: epath.Path, value: Mapping) -> None:
    """Writes JSON, atomically."""
    partial = path.parent / f".{path.name}.partial"
    partial.write_text(json.dumps(value, indent=2))
    partial.replace(path)


def _differences(old: object, new: object, prefix: str = ""):
    if prefix.rstrip(".") in FREE_FIELDS:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{prefix}{key}.")
    elif old != new:
        yield prefix.rstrip("."), old, new
