"""Image and token-grid resizing that matches PyTorch, as two small dense matrices.

`jax.image.resize` uses another cubic coefficient (-0.5) and renormalises at borders, so it cannot reproduce the
"PyTorch's builtin interpolation with bicubic mode" of EUPE §3.1. Resizing is linear and separable: one
[out, in] matrix per axis gives exact parity, is differentiable, and runs as matmuls on every accelerator.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    x = np.abs(x)
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, inner, np.where(x < 2, outer, 0.0))


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(0.0, 1.0 - np.abs(x))


def _sampled_matrix(n_in: int, n_out: int, method: str) -> np.ndarray:
    """align_corners=False, antialias=False: a = -0.75 and border indices clamped."""
    centre = (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5
    if method == "bilinear":
        centre = np.maximum(centre, 0.0)  # PyTorch clamps the source coordinate, not only the index
    base = np.floor(centre).astype(int)
    taps = range(-1, 3) if method == "bicubic" else range(0, 2)
    matrix = np.zeros((n_out, n_in))
    for tap in taps:
        distance = base + tap - centre
        weight = _cubic(distance, -0.75) if method == "bicubic" else _triangle(distance)
        np.add.at(matrix, (np.arange(n_out), np.clip(base + tap, 0, n_in - 1)), weight)
    return matrix


def _antialiased_matrix(n_in: int, n_out: int, method: str) -> np.ndarray:
    """antialias=True: Pillow's filters (cubic a = -0.5), stretched when shrinking and renormalised at borders."""
    scale = n_in / n_out
    stretch = max(scale, 1.0)
    support = stretch * (2.0 if method == "bicubic" else 1.0)
    matrix = np.zeros((n_out, n_in))
    for row in range(n_out):
        centre = scale * (row + 0.5)
        low, high = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), n_in)
        distance = (np.arange(low, high) + 0.5 - centre) / stretch
        weight = _cubic(distance, -0.5) if method == "bicubic" else _triangle(distance)
        matrix[row, low:high] = weight / weight.sum()
    return matrix


@functools.lru_cache(maxsize=256)
def resize_matrix(n_in: int, n_out: int, method: str = "bicubic", antialias: bool = False) -> np.ndarray:
    """The [n_out, n_in] float32 matrix that resizes one axis.

    Args:
      n_in, n_out: lengths of the axis before and after, at least 1.
      method: "bicubic" or "bilinear".
      antialias: widen the filter when shrinking, as `torch.nn.functional.interpolate(antialias=True)` does.

    Raises:
      ValueError: for an unknown method or a length below 1.
    """
    if method not in ("bicubic", "bilinear"):
        raise ValueError(f"unknown resize method {method!r}: use 'bicubic' or 'bilinear'")
    if min(n_in, n_out) < 1:
        raise ValueError(f"cannot resize an axis of length {n_in} to {n_out}: both must be at least 1")
    if n_in == n_out:
        return np.eye(n_in, dtype=np.float32)
    build = _antialiased_matrix if antialias else _sampled_matrix
    return build(n_in, n_out, method).astype(np.float32)


def resize(x_BxHxWxC: jax.Array, size: tuple[int, int], method: str = "bicubic", antialias: bool = False) -> jax.Array:
    """Resizes [B, H, W, C] to [B, h, w, C] for `size` = (h, w), in float32, as PyTorch does (align_corners=False)."""
    height, width = x_BxHxWxC.shape[1:3]
    x = x_BxHxWxC.astype(jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    if height != size[0]:
        x = jnp.einsum("oh,bhwc->bowc", resize_matrix(height, size[0], method, antialias), x, precision=highest)
    if width != size[1]:
        x = jnp.einsum("ow,bhwc->bhoc", resize_matrix(width, size[1], method, antialias), x, precision=highest)
    return x
