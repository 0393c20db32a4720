"""Several teachers at once, as encoders to evaluate: those of a recipe, and those that a user names."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from eupe_jax.distill.host_teachers import HostTeacher
from eupe_jax.distill.teachers import Teacher
from eupe_jax.evals.encoders import HostEncoder
from eupe_jax.evals.interface import Encoder, Tokens
from eupe_jax.sharding.mesh import batch_sharding, make_mesh, replicated
from eupe_jax.training import assemble
from launch.load_any import load_any


class RecipeTeacher:
    """A teacher as a run uses it: its checkpoint, compute type and choice of class token; an `interface.Encoder`."""

    def __init__(
        self, teacher: Teacher, resolution: int, mesh: Mesh, variables: Mapping | None, host: HostTeacher | None
    ) -> None:
        spec = teacher.spec
        self.name, self.fingerprint, self.resolution = spec.name, spec.fingerprint, resolution
        self.cls_dim, self.patch_dim, self.patch_size = teacher.out_dims.get("cls"), spec.patch_dim, spec.stride
        self._teacher, self._mesh, self._variables = teacher, mesh, variables
        self._host = host and HostEncoder(host)
        self._apply = jax.jit(lambda v, images: teacher(v, images.astype(jnp.float32) / 255.0, images.shape[1]))

    def __call__(self, images_BxHxWx3: np.ndarray, *, key: jax.Array | None = None) -> Tokens:
        del key
        if self._host is not None:
            return self._teacher.targets(self._host(images_BxHxWx3))
        placed = replicated if len(images_BxHxWx3) % self._mesh.size else batch_sharding
        return self._apply(self._variables, jax.device_put(images_BxHxWx3, placed(self._mesh)))


def open_teachers(config: ConfigDict | None, named: Sequence[str], dtype: str = "float32") -> dict[str, Encoder]:
    """{name: teacher}: those of a run's config, then those that NAME=SOURCE texts name.

    Raises:
      ValueError, OSError, ImportError: fewer than two, a name twice, or one that cannot be loaded.
    """
    found = {} if config is None else _of_recipe(config)
    for text in named:
        name, equals, source = text.partition("=")
        if not name or not equals or not source:
            raise ValueError(f"--teachers {text!r}: expected NAME=CHECKPOINT or NAME=host:package.module:Class")
        if name in found:
            raise ValueError(f"--teachers {text!r}: there is a teacher {name!r} already; give this one another name")
        found[name] = load_any(source, dtype=dtype)
    if len(found) < 2:
        raise ValueError(
            f"a report is of two teachers or more, got {sorted(found)}: name a --config with several, or --teachers"
        )
    return found


def _of_recipe(config: ConfigDict) -> dict[str, Encoder]:
    config = config.copy_and_resolve_references()
    config.data.feature_cache = ""  # it holds augmented views, and not of these images
    mesh = make_mesh(**config.mesh, devices=jax.local_devices())
    loaded = assemble.load_teachers(config, mesh)
    sides = {name: max(entry.resolutions) for name, entry in config.teachers.items()}
    return {
        name: RecipeTeacher(teacher, sides[name], mesh, loaded.variables.get(name), loaded.hosts.get(name))
        for name, teacher in loaded.by_name.items()
    }
