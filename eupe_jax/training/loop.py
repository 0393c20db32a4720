"""One training run, top to bottom. The same lines serve all three stages: only the config differs."""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from eupe_jax.distill import resolutions
from eupe_jax.distill.teachers import Teacher
from eupe_jax.files import write_whole
from eupe_jax.sharding.mesh import make_mesh, replicated
from eupe_jax.sharding.rules import shardings
from eupe_jax.training import assemble, best, diagnosis, kernels, loggers, pipeline, program, summary, workdirs
from eupe_jax.training.checkpoints import Checkpoints, abstract, read_manifest
from eupe_jax.training.distributed import is_main
from eupe_jax.training.divergence import ReplicaCheck
from eupe_jax.training.health import Diverged, Health
from eupe_jax.training.mesh_check import check_mesh
from eupe_jax.training.metrics import MetricWriter, RunningMetrics
from eupe_jax.training.model_flops import step_flops
from eupe_jax.training.optimizer import make_schedule
from eupe_jax.training.preemption import Preempted, Preemption, is_lost
from eupe_jax.training.profiling import Profiler
from eupe_jax.training.timing import Timing
from eupe_jax.training.watchdog import Watchdog

LOGGER = logging.getLogger(__name__)

SINCE_LOG = "since_log"  # in the manifest of a checkpoint: what stands in no line of metrics.jsonl yet
ON_CORRUPT = ("stop", "fallback")


@dataclass(frozen=True)
class Eval:
    """Something to run inside training: `run(step, state) -> {name: scalar or picture}`, every `every` steps and at the
    end. Pictures, uint8 RGB [H, W, 3], go to the run's loggers alone.

    It must leave `state` as it is, and give the same scalars when it is run again on the same state: a run that is
    killed while evaluating evaluates again when it resumes.
    """

    name: str
    every: int
    run: Callable[[int, dict], dict[str, float | np.ndarray]]


def train(
    config: ConfigDict,
    workdir: epath.PathLike,
    *,
    evals: Sequence[Eval] = (),
    stop_at: int | None = None,
    profile: tuple[int, int] | None = None,
    on_corrupt: str = "stop",
    preemption: Preemption | None = None,
) -> dict:
    """Trains until `config.total_steps`, resuming from the newest checkpoint in `workdir`; returns the final state.

    Args:
      stop_at: stop early after this step, with a checkpoint, without changing the schedule; run again to go on.
      profile: (first, last) step to trace into `workdir/profile`.
      on_corrupt: what to do where the newest checkpoint is damaged, one of ON_CORRUPT: "stop", or "fallback": put it
        aside and go on from the newest intact one.
      preemption: what listens for the notice that this machine is being taken away; without it SIGTERM just ends it.

    Raises:
      ValueError, OSError: bad config, data, statistics, checkpoint or workdir, before anything is trained.
      Preempted: the notice came; the state is saved, and the same call goes on from it.
    """
    preemption = preemption or Preemption()  # never opened, it hears nothing
    with contextlib.ExitStack() as opened:
        state = _train(opened, config, epath.Path(workdir), evals, stop_at, profile, on_corrupt, preemption)
    sync_global_devices("trained")  # whoever leaves early would not wait for the one that evaluates
    return state


