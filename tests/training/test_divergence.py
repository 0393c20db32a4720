"""Copies of parameters that are not the same: found, and the device named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from eupe_jax.sharding.mesh import make_mesh
from eupe_jax.training.divergence import Diverging, ReplicaCheck, odd_ones


def altered(x, devices):
    """The array with one bit of its last element flipped in the copies that these devices hold."""

    def shard(each):
        value = np.array(each.data)
        if each.device.id in devices:
            bits = value.reshape(-1).view(f"u{value.dtype.itemsize}")
            bits[-1] ^= 1
        return jax.device_put(value, each.device)

    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, [shard(each) for each in x.addressable_shards])


@pytest.fixture(scope="module")
def placed():
    mesh = make_mesh(fsdp=2, tensor=2)
    values = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)

    def put(value, *spec):
        return jax.device_put(value, NamedSharding(mesh, PartitionSpec(*spec)))

    tree = {
        "step": put(np.int32(3)),
        "whole": put(values),
        "cut": put(values, "fsdp"),
        "narrow": put(values.astype(jnp.bfloat16), None, ("tensor",)),
        "everywhere": put(np.arange(8, dtype=np.float32), ("data", "fsdp", "tensor")),
    }
    return mesh, tree, ReplicaCheck(mesh)


def test_equal_copies_pass_and_one_bit_of_one_device_is_found(placed):
    _, tree, check = placed
    check.check(10, tree)
    for name, devices in (("whole", [5]), ("cut", [6]), ("narrow", [0]), ("step", [7])):
        with pytest.raises(Diverging, match=rf"after step 20 not all copies of {name} are the same: suspect "
                           rf"device\(s\) {devices[0]} of host\(s\) 0; .* alike \(last after step 10"):  # fmt: skip
            check.check(20, tree | {name: altered(tree[name], devices)})
    check.check(30, tree | {"everywhere": altered(tree["everywhere"], [3])})  # has no other copy to differ from
    several = {name: altered(tree[name], [2, 4]) for name in ("whole", "step")}
    with pytest.raises(Diverging, match=r"of step and 1 more are the same: suspect device\(s\) 2, 4 of"):
        check.check(40, tree | several)


def test_a_check_that_never_passed_says_so_and_one_device_has_nothing_to_compare(placed):
    mesh, tree, _ = placed
    with pytest.raises(Diverging, match="alike .never before"):
        ReplicaCheck(mesh).check(0, {"whole": altered(tree["whole"], [1])})
    one = make_mesh(devices=jax.devices()[:1])
    ReplicaCheck(one).check(0, jax.device_put({"a": np.ones(3, np.float32)}, NamedSharding(one, PartitionSpec())))


def test_odd_ones():
    assert odd_ones(np.array([7, 7, 7, 9]), [0, 0, 0, 0]) == [3]
    assert odd_ones(np.array([1, 7, 1, 7]), [0, 1, 0, 1]) == []
    assert odd_ones(np.array([1, 7, 2, 7]), [0, 1, 0, 1]) == [0, 2], "two copies: which is right nobody knows"
    assert odd_ones(np.array([9, 7, 1, 7, 1, 7]), [0, 1, 0, 1, 0, 1]) == [0]
