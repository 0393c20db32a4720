"""The device mesh: a data axis over everything, an FSDP axis inside it, and a tensor axis inside that."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")  # the busier an axis, the later: neighbours on the network come last
BATCH_AXES = ("data", "fsdp")  # what cuts a batch; devices along `tensor` share their images


def make_mesh(fsdp: int = 1, tensor: int = 1, *, slices: int = 0, devices: Sequence | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over all devices; `data` takes what the others leave.

    Several slices (TPU pods joined by a data-centre network) are the outer part of `data`: only the gradients' sum
    ever crosses between them.

    Args:
      slices: 0 takes what TPUs say of themselves, and one for other devices; GPUs and simulated devices are cut into
        that many runs of neighbours.
      devices: those of this run by default; those of `jax.experimental.topologies` serve as well.

    Raises:
      ValueError: names the field of `config.mesh` that does not divide.
    """
    devices = list(jax.devices() if devices is None else devices)
    pieces = _slices(devices, slices)
    inside = len(pieces[0])
    each = f"the {inside} device(s) of " + ("each slice" if len(pieces) > 1 else "this run")
    for field, size, room in (("tensor", tensor, inside), ("fsdp", fsdp, inside // max(tensor, 1))):
        if size < 1 or room % size:
            left = f", of which tensor={tensor} leaves {room}" if field == "fsdp" and tensor > 1 else ""
            fit = nearest_divisors(size, room)
            raise ValueError(f"mesh.{field}={size} does not divide {each}{left}: set --config.mesh.{field} to {fit}")
    shape = (inside // (fsdp * tensor), fsdp, tensor)
    return Mesh(np.concatenate([_arrange(piece, shape) for piece in pieces]), AXES)


def _slices(devices: list, slices: int) -> list[list]:
    """The devices of every slice, in the order of the slices."""
    if devices[0].platform == "tpu":
        by_index: dict[int, list] = {}
        for device in devices:
            by_index.setdefault(getattr(device, "slice_index", 0), []).append(device)
        pieces = [by_index[index] for index in sorted(by_index)]
        if slices not in (0, len(pieces)):
            raise ValueError(f"mesh.slices={slices}, but these TPUs are {len(pieces)} slice(s): set it to 0")
        if len(sizes := {len(piece) for piece in pieces}) > 1:
            raise ValueError(f"slices of {sorted(sizes)} devices: all slices of a run must be of one size")
        return pieces
    slices = slices or 1
    if slices < 1 or len(devices) % slices:
        raise ValueError(
            f"mesh.slices={slices} does not divide the {len(devices)} device(s) of this run: set --config.mesh.slices "
            f"to {nearest_divisors(slices, len(devices))}"
        )
    size = len(devices) // slices
    return [devices[start : start + size] for start in range(0, len(devices), size)]


def _arrange(devices: list, shape: tuple[int, ...]) -> np.ndarray:
    """The devices of one slice in that shape, neighbours on its torus along the last axes."""
    if devices[0].platform == "cpu":
        return np.asarray(devices).reshape(shape)
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError) as error:
        named = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
        raise ValueError(f"{len(devices)} x {devices[0].device_kind} cannot be laid out as {named}: {error}") from None


def nearest_divisors(wanted: int, total: int) -> str:
    """ "4 or 8": the divisors of `total` below and above `wanted`."""
    divisors = [n for n in range(1, total + 1) if total % n == 0]
    below, above = [n for n in divisors if n < wanted][-1:], [n for n in divisors if n > wanted][:1]
    return " or ".join(map(str, below + above))


def data_shards(mesh: Mesh) -> int:
    """How many parts a batch is cut into."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis over all devices, but for those that share their images."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())
