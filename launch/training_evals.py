"""The evaluations that a recipe asks for inside training (`config.evals`), as the loop takes them."""

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from eupe_jax.evals import registry, report
from eupe_jax.evals.encoders import FlaxEncoder
from eupe_jax.models import zoo
from eupe_jax.sharding.mesh import replicated
from eupe_jax.training.checkpoints import versions
from eupe_jax.training.encoders import LoadedEncoder
from eupe_jax.training.loop import Eval
from launch.load_any import with_teachers

FIELDS = {"eval", "data", "every", "settings", "teachers"}


def training_evals(config: ConfigDict, workdir: epath.PathLike) -> list[Eval]:
    """Reads and checks the data of every entry of `config.evals` now, so that nothing fails after hours.

    Results go to `workdir/evals/NAME/STUDENT/STEP`, their scalars and pictures to the run's own loggers as well. On
    several hosts the first one evaluates, on its own devices, while the others wait.

    Raises:
      ValueError, OSError: unknown evaluation, field or setting; data missing or broken.
    """
    return [_Evaluation(name, entry, config, epath.Path(workdir)).as_eval() for name, entry in config.evals.items()]


def _whole(tree: Any) -> Any:
    """The arrays uncut, on every device of the mesh they lie on."""
    mesh = jax.tree.leaves(tree)[0].sharding.mesh  # the run's own: the order of its devices is a matter of the torus
    return jax.jit(_same, out_shardings=replicated(mesh))(tree)


def _same(tree: Any) -> Any:
    return tree


class _Evaluation:
    def __init__(self, name: str, entry: ConfigDict, config: ConfigDict, workdir: epath.Path) -> None:
        if set(entry) - FIELDS or not {"eval", "data", "every"} <= set(entry):
            raise ValueError(f"evals.{name} takes the fields {sorted(FIELDS)}, got {sorted(entry)}")
        if not Path(entry.data).exists():
            raise ValueError(f"evals.{name}: no such folder: {entry.data}")
        self.name, self.entry, self.config, self.folder = name, entry, config, workdir / "evals" / name
        self.workdir = workdir
        self.module = registry.evaluation(entry.eval)
        self.settings = registry.settings(entry.eval, dict(entry.get("settings", {})))
        self.data = self.module.load(Path(entry.data), self.settings)
        if entry.get("teachers"):
            self.data = with_teachers(self.data, entry.teachers.to_dict())

    def as_eval(self) -> Eval:
        return Eval(self.name, self.entry.every, self.run)

    def run(self, step: int, state: dict) -> dict[str, float | np.ndarray]:
        """{"STUDENT/NAME": scalar or picture} on the first host."""
        found: dict[str, float | np.ndarray] = {}
        for student in self.config.students:
            params = state["students"][student]
            held = {"params": params["params"]["backbone"], "buffers": params["buffers"]}
            variables = jax.device_get(_whole(held))  # every host takes part
            if jax.process_index() == 0:
                measured = self._measure(step, student, variables)
                found |= {f"{student}/{key}": value for key, value in measured.items()}
        return found

    def _measure(self, step: int, student: str, variables: dict) -> dict[str, float | np.ndarray]:
        encoder = self._encoder(student, variables)
        folder = self.folder / student / str(step)
        header = {
            "eval": self.entry.eval,
            "encoder": encoder.name,
            "checkpoint": str(self.workdir),
            "step": step,
            "fingerprint": encoder.fingerprint,
            "data": str(Path(self.entry.data).resolve()),
            "settings": dataclasses.asdict(self.settings),
            "teachers": ConfigDict(self.entry.get("teachers", {})).to_dict(),
        }
        found = report.read(folder)
        if found is not None and report.same(found, header):
            return {**report.pictures(folder), **found["metrics"]}
        # What a killed evaluation left, to go on from; nothing that a finished one needs.
        remote = "://" in str(folder)
        work = Path(tempfile.mkdtemp(prefix="evaluation_")) if remote else Path(folder) / "work"
        done = False
        try:
            result = self.module.run(encoder, self.data, self.settings, workdir=work)
            report.write(folder, result, header | {"versions": versions()}, step)
            done = True
        finally:
            if remote or done:
                shutil.rmtree(work, ignore_errors=True)
        return {**result.images, **result.metrics}

    def _encoder(self, student: str, variables: dict) -> FlaxEncoder:
        entry = self.config.students[student]
        spec = zoo.spec(entry.model, **entry.overrides)
        module = zoo.build(entry.model, dtype=jnp.float32, **entry.overrides)
        described = {"model": entry.model, "resolution": max(self.config.student_resolutions)}
        described |= {"mean": list(spec.mean), "std": list(spec.std)}
        loaded = LoadedEncoder(entry.model, entry.overrides.to_dict(), module, variables, described, student)
        return FlaxEncoder(loaded, name=student, checkpoint=str(self.workdir), student=student)
