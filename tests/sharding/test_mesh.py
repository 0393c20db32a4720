import importlib.util
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from eupe_jax.sharding import mesh as mesh_module
from eupe_jax.sharding.chips import topology
from eupe_jax.sharding.mesh import AXES, batch_sharding, data_shards, make_mesh

DEVICES = len(jax.devices())


def ids(mesh) -> np.ndarray:
    return np.vectorize(lambda device: device.id)(mesh.devices)


def test_data_takes_what_the_other_axes_leave():
    assert dict(make_mesh().shape) == {"data": DEVICES, "fsdp": 1, "tensor": 1}
    mesh = make_mesh(2, 2)
    assert mesh.axis_names == AXES and dict(mesh.shape) == {"data": DEVICES // 4, "fsdp": 2, "tensor": 2}
    assert data_shards(mesh) == DEVICES // 2
    # devices along the tensor axis see the same images
    rows = {d: str(index) for d, index in batch_sharding(mesh).devices_indices_map((DEVICES,)).items()}
    assert all(len({rows[d] for d in group}) == 1 for group in mesh.devices.reshape(-1, 2))
    assert len(set(rows.values())) == DEVICES // 2


def test_slices_are_the_outer_part_of_data():
    devices = jax.devices()[:8]
    mesh = make_mesh(2, 2, slices=2, devices=devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    np.testing.assert_array_equal(ids(mesh).reshape(2, 4), [[d.id for d in devices[:4]], [d.id for d in devices[4:]]])


def tpu(index: int, slice_index: int) -> SimpleNamespace:
    """Chip `index` of a 2x4 slice, as the runtime describes it."""
    return SimpleNamespace(
        id=8 * slice_index + index, platform="tpu", device_kind="TPU v5 lite", slice_index=slice_index,
        coords=(index % 2, index // 2, 0), core_on_chip=0, process_index=0,
    )  # fmt: skip


def test_slices_of_tpus_are_as_their_devices_say():
    """Given in any order; no slice's FSDP or tensor group reaches into another."""
    devices = [tpu(index, slice_index) for index in range(8) for slice_index in (1, 0)]
    # jax.sharding.Mesh takes real devices only, so the arrangement is looked at
    pieces = mesh_module._slices(devices, 0)
    assert [{d.slice_index for d in piece} for piece in pieces] == [{0}, {1}]
    arranged = np.concatenate([mesh_module._arrange(piece, (2, 4, 1)) for piece in pieces])
    assert arranged.shape == (4, 4, 1)
    assert [[d.slice_index for d in row.flat] for row in arranged] == [[0] * 4, [0] * 4, [1] * 4, [1] * 4]
    with pytest.raises(ValueError, match="mesh.slices=4, but these TPUs are 2 slice"):
        mesh_module._slices(devices, 4)
    with pytest.raises(ValueError, match="one size"):
        mesh_module._slices(devices[:-1], 0)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu (the extra 'tpu') is not installed")
def test_groups_of_real_slices_are_within_them():
    mesh = make_mesh(2, 2, devices=topology("v5e:2x4", slices=2))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 2}
    assert [{d.slice_index for d in row.flat} for row in mesh.devices] == [{0}, {0}, {1}, {1}]
    # neighbours on the torus along the last axis
    apart = [np.abs(np.subtract(a.coords, b.coords)).sum() for a, b in mesh.devices.reshape(-1, 2)]
    assert apart == [1] * 8


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu (the extra 'tpu') is not installed")
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5p:2x2x1", "tpu7x:2x2x1"])
def test_every_generation_can_be_laid_out(name):
    devices = topology(name)
    mesh = make_mesh(2, 2, devices=devices)
    assert set(mesh.devices.flat) == set(devices) and mesh.shape["data"] * 4 == len(devices)
    assert len(devices) == (8 if name.startswith("tpu7x") else 4)


def test_devices_that_cannot_be_laid_out_are_an_error_in_one_line():
    """Cores of v4 chips one by one, where a mesh takes whole chips."""
    cores = [tpu(index, 0) for index in range(8)]
    for index, core in enumerate(cores):
        core.device_kind, core.core_on_chip, core.coords = "TPU v4", index % 2, (index // 2 % 2, index // 4, 0)
    with pytest.raises(ValueError, match="8 x TPU v4 cannot be laid out as data=2, fsdp=4, tensor=1: .*megacore"):
        mesh_module._arrange(cores, (2, 4, 1))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"fsdp": 3}, r"mesh\.fsdp=3 does not divide the 8 .* this run: set --config\.mesh\.fsdp to 2 or 4"),
        ({"fsdp": 16}, r"mesh\.fsdp=16 does not divide the 8 .* to 8$"),
        ({"fsdp": 0}, r"mesh\.fsdp=0 does not divide the 8 .* to 1$"),
        ({"tensor": 5}, r"mesh\.tensor=5 does not divide the 8 .* --config\.mesh\.tensor to 4 or 8"),
        ({"fsdp": 4, "tensor": 4}, r"mesh\.fsdp=4 .* of which tensor=4 leaves 2: .* to 2$"),
        ({"slices": 3}, r"mesh\.slices=3 does not divide the 8 .* --config\.mesh\.slices to 2 or 4"),
        ({"fsdp": 8, "slices": 2}, r"mesh\.fsdp=8 does not divide the 4 device\(s\) of each slice: .* to 4$"),
    ],
)
def test_what_does_not_divide_is_named_with_the_nearest_that_does(fields, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**fields, devices=jax.devices()[:8])
