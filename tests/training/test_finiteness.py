"""The first operation that gives what is not finite, in traced functions of every kind."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eupe_jax.models.layers import stack_blocks
from eupe_jax.training.finiteness import Place, Watched, kinds_along

DEPTH = 3


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(4, name="fc1")(jnp.log(nn.Dense(4, name="fc0")(x))), None


class Model(nn.Module):
    remat: str = "none"

    @nn.compact
    def __call__(self, x):
        x, _ = stack_blocks(Block, DEPTH, remat=self.remat)(name="blocks")(x)
        return nn.Dense(2, name="head")(x)


def variables():
    """Weights of ones: everything is finite, and gradients are too."""
    return ones(Model(), jnp.ones((2, 4)))


def ones(model, x):
    return jax.tree.map(lambda each: jnp.ones(each.shape), jax.eval_shape(model.init, jax.random.key(0), x))


def blame(function, *args):
    """The place to blame, and what it gave."""
    watched = Watched(function)
    _, flags = jax.jit(watched)(*args)
    return watched.first(np.asarray(flags))


def put(tree, path, index, value):
    """The tree with another value in one block of a stacked parameter."""
    keys = path.split("/")
    leaf = tree["params"]
    for key in keys:
        leaf = leaf[key]
    changed = leaf.at[index].set(value)
    return jax.tree_util.tree_map_with_path(lambda p, x: changed if [k.key for k in p[1:]] == keys else x, tree)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_block_and_the_pass_are_named(remat):
    def loss(weights, x):
        return jnp.sum(Model(remat).apply(weights, x) ** 2)

    watched, x, good = Watched(jax.grad(loss)), jnp.ones((2, 4)), variables()
    run = jax.jit(watched)
    gradients, flags = run(good, x)
    assert watched.first(np.asarray(flags)) is None
    jax.tree.map(np.testing.assert_array_equal, gradients, jax.jit(jax.grad(loss))(good, x))

    minus = put(good, "blocks/fc0/kernel", 1, -1.0)  # log of a negative number
    place, kind = watched.first(np.asarray(run(minus, x)[1]))
    assert (place.path, place.loops, place.backward, kind) == ("blocks", ((1, DEPTH),), False, "NaN")
    assert str(place) == "in blocks, layer 1 of 3"
    large = put(good, "blocks/fc1/kernel", 2, 3e38)
    place, kind = watched.first(np.asarray(run(large, x)[1]))
    assert (place.model, place.path, place.loops, kind) == ("Model", "blocks/fc1", ((2, DEPTH),), "infinite")


def test_a_gradient_that_alone_is_not_finite_is_told_from_the_forward_pass():
    @jax.custom_vjp
    def steep(x):
        return x

    steep.defvjp(lambda x: (x, None), lambda _, slope: (slope * jnp.inf,))

    class Steep(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1, name="below")(steep(nn.Dense(4, name="above")(x)))

    weights = ones(Steep(), jnp.ones((2, 4)))
    place, kind = blame(jax.grad(lambda w, x: jnp.sum(Steep().apply(w, x))), weights, jnp.ones((2, 4)))
    assert place.backward and kind == "infinite" and place.model == "Steep"


def test_what_comes_bad_is_not_blamed_and_infinities_may_be_meant():
    def masked(x, wanted):
        return jax.nn.softmax(jnp.where(wanted, x, -jnp.inf)) * 2

    x = jnp.arange(4.0)
    assert blame(masked, x, jnp.array([True, False, True, True])) is None
    assert blame(lambda x: x * 2 + 1, x.at[1].set(jnp.nan)) is None
    place, kind = blame(masked, x, jnp.zeros(4, bool))
    assert (place, kind) == (Place(), "NaN")
    drawn = lambda x: (x.astype(jnp.int32) + jax.random.randint(jax.random.key(0), (4,), 1, 9)) / 0  # noqa: E731
    assert blame(drawn, x)[1] == "infinite"


def test_kinds_along():
    x = jnp.array([[1.0, -jnp.inf], [jnp.nan, jnp.inf], [0.0, 3e38]])
    assert kinds_along(x, 1).tolist() == [1, 2, 0] and kinds_along(x, 0) == 2
    assert kinds_along(x.astype(jnp.bfloat16), 1).tolist() == [1, 2, 0]
    assert kinds_along(jnp.arange(3), 1).tolist() == [0, 0, 0]
