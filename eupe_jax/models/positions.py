"""Learned position tables at other grids than their own, as PyTorch interpolates them: two small matrices per table.

`jax.image.resize` knows neither PyTorch's cubic (coefficient -0.75, border taps clamped) nor a scale that is not the
ratio of the two lengths, and published towers rely on both.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

METHODS = {"bilinear": 1.0, "bicubic": 2.0}  # half-width of the kernel


def resize_positions(
    table_NxD: jax.Array,
    size: tuple[int, int],
    method: str,
    *,
    align_corners: bool = False,
    antialias: bool = False,
    offset: float = 0.0,
) -> jax.Array:
    """A square, row-major position table [side * side, D] at `size` = (rows, columns): float32 [rows * columns, D].

    Args:
      method: "bilinear" or "bicubic"; with `align_corners` and `antialias` (not both) as of PyTorch's `interpolate`.
      offset: added to rows and columns where the scale is computed, as DINO's family does (0.1); it shifts samples.

    Raises:
      ValueError: the table is not square, or the method unknown.
    """
    n, dim = table_NxD.shape
    side = round(n**0.5)
    if side * side != n:
        raise ValueError(f"a position table of {n} rows is not square")
    table = table_NxD.astype(jnp.float32)
    if size == (side, side):
        return table
    rows, columns = (_matrix(side, length, method, align_corners, antialias, offset) for length in size)
    table = table.reshape(side, side, dim)
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("yh,xw,hwd->yxd", rows, columns, table, precision=highest).reshape(-1, dim)


@functools.lru_cache(maxsize=64)
def _matrix(n_in: int, n_out: int, method: str, align_corners: bool, antialias: bool, offset: float) -> np.ndarray:
    """float32 [n_out, n_in]: one axis of the interpolation."""
    if method not in METHODS:
        raise ValueError(f"position tables are interpolated by {' or '.join(METHODS)}, not {method!r}")
    scale = n_in / (n_out + offset)
    centre = (np.arange(n_out) + 0.5) * scale  # on an axis where entry j of the table covers j to j + 1
    matrix = np.zeros((n_out, n_in))
    if antialias:
        # Pillow's filter: cubic coefficient -0.5, stretched when shrinking, renormalised at the borders.
        stretch = max(scale, 1.0)
        reach = METHODS[method] * stretch
        for row, c in enumerate(centre):
            low, high = max(int(c - reach + 0.5), 0), min(int(c + reach + 0.5), n_in)
            weight = _kernel((np.arange(low, high) + 0.5 - c) / stretch, method, -0.5)
            matrix[row, low:high] = weight / weight.sum()
        return matrix.astype(np.float32)
    centre = np.arange(n_out) * (n_in - 1) / max(n_out - 1, 1) if align_corners else centre - 0.5
    if method == "bilinear":
        centre = np.maximum(centre, 0.0)
    base = np.floor(centre).astype(int)
    for tap in range(1 - int(METHODS[method]), 1 + int(METHODS[method])):
        weight = _kernel(base + tap - centre, method, -0.75)
        np.add.at(matrix, (np.arange(n_out), np.clip(base + tap, 0, n_in - 1)), weight)
    return matrix.astype(np.float32)


def _kernel(distance: np.ndarray, method: str, a: float) -> np.ndarray:
    """Triangle, or the cubic of coefficient `a`."""
    x = np.abs(distance)
    if method == "bilinear":
        return np.maximum(0.0, 1.0 - x)
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, inner, np.where(x < 2, outer, 0.0))
