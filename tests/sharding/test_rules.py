import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from eupe_jax.sharding.mesh import make_mesh
from eupe_jax.sharding.rules import shardings, spec_for


def test_first_rule_wins_and_small_or_odd_arrays_stay_whole():
    mesh = make_mesh(fsdp=4)
    assert spec_for("blocks/mlp/fc1/kernel", (12, 192, 768), mesh) == P(None, None, "fsdp")
    assert spec_for("blocks/mlp/fc2/kernel", (12, 768, 192), mesh) == P(None, "fsdp", None)
    assert spec_for("blocks/mlp/fc1/bias", (12, 768), mesh) == P()
    assert spec_for("x/kernel", (8, 8), mesh) == P()
    assert spec_for("x/kernel", (1001, 1003), mesh) == P()
    rules = ((r"fc1", "replicate"), (r".*", "fsdp"))
    assert spec_for("blocks/mlp/fc1/kernel", (12, 192, 768), mesh, rules) == P()


def test_optimizer_moments_follow_their_parameters():
    mesh = make_mesh(fsdp=2)
    tree = {"mu": {"fc": {"kernel": jnp.zeros((128, 256))}}, "params": {"fc": {"kernel": jnp.zeros((128, 256))}}}
    placed = shardings(tree, mesh)
    assert placed["mu"]["fc"]["kernel"] == placed["params"]["fc"]["kernel"]
    assert placed["mu"]["fc"]["kernel"].spec == P(None, "fsdp")


def test_errors_name_the_rule():
    mesh = make_mesh()
    with pytest.raises(ValueError, match="tactic 'shred'"):
        spec_for("kernel", (4, 4), mesh, ((r".*", "shred"),))
    with pytest.raises(ValueError, match="no sharding rule"):
        spec_for("kernel", (4, 4), mesh, ((r"bias", "fsdp"),))
