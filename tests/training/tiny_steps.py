"""One step of a tiny run with real parts, without a loop around it."""

import jax
import numpy as np

from eupe_jax.sharding.mesh import make_mesh
from eupe_jax.sharding.rules import shardings
from eupe_jax.training import assemble, pipeline, program


class TinyRun:
    """The parts of a config on the first `devices` devices. Statistics are zeros and ones."""

    def __init__(self, config, devices=2):
        self.config = config
        self.mesh = make_mesh(**config.mesh, devices=jax.devices()[:devices])
        loaded = assemble.load_teachers(config, self.mesh)
        self.teachers, self.variables = loaded.by_name, loaded.variables
        self.students = assemble.make_students(config, self.teachers, self.mesh)
        self.statistics = {
            name: {"mean": {k: np.zeros(n, np.float32) for k, n in teacher.out_dims.items()},
                   "std": {k: np.ones(n, np.float32) for k, n in teacher.out_dims.items()}}
            for name, teacher in self.teachers.items()
        }  # fmt: skip

        self._state = assemble.init_state(config, self.students, self.mesh)
        batches = pipeline.batches(config, {}, self.mesh, start_step=0)
        self.batch = next(batches)
        batches.close()

    def state(self):
        """A copy of the fresh one: steps use its memory again."""
        return jax.tree.map(lambda x: jax.device_put(np.asarray(x), x.sharding), self._state)

    def arguments(self):
        return self.state(), self.batch, self.variables, self.statistics

    def steps(self):
        """Of the config as it now is."""
        placed = shardings(self._state, self.mesh)
        return program.make_steps(self.config, self.students, self.teachers, self.mesh, placed)


def first_moments(state, student):
    """Adam's first moments after one step from zeros: a tenth of the gradients, clipped. Flat, as one vector."""
    found = [
        np.ravel(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(state["students"][student]["optimizer"]))
        if any(getattr(p, "name", "") == "mu" for p in path)
    ]
    return np.concatenate(found)
