"""The jitted steps of a run, made in one place: the training loop runs them, launch/plan.py compiles them for chips
that are not there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from eupe_jax.distill.resolutions import Resolutions
from eupe_jax.distill.step import Student
from eupe_jax.distill.teachers import Teacher
from eupe_jax.sharding.mesh import batch_sharding, replicated
from eupe_jax.sharding.rules import shardings
from eupe_jax.training import assemble, kernels, pipeline

Steps = dict[Resolutions, Any]  # jitted, or compiled


@dataclass(frozen=True)
class AbstractRun:
    """A run as shapes, types and shardings: nothing is loaded, nothing allocated.

    arguments: (state, batch, teacher variables, statistics) of a step, as ShapeDtypeStructs.
    """

    students: dict[str, Student]
    teachers: dict[str, Teacher]
    arguments: tuple[Any, Any, Any, Any]

    @property
    def state_shardings(self) -> Any:
        """The shardings of the state, as a tree like it."""
        return jax.tree.map(lambda x: x.sharding, self.arguments[0])


def abstract_run(config: ConfigDict, mesh: Mesh) -> AbstractRun:
    """Everything a step of this config takes, on this mesh; its devices need not exist.

    Checkpoints are not looked at: weights have the types and shardings that `assemble.load_teachers` gives them. Host
    teachers are opened, because only they know their widths; their features are part of the batch.

    Raises:
      ValueError: a field of the config is wrong, or a feature cache or host teacher does not open.
    """
    teachers = assemble.describe_teachers(config, mesh)
    students = assemble.make_students(config, teachers, mesh)
    variables = {
        name: assemble.abstract_variables(config.teachers[name])
        for name, teacher in teachers.items()
        if not teacher.is_host
    }
    state = jax.eval_shape(lambda: assemble.fresh_state(config, students))
    return AbstractRun(
        students,
        teachers,
        (
            _placed(state, shardings(state, mesh)),
            abstract_batch(config, teachers, mesh),
            _placed(variables, shardings(variables, mesh)),
            abstract_statistics(teachers, mesh),
        ),
    )


def abstract_batch(config: ConfigDict, teachers: Mapping[str, Teacher], mesh: Mesh) -> dict:
    """A global batch: {"image": uint8 [B, S, S, 3], "index": int32 [B]}, and the features of host teachers."""
    side, sharding = config.data.image_size, batch_sharding(mesh)

    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=sharding)

    batch = {"image": array(side, side, 3, dtype=jnp.uint8), "index": array(dtype=jnp.int32)}
    for name, teacher in teachers.items():
        if teacher.is_host:
            spec = teacher.spec
            tokens = {"patches": array(spec.grid, spec.grid, spec.patch_dim)}
            if spec.cls_dim is not None:
                tokens["cls"] = array(spec.cls_dim)
            batch.setdefault("features", {})[name] = tokens
    return batch


def abstract_statistics(teachers: Mapping[str, Teacher], mesh: Mesh) -> dict:
    """{teacher: {"mean": {kind: [D]}, "std": {kind: [D]}}}, on every device."""

    def vectors(widths: Mapping[str, int]) -> dict:
        return {k: jax.ShapeDtypeStruct((n,), jnp.float32, sharding=replicated(mesh)) for k, n in widths.items()}

    return {name: {"mean": vectors(t.out_dims), "std": vectors(t.out_dims)} for name, t in teachers.items()}


def _placed(tree: Any, sharding_tree: Any) -> Any:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, sharding_tree
    )


def make_steps(
    config: ConfigDict,
    students: Mapping[str, Student],
    teachers: Mapping[str, Teacher],
    mesh: Mesh,
    state_shardings: Any,
) -> Steps:
    """The jitted step of every choice of resolutions, `(state, batch, teacher variables, statistics) -> (state,
    metrics)`; the state's memory is used again."""
    return {
        chosen: jax.jit(
            pipeline.make_step(config, students, teachers, chosen, mesh),
            donate_argnums=0,
            out_shardings=(state_shardings, replicated(mesh)),
            compiler_options=kernels.compiler_options(config.compute, mesh),
        )
        for chosen in pipeline.every_pair(config)
    }


def trace_step(config: ConfigDict, mesh: Mesh, chosen: Resolutions) -> tuple[AbstractRun, jax.stages.Traced]:
    """The step of one choice of resolutions, to be lowered for the devices of `mesh`, which need not exist."""
    run = abstract_run(config, mesh)
    steps = make_steps(config, run.students, run.teachers, mesh, run.state_shardings)
    return run, steps[chosen].trace(*run.arguments)


def compile_steps(steps: Steps, arguments: tuple, *, progress: bool = True) -> Steps:
    """Compiles every step for these arguments (arrays, or their shapes), so that none waits in the middle of a run."""
    compiled = {}
    with tqdm(steps.items(), desc="compiling", unit="step", disable=not progress) as bar:
        for chosen, step in bar:
            bar.set_postfix_str(str(chosen))
            compiled[chosen] = step.lower(*arguments).compile()
    return compiled
