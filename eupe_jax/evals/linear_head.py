"""The head of linear dense evaluation: drop-out of channels, batch norm, a 1x1 convolution; and its optimiser step.

Batch norm as in PyTorch: normalisation by the biased batch variance, running variance from the unbiased one. Under
jit over a sharded batch the statistics are those of the whole batch, which is what SyncBatchNorm computes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

BN_EPS = 1e-5
BN_MOMENTUM = 0.1
INIT_STD = 0.01

Head = dict[str, dict[str, jax.Array]]  # {"params": {...}, "stats": {...}}


def init(key: jax.Array, width: int, outputs: int) -> Head:
    """A fresh head [width] -> [outputs]: kernel N(0, 0.01), the rest at batch norm's identity."""
    return {
        "params": {
            "scale": jnp.ones(width),
            "shift": jnp.zeros(width),
            "kernel": INIT_STD * jax.random.normal(key, (width, outputs)),
            "bias": jnp.zeros(outputs),
        },
        "stats": {"mean": jnp.zeros(width), "var": jnp.ones(width)},
    }


@jax.jit
def apply(head: Head, features_BxhxwxD: jax.Array) -> jax.Array:
    """Logits [B, h, w, outputs] with the running statistics."""
    normalised = _normalise(features_BxhxwxD, head["stats"]["mean"], head["stats"]["var"])
    return _project(head["params"], normalised)


def apply_train(head: Head, features_BxhxwxD: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logits with the batch's own statistics, and the running statistics after this batch."""
    x = features_BxhxwxD
    count = x.size // x.shape[-1]
    mean = x.mean(axis=(0, 1, 2))
    var = jnp.mean((x - mean) ** 2, axis=(0, 1, 2))
    unbiased = var * (count / max(count - 1, 1))
    keep = 1.0 - BN_MOMENTUM
    stats = {
        "mean": keep * head["stats"]["mean"] + BN_MOMENTUM * mean,
        "var": keep * head["stats"]["var"] + BN_MOMENTUM * unbiased,
    }
    return _project(head["params"], _normalise(x, mean, var)), stats


def _normalise(x: jax.Array, mean: jax.Array, var: jax.Array) -> jax.Array:
    return (x - mean) * jax.lax.rsqrt(var + BN_EPS)


def _project(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    x = x * params["scale"] + params["shift"]
    return jnp.einsum("bhwd,dc->bhwc", x, params["kernel"], precision=jax.lax.Precision.HIGHEST) + params["bias"]


def drop_channels(key: jax.Array, x_BxhxwxD: jax.Array, rate: float) -> jax.Array:
    """Drops whole channels of an image with probability `rate` and scales the others up (Dropout2d)."""
    if rate == 0.0:
        return x_BxhxwxD
    kept = jax.random.bernoulli(key, 1.0 - rate, (x_BxhxwxD.shape[0], 1, 1, x_BxhxwxD.shape[-1]))
    return jnp.where(kept, x_BxhxwxD / (1.0 - rate), 0.0)


@dataclass(frozen=True)
class AdamW:
    """AdamW whose learning rate and beta1 change from step to step; every parameter is decayed, by lr * weight_decay.

    b2, eps, weight_decay: constants. clip_norm: largest global norm of the gradient; 0 for none.
    """

    weight_decay: float
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 0.0

    def _chain(self, learning_rate: Any, b1: Any) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm) if self.clip_norm > 0 else optax.identity(),
            optax.scale_by_adam(b1=b1, b2=self.b2, eps=self.eps),
            optax.add_decayed_weights(self.weight_decay),
            optax.scale(-learning_rate),
        )

    def init(self, params: Any) -> optax.OptState:
        """The optimiser's state before the first update of `params`."""
        return self._chain(0.0, 0.0).init(params)

    def update(self, grads: Any, state: optax.OptState, params: Any, learning_rate: Any, b1: Any) -> tuple[Any, Any]:
        """(parameters, state) after one step."""
        updates, state = self._chain(learning_rate, b1).update(grads, state, params)
        return optax.apply_updates(params, updates), state


# loss(head, features, targets, key, iteration) -> (loss, running statistics after the batch)
Loss = Callable[[Head, jax.Array, Any, jax.Array, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def make_step(loss: Loss, optimizer: AdamW) -> Callable[..., tuple[Head, optax.OptState, jax.Array]]:
    """The jitted step: (head, optimiser state, features, targets, key, iteration, lr, b1) -> (head, state, loss)."""

    @jax.jit
    def step(head, state, features, targets, key, iteration, learning_rate, b1):
        def of(params):
            return loss({"params": params, "stats": head["stats"]}, features, targets, key, iteration)

        (value, stats), grads = jax.value_and_grad(of, has_aux=True)(head["params"])
        params, state = optimizer.update(grads, state, head["params"], learning_rate, b1)
        return {"params": params, "stats": stats}, state, value

    return step
