"""An encoder to evaluate from whatever a user has of it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from eupe_jax.distill.host_teachers import load_host_teacher
from eupe_jax.evals.encoders import FlaxEncoder, HostEncoder, PteEncoder
from eupe_jax.evals.interface import Encoder
from eupe_jax.models import zoo
from eupe_jax.training import weight_files
from eupe_jax.training.encoders import LoadedEncoder, load_encoder


def load_any(source: str, student: str | None = None, model: str | None = None, dtype: str = "float32") -> Encoder:
    """The encoder that `source` names.

    Args:
      source: a checkpoint folder, a weights file, a .pte, "random:ZOO_NAME" or "host:package.module:Class".
      student: which one, where a checkpoint holds several.
      model: zoo name, for a weights file that does not say.
      dtype: compute type of a Flax encoder.

    Raises:
      ValueError, OSError, ImportError: nothing there, or not what it should be.
    """
    kind, _, rest = source.partition(":")
    if kind == "random":
        return untrained(rest, dtype)
    if kind == "host":
        return HostEncoder(load_host_teacher(rest))
    path = Path(source)
    if path.suffix == ".pte":
        return PteEncoder(path)
    if weight_files.is_weights(path):
        from convert import weights  # needs torch, which a training pod does not have

        loaded = weights.load(path, student, model)
        module = zoo.build(loaded.name, dtype=jnp.dtype(dtype), **loaded.overrides)
        return FlaxEncoder(dataclasses.replace(loaded, module=module), checkpoint=source)
    loaded = load_encoder(source, student, dtype=jnp.dtype(dtype))
    return FlaxEncoder(loaded, checkpoint=source, student=loaded.student)


def with_teachers(data: Any, teachers: Mapping[str, str], dtype: str = "float32") -> Any:
    """The data of an evaluation together with the experts it compares with: name -> source.

    Raises:
      ValueError: the evaluation takes no experts, or as `load_any`.
    """
    if "teachers" not in getattr(data, "__dataclass_fields__", ()):
        raise ValueError("this evaluation takes no teachers: similarity and zero_shot do")
    return dataclasses.replace(
        data, teachers={name: load_any(source, dtype=dtype) for name, source in teachers.items()}
    )


def untrained(name: str, dtype: str = "float32", seed: int = 0, **overrides: Any) -> FlaxEncoder:
    """An encoder of random weights: the floor that anything learned has to beat. overrides: of its constructor."""
    spec, module = zoo.spec(name, **overrides), zoo.build(name, dtype=jnp.dtype(dtype), **overrides)
    image = jnp.zeros((1, spec.resolution, spec.resolution, 3))
    variables = jax.jit(module.init)(jax.random.key(seed), image)
    described = {"model": name, "overrides": overrides, "resolution": spec.resolution}
    described |= {"mean": list(spec.mean), "std": list(spec.std)}
    return FlaxEncoder(LoadedEncoder(name, overrides, module, variables, described), name=f"{name} (untrained)")
