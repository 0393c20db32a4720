"""Axial rotary position embedding of the EUPE / DINOv3 ViT (official behaviour).

Patch centres are mapped to [-1, 1] along both axes; a quarter of a head's width holds the height angles, a quarter
the width angles, and the other half repeats them ("half split" rotation). All of it runs in float32.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NORMALIZE_MODES = ("separate", "max", "min")


def rope_periods(
    head_dim: int, base: float | None = 100.0, min_period: float | None = None, max_period: float | None = None
) -> np.ndarray:
    """Periods of the rotations, in units of half an image side.

    Geometric from 1 with ratio `base ** (4 / head_dim)`, or from `min_period` to `max_period` inclusive.

    Returns:
      float32 [head_dim / 4].

    Raises:
      ValueError: head_dim is not a multiple of 4, or neither or both of base and the two periods are given.
    """
    if head_dim % 4:
        raise ValueError(f"RoPE needs a head width that is a multiple of 4, got {head_dim}")
    by_range = min_period is not None and max_period is not None
    if (base is None) != by_range or (min_period is None) != (max_period is None):
        raise ValueError(
            "RoPE takes either rope_base or both rope_min_period and rope_max_period, got "
            f"base={base}, min_period={min_period}, max_period={max_period}"
        )
    n = head_dim // 4
    if by_range:
        periods = min_period * (max_period / min_period) ** np.linspace(0.0, 1.0, n)
    else:
        periods = base ** (np.arange(n) * 2.0 / (head_dim // 2))
    return periods.astype(np.float32)


def patch_coords(height: int, width: int, normalize: str = "separate") -> np.ndarray:
    """Centres of the patches of a `height x width` grid, row-major, (h, w) order: float32 [height * width, 2].

    `normalize` divides each axis by its own length ("separate"), both by the longer ("max") or shorter ("min").

    Raises:
      ValueError: unknown `normalize`.
    """
    if normalize not in NORMALIZE_MODES:
        raise ValueError(f"rope_normalize_coords must be one of {NORMALIZE_MODES}, got {normalize!r}")
    lengths = {"separate": (height, width), "max": (max(height, width),) * 2, "min": (min(height, width),) * 2}
    by_h, by_w = lengths[normalize]
    h = np.arange(0.5, height, dtype=np.float32) / np.float32(by_h)
    w = np.arange(0.5, width, dtype=np.float32) / np.float32(by_w)
    grid = np.stack(np.meshgrid(h, w, indexing="ij"), axis=-1).reshape(-1, 2)
    return 2.0 * grid - 1.0


def draw_augmentation(
    key: jax.Array, shift: float | None = None, jitter: float | None = None, rescale: float | None = None
) -> tuple[jax.Array, jax.Array]:
    """Draws the train-time change of the coordinates: `(factor [2], offset [2])`, see `combine_augmentation`.

    One draw serves the whole batch. `shift`: uniform in [-shift, shift] per axis. `jitter`, `rescale`: log-uniform in
    [1 / x, x], per axis and common to both. None leaves a part out.
    """
    k_shift, k_jitter, k_rescale = jax.random.split(key, 3)

    def log_uniform(key, size, bound):
        return jnp.exp(jax.random.uniform(key, (size,), minval=-math.log(bound), maxval=math.log(bound)))

    return combine_augmentation(
        0.0 if shift is None else jax.random.uniform(k_shift, (2,), minval=-shift, maxval=shift),
        1.0 if jitter is None else log_uniform(k_jitter, 2, jitter),
        1.0 if rescale is None else log_uniform(k_rescale, 1, rescale),
    )


def combine_augmentation(shift=0.0, jitter=1.0, rescale=1.0) -> tuple[jax.Array, jax.Array]:
    """`(factor [2], offset [2])` with coords -> factor * coords + offset: first the shift, then jitter and rescale."""
    factor = jnp.broadcast_to(jnp.asarray(jitter, jnp.float32) * rescale, (2,))
    return factor, factor * shift


def rope_table(periods: jax.Array, coords_Nx2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sine and cosine of every position: two float32 [N, head_dim] from periods [head_dim / 4]."""
    angles = 2.0 * math.pi * coords_Nx2[:, :, None] / periods.astype(jnp.float32)
    angles = jnp.tile(angles.reshape(angles.shape[0], -1), 2)
    return jnp.sin(angles), jnp.cos(angles)


def apply_rope(x_BxTxHxD: jax.Array, sin_NxD: jax.Array, cos_NxD: jax.Array) -> jax.Array:
    """Rotates the last N of T tokens; the prefix (class and storage tokens) stays. Same shape and dtype back."""
    n_prefix = x_BxTxHxD.shape[1] - sin_NxD.shape[0]
    prefix, x = x_BxTxHxD[:, :n_prefix], x_BxTxHxD[:, n_prefix:].astype(jnp.float32)
    first, second = jnp.split(x, 2, axis=-1)
    rotated = jnp.concatenate([-second, first], axis=-1)
    x = x * cos_NxD[None, :, None] + rotated * sin_NxD[None, :, None]
    return jnp.concatenate([prefix, x.astype(prefix.dtype)], axis=1)


class Rotation(NamedTuple):
    """How queries and keys are turned: `turn(x [B, T, heads, width], sin [N, width], cos)` on the last N tokens.

    interleaved: it pairs neighbouring channels (2i, 2i + 1), else channels half a head apart (i, i + width / 2).
    """

    turn: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    interleaved: bool

    def half_tables(self, sin_NxD: jax.Array, cos_NxD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One angle a pair: [N, width / 2] each."""
        pick = (slice(None), slice(0, None, 2)) if self.interleaved else (slice(None), slice(0, sin_NxD.shape[1] // 2))
        return sin_NxD[pick], cos_NxD[pick]


HALVES = Rotation(apply_rope, interleaved=False)