def _train(
    opened: contextlib.ExitStack,
    config: ConfigDict,
    workdir: epath.Path,
    evals: Sequence[Eval],
    stop_at: int | None,
    profile: tuple[int, int] | None,
    on_corrupt: str,
    preemption: Preemption,
) -> dict:
    """`train`; `opened` closes what it opens."""
    # ---- where the run lives
    if on_corrupt not in ON_CORRUPT:
        raise ValueError(f"on_corrupt is {on_corrupt!r}: use one of {', '.join(ON_CORRUPT)}")
    config, mesh = check_run(config, workdir, evals)
    data = pipeline.Data(config)
    workdirs.check_data(workdir, data.facts)
    workdir.mkdir(parents=True, exist_ok=True)

    # ---- who teaches, and on what scale
    teachers = assemble.load_teachers(config, mesh)
    statistics = assemble.find_statistics(config, teachers.by_name)
    statistics_arrays = {name: s.arrays() for name, s in statistics.items()}

    # ---- who learns, from where
    students = assemble.make_students(config, teachers.by_name, mesh)
    state = assemble.init_state(config, students, mesh)
    saver = Checkpoints(workdir, config.checkpoint)
    _close_at_end(opened, saver)
    restored = saver.restore_latest(state, fallback=on_corrupt == "fallback")
    if restored is not None:
        state = restored
        LOGGER.info("resumed from step %d", int(state["step"]))
        workdirs.check_statistics(saver.directory / str(int(state["step"])), statistics_arrays)
    manifest = assemble.manifest(config, teachers, statistics)
    start, end = int(state["step"]), config.total_steps if stop_at is None else min(config.total_steps, stop_at)
    profiler = Profiler(profile, workdir / "profile", start=start, end=end)
    for line in summary.describe_run(config, mesh, state, teachers.variables):
        LOGGER.info(line)

    # ---- the step, compiled for every combination of resolutions to come, before data take memory
    placed_statistics = jax.device_put(statistics_arrays, replicated(mesh))
    steps = program.make_steps(config, students, teachers.by_name, mesh, shardings(state, mesh))
    coming = pairs_ahead(config, start, end)
    batch = program.abstract_batch(config, teachers.by_name, mesh)
    arguments = (abstract(state), batch, teachers.variables, placed_statistics)
    steps = program.compile_steps({chosen: steps[chosen] for chosen in coming}, arguments, progress=is_main())
    for chosen, step in steps.items():
        LOGGER.info("%s: %s", chosen, summary.describe_memory(step, mesh.devices.flat[0]))
    schedule = make_schedule(config.optimizer, config.batch_size, config.total_steps)
    rates = np.asarray(schedule(np.arange(config.total_steps)))  # all at once: devices will have a step under way
    flops = count_flops(config, coming, teachers.by_name)

    # ---- what it sees
    batches = data.batches(teachers.hosts, mesh, start_step=start)
    _close_at_end(opened, batches)

    if is_main():
        write_whole(workdir / workdirs.CONFIG, json.dumps(config.to_dict(), indent=2))
        write_whole(workdir / workdirs.DATA, json.dumps(data.facts, indent=2))

    # ---- the loop: metrics are read a step late, so the host runs ahead of the devices
    replicas = ReplicaCheck(mesh)
    health = Health(workdir, config, data.describe, enabled=is_main())
    running = RunningMetrics(read_manifest(saver.directory / str(start)).get(SINCE_LOG) if start else None)
    shown = {"names": config.loggers, "config": config.to_dict()}
    writer = MetricWriter(workdir, resume_step=start, enabled=is_main(), **shown)
    for each in (profiler, writer):
        _close_at_end(opened, each)
    if not start:
        writer.begin(config.to_dict(), statistics_arrays)
    bar = tqdm(total=config.total_steps, initial=start, unit="step", disable=not is_main(), desc=workdir.name)
    _close_at_end(opened, bar)
    timing = Timing(config.batch_size, flops, mesh.devices.flatten().tolist())
    watchdog = opened.enter_context(Watchdog(config.faults.stall_factor))

    def log(step: int, *, final: bool = False) -> None:
        with timing.part("log"):
            running.count(batches.broken(before=step))
        with timing.part("wait"):
            scalars = running.pop(final=final)
        if not scalars:  # logged just before a save
            return
        times = timing.pop()
        with timing.part("log"):
            writer.write(step, scalars | {"learning_rate": float(rates[step - 1])})
            writer.write_timings(step, times)
            losses = {name: scalars.get(f"{name}/loss") for name in students}
            bar.set_postfix({name: value for name, value in losses.items() if value is not None} | in_short(times))

    def save(step: int, *, wait: bool) -> None:
        if step % config.log_every == 0 or step == config.total_steps:
            # what the next step would log: a run that is killed once this one is saved would lose the line
            log(step, final=True)
        with timing.part("save"), watchdog.paused():
            health.check(final=True)
            running.count(batches.broken(before=step))
            unlogged = {SINCE_LOG: running.unlogged()}
            saver.save(step, state, statistics_arrays, teachers.chains, manifest | unlogged, force=True)
            if wait:
                saver.wait()

    def evaluate(due: Sequence[Eval], step: int) -> None:
        with timing.part("eval"), watchdog.paused(), preemption.nothing_to_save():
            for each in due:
                found = {f"{each.name}/{k}": v for k, v in each.run(step, state).items()}
                pictures = {k: v for k, v in found.items() if getattr(v, "ndim", 0) == 3}
                scalars = {k: v for k, v in found.items() if k not in pictures}
                writer.pictures(step, pictures)
                writer.write(step, scalars)
                saver.note(step, scalars)
            sync_global_devices(f"evaluated step {step}")  # else the others would wait for the first one in a step

    def first_not_finite(step: int) -> str:
        with watchdog.paused(), contextlib.closing(data.batches(teachers.hosts, mesh, start_step=step)) as again:
            return diagnosis.first_not_finite(config, state, step, next(again), teachers, placed_statistics, mesh)

    if start and (due := evals_due(evals, start, config.total_steps)):  # it may have been killed
        evaluate(due, start)
    opened.enter_context(_diagnosed(first_not_finite))
    opened.enter_context(preemption.something_to_save())
    for step in range(start, end):
        chosen, done = drawn(config, step), step + 1
        if profiler.begins(done):
            with timing.part("profile"):
                profiler.start(state)
        with timing.part("data"):
            batch = next(batches)
        with timing.part("dispatch"), profiler.step(done):
            state, metrics = steps[chosen](state, batch, teachers.variables, placed_statistics)
        health.add(step, metrics)
        with timing.part("wait"):
            running.add(metrics)
            health.check()
        if step > start and step % config.log_every == 0:
            log(step)
        timing.step(chosen)
        if profiler.ends(done):
            with timing.part("profile"):
                profiler.stop(state)
        bar.update()
        watchdog.stepped(done)
        if config.faults.fingerprint_every and done % config.faults.fingerprint_every == 0:
            with timing.part("wait"), watchdog.paused():
                replicas.check(done, {"students": state["students"], "teachers": teachers.variables})
        leaving = preemption.requested(done) and done < end
        due = evals_due(evals, done, config.total_steps)
        if leaving or due or done == end:  # saved before it evaluates: a run that is killed while it does loses nothing
            save(done, wait=True)
        elif done % config.checkpoint.save_every == 0:
            save(done, wait=False)
        else:
            saver.check()
        if leaving:
            raise Preempted(f"{workdir} is saved at step {done}", preemption.again)
        if due:
            evaluate(due, done)
    return state


