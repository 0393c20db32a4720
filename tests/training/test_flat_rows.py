"""On one processor a step's dense layers work on rows: the same figures, and no product over two axes."""

import flax.linen as nn
import jax
import jax.extend
import numpy as np

from eupe_jax.models.layers import QKV
from eupe_jax.sharding.mesh import make_mesh
from eupe_jax.training.flat_rows import with_flat_rows


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x_BxTxD):
        qkv = QKV(name="qkv")(x_BxTxD, lambda columns: columns[..., ::-1])
        return nn.Dense(4, name="proj")(qkv).sum(), nn.Dense(4, name="head")(x_BxTxD[:, 0])


def step(variables, x):
    return jax.grad(lambda variables: Layers().apply(variables, x)[0])(variables)


def products(jaxpr):
    """Axes that each matrix product sums over."""
    found = [len(e.params["dimension_numbers"][0][0]) for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    for inner in jax.extend.core.jaxprs_in_params({k: v for e in jaxpr.eqns for k, v in e.params.items()}):
        found += products(inner)
    return found


def test_gradients_are_the_same_and_products_sum_over_one_axis():
    x = np.random.default_rng(0).standard_normal((3, 5, 8)).astype(np.float32)
    variables = jax.jit(Layers().init)(jax.random.key(0), x)
    flat = with_flat_rows(step, make_mesh(devices=jax.devices()[:1]))
    assert flat.__name__ == "step"
    found, expected = (jax.jit(function)(variables, x) for function in (flat, step))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)
    assert set(products(jax.make_jaxpr(flat)(variables, x).jaxpr)) == {1}
    assert 2 in products(jax.make_jaxpr(step)(variables, x).jaxpr)


def test_other_devices_get_the_step_as_it_is():
    assert with_flat_rows(step, None) is step
    assert with_flat_rows(step, make_mesh(devices=jax.devices()[:2])) is step
