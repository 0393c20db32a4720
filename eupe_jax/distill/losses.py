"""Distillation losses (EUPE §3.2, Eq. 4-6), always in float32.

The paper leaves reductions open; means over tokens and batch, and a smooth-L1 beta of 1, follow its relatives
(AM-RADIO, DUNE). EUPE weights both token types and all teachers equally.
"""

import jax
import jax.numpy as jnp

from eupe_jax.models.resize import resize

COSINE_EPS = 1e-8  # PyTorch's cosine_similarity clamps each norm here


def cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    """Cosine similarity over the last axis: [..., D], [..., D] -> [...]."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)

    def unit(v: jax.Array) -> jax.Array:
        # The clamp is inside the root: at v = 0 the gradient stays finite.
        return v * jax.lax.rsqrt(jnp.maximum(jnp.sum(v * v, axis=-1, keepdims=True), COSINE_EPS**2))

    return jnp.sum(unit(x) * unit(y), axis=-1)


def cosine_loss(x: jax.Array, y: jax.Array) -> jax.Array:
    """1 - cosine, averaged over every token of the batch: [..., D], [..., D] -> []."""
    return 1.0 - jnp.mean(cosine(x, y))


def smooth_l1_loss(x: jax.Array, y: jax.Array, beta: float = 1.0) -> jax.Array:
    """Huber-style loss (quadratic below `beta`), averaged over everything: [..., D], [..., D] -> []."""
    difference = jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32))
    return jnp.mean(jnp.where(difference < beta, 0.5 * difference**2 / beta, difference - 0.5 * beta))


def match_grids(x_BxHxWxD: jax.Array, y_BxHxWxD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Upsamples whichever grid is smaller, axis by axis, to the common larger one (EUPE §3.1, bicubic)."""
    size = tuple(max(a, b) for a, b in zip(x_BxHxWxD.shape[1:3], y_BxHxWxD.shape[1:3], strict=True))
    return resize(x_BxHxWxD, size), resize(y_BxHxWxD, size)


def patch_losses(student_BxHxWxD: jax.Array, teacher_BxHxWxD: jax.Array, beta: float = 1.0) -> dict[str, jax.Array]:
    """Cosine and smooth-L1 losses of patch tokens on the common grid: {"cosine": [], "smooth_l1": []}."""
    student, teacher = match_grids(student_BxHxWxD, teacher_BxHxWxD)
    return {"cosine": cosine_loss(student, teacher), "smooth_l1": smooth_l1_loss(student, teacher, beta)}
