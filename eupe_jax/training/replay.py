"""One step of a run, run again exactly as it was: from the newest checkpoint before it, on the run's own data.

The steps are those of the training loop: the same programs, so the same bits on as many devices of the same kind.
Nothing is written into the run's folder.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from eupe_jax.sharding.mesh import replicated
from eupe_jax.sharding.rules import shardings
from eupe_jax.training import assemble, checkpoints, diagnosis, loop, pipeline, program, workdirs
from eupe_jax.training.distributed import is_main


@dataclass(frozen=True)
class Replayed:
    """A step (0-based) that was run again.

    start: the step that it was restored at. described: see `pipeline.Data.describe`. metrics: as the step gave them.
    gradients: {student: {parameter: norm}}. first: what was first not finite, in words; None where all is finite.
    batch: what the step saw, arrays on the mesh.
    """

    step: int
    start: int
    described: dict
    metrics: dict[str, float]
    gradients: dict[str, dict[str, float]]
    first: str | None
    batch: dict


def replay(workdir: epath.PathLike, step: int) -> Replayed:
    """Runs step `step` (0-based) of the run in `workdir` again; all of its hosts must call it alike.

    Raises:
      FileNotFoundError: there is no run. ValueError: the run has no such step, its data or its statistics are not there
        any more, or the checkpoint does not fit. CorruptCheckpoint: its files are not those that were written.
    """
    workdir = checkpoints.absolute(workdir)
    config = read_config(workdir)
    if not 0 <= step < config.total_steps:
        raise ValueError(f"--step={step} is no step of {workdir}: its steps are 0 to {config.total_steps - 1}")
    config.checkpoint.keep_best = 0  # no evaluation is run, and nothing is saved
    config, mesh = loop.check_run(config, workdir, [])
    data = pipeline.Data(config)
    workdirs.check_data(workdir, data.facts)
    teachers = assemble.load_teachers(config, mesh)
    found = assemble.find_statistics(config, teachers.by_name)
    arrays = {name: each.arrays() for name, each in found.items()}
    start, state = restore(workdir, config, teachers, mesh, step)
    if start:
        workdirs.check_statistics(workdir / "checkpoints" / str(start), arrays)
    statistics = jax.device_put(arrays, replicated(mesh))

    students = assemble.make_students(config, teachers.by_name, mesh)
    steps = program.make_steps(config, students, teachers.by_name, mesh, shardings(state, mesh))
    steps = {chosen: steps[chosen] for chosen in loop.pairs_ahead(config, start, step + 1)}
    arguments = (state, program.abstract_batch(config, teachers.by_name, mesh), teachers.variables, statistics)
    steps = program.compile_steps(steps, arguments, progress=is_main())
    with contextlib.closing(data.batches(teachers.hosts, mesh, start_step=start)) as batches:
        for number in tqdm(range(start, step), desc="steps before it", disable=not is_main()):
            state, _ = steps[loop.drawn(config, number)](state, next(batches), teachers.variables, statistics)
        batch = next(batches)
    before = jax.tree.map(jnp.copy, state)  # the step takes its memory
    _, metrics = steps[loop.drawn(config, step)](state, batch, teachers.variables, statistics)
    metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    taken_apart = (config, before, step, batch, teachers, statistics, mesh)
    gradients = diagnosis.gradient_norms(*taken_apart)
    first = None if all(map(math.isfinite, metrics.values())) else diagnosis.first_not_finite(*taken_apart)
    return Replayed(step, start, data.describe(step), metrics, gradients, first, batch)


def read_config(workdir: epath.Path) -> ConfigDict:
    """The config that a run wrote down.

    Raises:
      FileNotFoundError: there is none. ValueError: it is damaged.
    """
    path = workdir / workdirs.CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{workdir} holds no run ({workdirs.CONFIG} is missing)")
    try:
        return ConfigDict(_tuples(json.loads(path.read_text())))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): a checkpoint's manifest holds the same config") from None


def _tuples(value: Any) -> Any:
    """JSON has lists only; configs hold tuples."""
    if isinstance(value, dict):
        return {key: _tuples(each) for key, each in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def restore(
    workdir: epath.Path, config: ConfigDict, teachers: assemble.Teachers, mesh: Mesh, step: int
) -> tuple[int, dict]:
    """The newest state of the run before `step`, and how many steps had made it; the first one where there is none."""
    students = assemble.make_students(config, teachers.by_name, mesh)
    folder = workdir / "checkpoints"
    saved = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []
    finished = [number for number in saved if number <= step and (folder / str(number) / checkpoints.MANIFEST).exists()]
    if not finished:
        return 0, assemble.init_state(config, students, mesh)
    number = max(finished)
    shapes = jax.eval_shape(lambda: assemble.fresh_state(config, students))
    target = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings(shapes, mesh)
    )
    state = {"step": jax.device_put(np.int32(number), replicated(mesh)), "students": {}}
    for name, student in target["students"].items():
        parts = {
            "backbone": {"params": student["params"]["backbone"], "buffers": student["buffers"]},
            "adapters": student["params"]["adapters"],
            "optimizer": student["optimizer"],
        }
        held = {k: checkpoints.restore_item(folder / str(number), f"{name}.{k}", v) for k, v in parts.items()}
        params = {"backbone": held["backbone"]["params"], "adapters": held["adapters"]}
        buffers = held["backbone"]["buffers"]
        state["students"][name] = {"params": params, "buffers": buffers, "optimizer": held["optimizer"]}
    return number, state


def in_lines(found: Replayed, shown: int = 12) -> Iterator[str]:
    """A report for a person: `shown` gradients of each student, and at most 64 records of each source."""
    described = found.described
    yield f"step {found.step}, run again from step {found.start}: pair {described['pair']}, seed {described['seed']}"
    for source, records in described["records"].items():
        more = f" and {len(records) - 64} more" if len(records) > 64 else ""
        yield f"records of {source}: {', '.join(map(str, records[:64]))}{more}"
    for name, value in found.metrics.items():
        yield f"{name}: {value!r}"
    for student, norms in found.gradients.items():
        yield f"largest gradients of {student}:"
        for path, norm in sorted(norms.items(), key=lambda item: -_rank(item[1]))[:shown]:
            yield f"  {norm:.6g}  {path}"
    if found.first is not None:
        yield f"first not finite: {found.first}"


def _rank(norm: float) -> float:
    return norm if math.isfinite(norm) else math.inf


def arrays_of(batch: Mapping) -> dict[str, np.ndarray]:
    """A batch as flat arrays, whole on every host: {"image", "index", "features/TEACHER/KIND"}."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(process_allgather(leaf, tiled=True))
        for path, leaf in leaves
    }
