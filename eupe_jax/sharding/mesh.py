"""The device mesh: a data axis over everything, an FSDP axis inside it."""

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")


def make_mesh(fsdp: int = 1, devices: list | None = None) -> Mesh:
    """A (data, fsdp) mesh over all devices; `data` takes what `fsdp` leaves.

    Raises:
      ValueError: `fsdp` does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(
            f"mesh.fsdp={fsdp} does not divide the {len(devices)} device(s) of this run: set --config.mesh.fsdp"
        )
    shape = (len(devices) // fsdp, fsdp)
    if devices[0].platform == "cpu":
        return Mesh(np.asarray(devices).reshape(shape), AXES)
    return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis over every device."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
