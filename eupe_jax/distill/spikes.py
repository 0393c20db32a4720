"""The rule against spikes: a step whose gradient is many times larger than is usual is not applied.

What is usual is a running average of the norms of the steps that were applied. It is part of the optimiser's state, so
that a resumed run goes on with it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

MEMORY = 50  # steps that the average goes back
BEGINNING = 20  # applied steps before the rule acts: gradients of the very first ones fall fast


class NormAverage(NamedTuple):
    """count: int32 [], steps so far; average: float32 [], of their gradients' norms."""

    count: jax.Array
    average: jax.Array


def average_norm() -> optax.GradientTransformation:
    """Leaves gradients as they are and keeps a `NormAverage` of them: the mean of all at first, then a decaying one."""

    def init(params: Any) -> NormAverage:
        return NormAverage(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

    def update(updates: Any, state: NormAverage, params: Any = None) -> tuple[Any, NormAverage]:
        weight = 1.0 / jnp.minimum(state.count + 1, MEMORY)
        average = state.average + weight * (optax.tree.norm(updates) - state.average)
        return updates, NormAverage(state.count + 1, average.astype(jnp.float32))

    return optax.GradientTransformation(init, update)


def is_spike(optimizer_state: Any, norm: jax.Array, factor: float) -> jax.Array:
    """bool []: whether a gradient of this norm is more than `factor` times what is usual."""
    (usual,) = [
        leaf
        for leaf in jax.tree.leaves(optimizer_state, is_leaf=lambda x: isinstance(x, NormAverage))
        if isinstance(leaf, NormAverage)
    ]
    return (usual.count >= BEGINNING) & (norm > factor * usual.average)
