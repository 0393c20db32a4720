"""What SigLIP, RADIO and DUNE promise whatever the weights: shapes, loops, memory options, dtypes, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eupe_jax.models import layers, zoo

COMMON = {"width": 32, "depth": 2, "num_heads": 2, "mlp_dim": 48, "patch_size": 8}
SMALL = {
    "siglip2_base_patch16_224": {**COMMON, "image_size": 32},
    "radio_v2_5_b": {**COMMON, "max_image_size": 64},
    "dune_vitb14_448": {**COMMON, "image_size": 32},
}
N_PREFIX = {"siglip2_base_patch16_224": 0, "radio_v2_5_b": 8, "dune_vitb14_448": 5}
NAMES = list(SMALL)
# leaves that encoding never reads
UNREAD = {"mask_token"}


def build(name, **overrides):
    return zoo.build(name, **{**SMALL[name], **overrides})


def images(height=24, width=40, batch=2):
    return jax.random.normal(jax.random.key(1), (batch, height, width, 3))


@functools.cache
def variables_of(name):
    """Random variables, every leaf off its initial value."""
    shapes = jax.eval_shape(build(name).init, jax.random.key(0), images())
    assert set(shapes) == {"params"}
    rng = np.random.default_rng(2)

    def draw(path, leaf):
        mean, scale = {"scale": (1.0, 0.1), "gamma": (0.5, 0.1)}.get(path[-1].key, (0.0, 0.2))
        return jnp.asarray(mean + scale * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def compiled(name):
    return jax.jit(build(name).apply)


@functools.cache
def outputs(name):
    return compiled(name)(variables_of(name), images())


@pytest.mark.parametrize("name", NAMES)
def test_odd_grids_have_the_described_widths_and_follow_the_image(name):
    spec = zoo.spec(name, **SMALL[name])
    found = outputs(name)
    assert {key: value.shape for key, value in found.items()} == {
        "cls": (2, spec.cls_dim),
        "storage": (2, spec.num_storage_tokens, 32),
        "patches": (2, 3, 5, 32),
    }
    assert all(value.dtype == jnp.float32 for value in found.values())
    changed = images().at[1, :8, 32:].add(1.0)  # the corner patch of the second image
    after = compiled(name)(variables_of(name), changed)
    moved = jnp.abs(after["patches"] - found["patches"]).max(axis=-1)
    assert float(moved[0].max()) < 1e-5 and jnp.unravel_index(jnp.argmax(moved[1]), (3, 5)) == (0, 4)
    assert float(jnp.abs(after["cls"][1] - found["cls"][1]).max()) > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_any_size_can_be_traced(name):
    encoder = zoo.build(name, depth=1)
    for side in (spec_side := zoo.spec(name).resolution, 2 * spec_side):
        image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        out, _ = jax.eval_shape(encoder.init_with_output, jax.random.key(0), image)
        grid = side // zoo.spec(name).patch_size
        assert out["patches"].shape[1:3] == (grid, grid)


@pytest.mark.parametrize("name", NAMES)
def test_memory_and_loop_options_change_no_number(name):
    def gradient(encoder):
        def loss(variables):
            out = encoder.apply(variables, images(), train=True)
            return sum(jnp.sum(jnp.sin(value)) for value in out.values())

        return jax.jit(jax.value_and_grad(loss))(variables_of(name))

    value, grads = gradient(build(name))
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert bool(jnp.any(leaf != 0)) == (path[-1].key not in UNREAD), path
    options = {"remat": "names", "scan_unroll": 2, "attention_fn": layers.plain_attention}
    other_value, other_grads = gradient(build(name, **options))
    np.testing.assert_allclose(other_value, value, rtol=1e-5)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(other_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3 * float(jnp.abs(b).max()) + 1e-5, err_msg=str(path))


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_compute_stays_close_and_returns_float32(name):
    coarse = jax.jit(build(name, dtype=jnp.bfloat16).apply)(variables_of(name), images())
    rough = jax.eval_shape(
        build(name, dtype=jnp.bfloat16, residual_dtype=jnp.bfloat16).apply, variables_of(name), images()
    )
    for key, exact in outputs(name).items():
        assert coarse[key].dtype == rough[key].dtype == jnp.float32
        if exact.size:
            error = jnp.linalg.norm(coarse[key] - exact) / jnp.linalg.norm(exact)
            assert 1e-5 < error < 0.03, (key, float(error))


@pytest.mark.parametrize("name", NAMES)
def test_attention_fn_sees_the_whole_sequence(name):
    seen = []

    def attention(q, k, v):
        seen.append((q.shape, k.shape, v.shape))
        return layers.plain_attention(q, k, v)

    jax.eval_shape(build(name, attention_fn=attention).apply, variables_of(name), images())
    assert set(seen) == {((2, N_PREFIX[name] + 15, 2, 16),) * 3}


@pytest.mark.parametrize("name", NAMES)
def test_chosen_layers_end_in_the_output(name):
    features = functools.partial(build(name).apply, layers=(0, -1), method="features")
    full = jax.jit(features)(variables_of(name), images())
    first, last = full["layers"]
    np.testing.assert_allclose(last["patches"], outputs(name)["patches"], atol=1e-5)
    assert first["patches"].shape == last["patches"].shape
    assert float(jnp.abs(first["patches"] - last["patches"]).max()) > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_named(name):
    def trace(image, method=None, layers=(), **overrides):
        options = {"layers": layers, "method": method} if method else {}
        jax.eval_shape(functools.partial(build(name, **overrides).apply, **options), variables_of(name), image)

    with pytest.raises(ValueError, match="24x41.*multiples of 8"):
        trace(images(24, 41))
    with pytest.raises(ValueError, match="smaller than one patch"):
        trace(images(7, 32), method="features")
    with pytest.raises(ValueError, match="out of range for a model of 2 blocks"):
        trace(images(), method="features", layers=(2,))
    with pytest.raises(ValueError, match="width 32 is not a multiple of num_heads 3"):
        trace(images(), num_heads=3)
    with pytest.raises(ValueError, match="remat must be one of.*'all'"):
        trace(images(), remat="all")
