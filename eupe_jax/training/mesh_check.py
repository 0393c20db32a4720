"""Whether a config fits a mesh: seen before anything is loaded or compiled."""

import math
from collections.abc import Iterator

from jax.sharding import Mesh
from ml_collections import ConfigDict

from eupe_jax.models import zoo
from eupe_jax.sharding.mesh import BATCH_AXES, data_shards, nearest_divisors


def check_mesh(config: ConfigDict, mesh: Mesh, processes: int) -> None:
    """Batch, heads, convolutions and hosts against the axes of `mesh` (`make_mesh` has seen to the devices).

    processes: hosts that bring images.

    Raises:
      ValueError: names the field, its value and the nearest that works.
    """
    tensor, shards = mesh.shape["tensor"], data_shards(mesh)
    heads = dict(_heads(config))
    unfit = {name: count for name, count in heads.items() if count % tensor}
    if unfit:
        models = ", ".join(f"{name} ({count})" for name, count in unfit.items())
        common = math.gcd(mesh.size, *heads.values())
        works = max(n for n in range(1, common + 1) if common % n == 0 and n <= tensor)
        raise ValueError(
            f"mesh.tensor={tensor} does not divide the heads of {models}: set --config.mesh.tensor={works}"
        )
    if processes > shards:
        works = max(n for n in range(1, tensor + 1) if tensor % n == 0 and shards * tensor // n >= processes)
        raise ValueError(
            f"{processes} hosts, but the batch is cut into only {shards} ({_cuts(mesh)}), and each host brings images "
            f"of its own: lower mesh.tensor={tensor} to --config.mesh.tensor={works}"
        )
    batch, parts = config.batch_size, config.accumulate
    if batch % shards:
        raise ValueError(
            f"batch_size={batch} does not divide over the {shards} devices that cut it ({_cuts(mesh)}): set "
            f"--config.batch_size to {_nearest_multiples(batch, shards * parts)}"
        )
    if batch % (shards * parts):
        raise ValueError(
            f"accumulate={parts} does not divide the {batch // shards} images of each device (batch_size={batch} over "
            f"{_cuts(mesh)}): set --config.accumulate to {nearest_divisors(parts, batch // shards)}, or "
            f"--config.batch_size to {_nearest_multiples(batch, shards * parts)}"
        )
    if tensor > 1 and (grouped := list(_grouped_convolutions(config))):
        raise ValueError(
            f"mesh.tensor={tensor} makes the gradients of {', '.join(grouped)} wrong: XLA sums those of grouped "
            "convolutions over devices that share an image, too. Set --config.mesh.tensor=1, or overrides.depthwise of "
            "these students to 'matmul'"
        )


def _heads(config: ConfigDict) -> Iterator[tuple[str, int]]:
    """(field, attention heads) of every model that runs on the mesh and has any."""
    for group in ("students", "teachers"):
        for name, entry in config[group].items():
            if entry.get("kind", "encoder") == "encoder":
                module = zoo.build(entry.model, **entry.overrides)
                if heads := getattr(module, "num_heads", None):
                    yield f"{group}.{name}", heads


def _grouped_convolutions(config: ConfigDict) -> Iterator[str]:
    """Fields of students that train XLA's grouped convolutions.

    Its partitioner (jaxlib 0.10.2) sums the gradient of such a kernel over all devices, also over those that hold the
    same images: it comes out `tensor` times too large.
    """
    for name, entry in config.students.items():
        if getattr(zoo.build(entry.model, **entry.overrides), "depthwise", None) == "conv":
            yield f"students.{name}"


def _cuts(mesh: Mesh) -> str:
    return " x ".join(f"{axis} {mesh.shape[axis]}" for axis in BATCH_AXES)


def _nearest_multiples(number: int, of: int) -> str:
    below, above = number // of * of, -(-number // of) * of
    return f"{below} or {above}" if below else str(above)
