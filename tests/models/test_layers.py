"""Parts with derivatives of their own: the same values and gradients as derived ones, from fewer arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eupe_jax.models import layers


def derived_layer_norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)


PARTS = {
    "gelu": (layers.exact_gelu_with_slope, lambda x: jax.nn.gelu(x, approximate=False)),
    "softmax": (layers.softmax, lambda x: jnp.exp(x) / jnp.exp(x).sum(-1, keepdims=True)),
    "layer norm": (lambda x: layers.standardize(x, 1e-5), derived_layer_norm),
}


@pytest.mark.parametrize("name", PARTS)
def test_values_and_gradients_are_those_of_the_definition(name):
    ours, definition = PARTS[name]
    rng = np.random.default_rng(0)
    x, weight = (np.float32(scale * rng.standard_normal((3, 7, 33))) for scale in (3, 1))
    x[0, 0, :4] = 0, -12, 12, 1e-20

    def found(f, x, weight):
        return f(x), jax.grad(lambda x: jnp.sum(f(x) * weight))(x), jax.jvp(f, (x,), (weight,))[1]

    with jax.enable_x64(True):
        wanted = found(definition, x.astype(np.float64), weight.astype(np.float64))
    for a, b in zip(found(ours, x, weight), wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6)


@pytest.mark.parametrize("name", PARTS)
def test_the_backward_pass_keeps_one_array(name):
    ours, definition = PARTS[name]
    x = jnp.ones((5, 6, 7))

    def kept(f):
        return sum(leaf.size == x.size for leaf in jax.tree.leaves(jax.vjp(f, x)[1]))

    assert kept(ours) == 1 < kept(definition)


def test_half_precision_stays_half():
    x = jnp.linspace(-4, 4, 64, dtype=jnp.bfloat16)
    y, slope = jax.jvp(layers.exact_gelu_with_slope, (x,), (jnp.ones_like(x),))
    assert y.dtype == slope.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, layers.exact_gelu(x))
