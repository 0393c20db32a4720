"""What is cut, in a compiled program of eight devices: weights travel between them, images never do."""

import re

import jax
import jax.numpy as jnp
import pytest

from eupe_jax.models import zoo
from eupe_jax.sharding.activations import pinned
from eupe_jax.sharding.mesh import batch_sharding, make_mesh
from eupe_jax.sharding.rules import shardings

WIDTH, SIDE, BATCH = 64, 32, 24
TOKENS = 5 + (SIDE // 16) ** 2
COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def collectives(mesh, wrapped: bool) -> list[tuple[str, tuple[int, ...]]]:
    """(kind, shape) of everything sent between devices for the gradient of a small ViT's patch tokens."""
    module = zoo.build("eupe_vitb16", embed_dim=WIDTH, depth=2, num_heads=4)
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 3)))
    cuts = shardings(variables, mesh)
    variables = jax.tree.map(lambda x, cut: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cut), variables, cuts)

    def gradients(variables, images):
        def loss(params):
            return jnp.square(module.apply({**variables, "params": params}, images)["patches"]).mean()

        return jax.grad(loss)(variables["params"])

    if wrapped:
        gradients = pinned(mesh)(gradients)
    images = jax.ShapeDtypeStruct((BATCH, SIDE, SIDE, 3), jnp.float32, sharding=batch_sharding(mesh))
    text = jax.jit(gradients, out_shardings=cuts["params"]).lower(variables, images).compile().as_text()
    return [
        (kind, tuple(int(n) for n in dims.split(",") if n))
        for shapes, kind in COLLECTIVE.findall(text)
        for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)
    ]


def of_images(found) -> list:
    """Those that carry activations: an axis counts tokens or patches of many images."""
    return [(kind, shape) for kind, shape in found if TOKENS in shape or shape[1:3] == (SIDE // 16, SIDE // 16)]


@pytest.mark.slow
def test_weights_travel_and_activations_stay():
    mesh = make_mesh(4, devices=jax.devices()[:8])
    found = collectives(mesh, wrapped=True)
    assert any(kind == "all-gather" and WIDTH in shape for kind, shape in found)
    assert not of_images(found)
    # and this test could fail: on its own the compiler does send activations
    assert of_images(collectives(mesh, wrapped=False))


def test_a_tensor_group_sums_activations_once_a_layer_and_never_rearranges_them():
    everything = collectives(make_mesh(2, 2, devices=jax.devices()[:8]), wrapped=True)
    assert any(kind == "all-gather" and WIDTH in shape for kind, shape in everything)
    found = of_images(everything)
    assert {"all-reduce"} <= {kind for kind, _ in found} <= {"all-reduce", "all-gather"}
    sums = [shape for kind, shape in found if kind == "all-reduce"]
    assert set(sums) == {(BATCH // 4, TOKENS, WIDTH)}


def test_a_single_device_has_nothing_to_pin():
    module = zoo.build("eupe_vitt16", embed_dim=32, depth=1, num_heads=2)
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 3)))
    for mesh in (None, make_mesh(devices=jax.devices()[:1])):
        with pinned(mesh):
            program = jax.make_jaxpr(module.apply)(variables, jnp.zeros((3, SIDE, SIDE, 3)))
        assert "sharding_constraint" not in str(program)


def test_what_is_no_batch_is_left_alone():
    """One image on eight devices: a model that is initialised, or looked at, within the step's trace."""
    module = zoo.build("eupe_vitt16", embed_dim=32, depth=1, num_heads=2)
    with pinned(make_mesh()):
        out = jax.eval_shape(module.init_with_output, jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 3)))[0]
    assert out["cls"].shape == (1, 32)
