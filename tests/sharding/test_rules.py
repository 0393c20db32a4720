import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from eupe_jax.models import zoo
from eupe_jax.sharding.mesh import make_mesh
from eupe_jax.sharding.rules import TILE, shardings, spec_for


def test_first_rule_wins_and_small_or_odd_arrays_stay_whole():
    mesh = make_mesh(fsdp=4)
    assert spec_for("blocks/mlp/fc1/kernel", (12, 192, 768), mesh) == P(None, "fsdp", None)
    assert spec_for("blocks/mlp/fc1/bias", (12, 768), mesh) == P()
    assert spec_for("x/kernel", (8, 8), mesh) == P()
    assert spec_for("x/kernel", (1001, 1003), mesh) == P()
    rules = ((r"fc1", "replicate"), (r".*", "fsdp"))
    assert spec_for("blocks/mlp/fc1/kernel", (12, 192, 768), mesh, rules) == P()


def test_shards_are_whole_tiles_of_inputs_before_outputs():
    mesh = make_mesh(fsdp=8)
    # 192 / 8 = 24 rows are three tiles, 96 / 8 = 12 are one and a half
    assert spec_for("x/kernel", (192, 4096), mesh) == P("fsdp", None)
    assert spec_for("x/kernel", (96, 512), mesh) == P(None, "fsdp")
    # gradients of shards of 128 columns and more would be summed whole
    assert spec_for("x/kernel", (96, 1024), mesh) == P()
    assert spec_for("x/kernel", (1001, 96), mesh) == P()
    # layers are never cut, nor are convolutions
    assert spec_for("blocks/x/kernel", (4096, 20, 20), mesh) == P()
    assert spec_for("params/downsample_1/conv/kernel", (2, 2, 512, 1024), mesh) == P()
    assert spec_for("params/patch_embed/kernel", (16, 16, 3, 1536), mesh) == P()
    # columns of the joint projection are put into another order within the step
    assert spec_for("params/blocks/attn/qkv/kernel", (12, 192, 576), mesh) == P(None, "fsdp", None)
    assert spec_for("params/blocks/attn/qkv/kernel", (12, 96, 576), mesh) == P()


def test_tensor_cuts_outputs_then_inputs():
    mesh = make_mesh(2, 2, devices=jax.devices()[:8])
    layer = (12, 512, 2048)
    assert spec_for("params/blocks/mlp/fc1/kernel", layer, mesh) == P(None, "fsdp", "tensor")
    assert spec_for("params/blocks/mlp/w2/kernel", layer, mesh) == P(None, "fsdp", "tensor")
    assert spec_for("params/blocks/mlp/fc2/kernel", (12, 2048, 512), mesh) == P(None, "tensor", "fsdp")
    assert spec_for("params/blocks/attn/proj/kernel", (12, 512, 512), mesh) == P(None, "tensor", "fsdp")
    assert spec_for("params/adapters/proxy_cls/fc1/kernel", (512, 3072), mesh) == P("fsdp", "tensor")
    assert spec_for("params/blocks/attn/qkv/kernel", (12, 512, 1536), mesh) == P(None, None, ("fsdp", "tensor"))
    # what a tensor group cannot share in whole tiles is cut by fsdp alone
    assert spec_for("params/head/fc1/kernel", (512, 1000), mesh) == P("fsdp", None)


@pytest.mark.parametrize("fsdp, tensor", [(16, 1), (32, 1), (8, 2)])
@pytest.mark.parametrize("model", ["eupe_proxy", "pe_core_g14_448", "dinov3_vith16plus", "eupe_vitb16", "eupe_vits16"])
def test_published_models_are_cut_nearly_whole_and_into_tiles(model, fsdp, tensor):
    class Axes:  # a mesh larger than this machine: the rules look at its shape alone
        shape = {"data": 2, "fsdp": fsdp, "tensor": tensor}

    side = zoo.spec(model).resolution
    variables = jax.eval_shape(zoo.build(model).init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    held = total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        name = "params/" + "/".join(key.key for key in path)
        spec = spec_for(name, leaf.shape, Axes())
        shards = 1
        for size, names in zip(leaf.shape, spec, strict=False):
            for axis in (names,) if isinstance(names, str) else names or ():
                size, rest = divmod(size, Axes.shape[axis])
                assert not rest and size % TILE == 0, (name, leaf.shape, spec)
                shards *= Axes.shape[axis]
        held, total = held + leaf.size / shards, total + leaf.size
    # 8M: what stays whole of a small model (384 / 32 makes no tiles)
    assert held < 1.1 * total / (fsdp * tensor) + 8e6



def test_optimizer_moments_follow_their_parameters():
    mesh = make_mesh(fsdp=2)
    tree = {"mu": {"fc": {"kernel": jnp.zeros((128, 256))}}, "params": {"fc": {"kernel": jnp.zeros((128, 256))}}}
    placed = shardings(tree, mesh)
    assert placed["mu"]["fc"]["kernel"] == placed["params"]["fc"]["kernel"]
    assert placed["mu"]["fc"]["kernel"].spec == P("fsdp", None)


def test_errors_name_the_rule():
    mesh = make_mesh()
    with pytest.raises(ValueError, match="tactic 'shred'"):
        spec_for("kernel", (4, 4), mesh, ((r".*", "shred"),))
    with pytest.raises(ValueError, match="no sharding rule"):
        spec_for("kernel", (4, 4), mesh, ((r"bias", "fsdp"),))