@contextlib.contextmanager
def _diagnosed(first_not_finite: Callable[[int], str]) -> Iterator[None]:
    """Adds to `Diverged` what was not finite first, where that can be found out."""
    try:
        yield
    except Diverged as error:
        try:
            words = first_not_finite(error.step)
        except Exception as another:  # it takes more memory than a step: nothing of it may hide the error
            LOGGER.warning("what was not finite first is unknown: %s: %s", type(another).__name__, another)
            raise error from None
        raise Diverged(f"{error}; first: {words}", error.step, error.students) from None


def _close_at_end(opened: contextlib.ExitStack, each: Any) -> None:
    """Closes it when `opened` ends; an error of doing so never hides the one that ended the run."""

    def close(_kind: object, error: BaseException | None, _traceback: object) -> None:
        if jax.process_count() > 1 and is_lost(error):
            return  # another process has gone: some would wait for it
        try:
            each.close()
        except Exception as another:
            if error is None:
                raise
            LOGGER.warning("closing after an error: %s: %s", type(another).__name__, another)

    opened.push(close)


def check_run(
    config: ConfigDict, workdir: epath.Path, evals: Sequence[Eval], *, fresh: bool = False
) -> tuple[ConfigDict, Mesh]:
    """What can be seen to be wrong before anything is made, loaded or compiled. fresh: whatever the workdir holds.

    Returns:
      The config as its `config.json` has it, with `compute.teacher_gelu` as it is on these chips, and the mesh.

    Raises:
      ValueError: names the field and the fix. ImportError: a logger's package is missing.
    """
    pipeline.check_config(config)
    check_evals(evals, config.log_every)
    best.check_settings(config.checkpoint, [each.name for each in evals])
    loggers.check(config.loggers)
    mesh = make_mesh(**config.mesh)
    check_mesh(config, mesh, jax.process_count())
    config = config.copy_and_resolve_references()
    config.compute.teacher_gelu = kernels.teacher_gelu(config.compute, mesh)
    if not fresh:
        workdirs.check(workdir, config)
    return config, mesh


def drawn(config: ConfigDict, step: int) -> resolutions.Resolutions:
    """The combination of resolutions of a step."""
    return resolutions.choose(config.seed, step, config.student_resolutions, pipeline.teacher_sizes(config))


def pairs_ahead(config: ConfigDict, start: int, end: int) -> list[resolutions.Resolutions]:
    """The combinations of resolutions that the steps from `start` to `end` draw; the same on every host."""
    every, found = pipeline.every_pair(config), set()
    for step in range(start, end):
        found.add(drawn(config, step))
        if len(found) == len(every):
            break
    return [chosen for chosen in every if chosen in found]


def count_flops(
    config: ConfigDict, coming: Sequence[resolutions.Resolutions], teachers: Mapping[str, Teacher]
) -> dict[resolutions.Resolutions, int] | None:
    """Model FLOPs of one image at each combination; None, with a warning, where an encoder cannot be counted."""
    try:
        return {chosen: step_flops(config, chosen, teachers).per_image for chosen in coming}
    except ValueError as error:
        LOGGER.warning("no MFU: %s", error)
        return None


def in_short(times: Mapping[str, float]) -> dict[str, str]:
    """What of `Timing.pop` stands in the bar."""
    forms = {"images_per_s": ("img/s", "{:.4g}"), "mfu": ("MFU", "{:.1%}"), "tflops_per_device": ("TFLOP/s", "{:.3g}")}
    found = {form: times.get(f"performance/{name}") for name, form in forms.items()}
    return {label: form.format(value) for (label, form), value in found.items() if value is not None}


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
