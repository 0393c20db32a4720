"""Resizing of images, token grids and position tables as PyTorch and Pillow do it, as two small dense matrices.

`jax.image.resize` uses another cubic coefficient (-0.5), renormalises at borders, and knows no scale that is not the
ratio of the two lengths, so it cannot reproduce the "PyTorch's builtin interpolation with bicubic mode" of EUPE §3.1,
nor the position tables of published towers. Resizing is linear and separable: one [out, in] matrix per axis gives exact
parity, is differentiable, and runs as matmuls on every accelerator.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

METHODS = {"bilinear": 1.0, "bicubic": 2.0}  # half-width of the kernel


@functools.lru_cache(maxsize=256)
def resize_matrix(
    n_in: int,
    n_out: int,
    method: str = "bicubic",
    antialias: bool = False,
    *,
    align_corners: bool = False,
    offset: float = 0.0,
) -> np.ndarray:
    """The [n_out, n_in] float32 matrix that resizes one axis.

    Args:
      n_in, n_out: lengths of the axis before and after, at least 1.
      method: "bicubic" or "bilinear".
      antialias: widen the filter when shrinking, as `torch.nn.functional.interpolate(antialias=True)` and Pillow do.
      align_corners: as of PyTorch's `interpolate`; not together with `antialias`.
      offset: added to `n_out` where the scale is computed, as DINO's family does (0.1); it shifts samples.

    Raises:
      ValueError: for an unknown method or a length below 1.
    """
    if method not in METHODS:
        raise ValueError(f"unknown resize method {method!r}: use 'bicubic' or 'bilinear'")
    if min(n_in, n_out) < 1:
        raise ValueError(f"cannot resize an axis of length {n_in} to {n_out}: both must be at least 1")
    if n_in == n_out and not offset:
        return np.eye(n_in, dtype=np.float32)
    scale = n_in / (n_out + offset)
    centre = (np.arange(n_out) + 0.5) * scale  # on an axis where entry j covers j to j + 1
    if antialias:
        return _antialiased(n_in, centre, scale, method)
    centre = np.arange(n_out) * (n_in - 1) / max(n_out - 1, 1) if align_corners else centre - 0.5
    return _sampled(n_in, centre, method)


def _sampled(n_in: int, centre: np.ndarray, method: str) -> np.ndarray:
    """Cubic coefficient -0.75, border indices clamped."""
    if method == "bilinear":
        centre = np.maximum(centre, 0.0)  # PyTorch clamps the source coordinate, not only the index
    base = np.floor(centre).astype(int)
    matrix = np.zeros((len(centre), n_in))
    for tap in range(1 - int(METHODS[method]), 1 + int(METHODS[method])):
        weight = _kernel(base + tap - centre, method, -0.75)
        np.add.at(matrix, (np.arange(len(centre)), np.clip(base + tap, 0, n_in - 1)), weight)
    return matrix.astype(np.float32)


def _antialiased(n_in: int, centre: np.ndarray, scale: float, method: str) -> np.ndarray:
    """Pillow's filters: cubic coefficient -0.5, stretched when shrinking and renormalised at borders."""
    stretch = max(scale, 1.0)
    reach = METHODS[method] * stretch
    matrix = np.zeros((len(centre), n_in))
    for row, c in enumerate(centre):
        low, high = max(int(c - reach + 0.5), 0), min(int(c + reach + 0.5), n_in)
        weight = _kernel((np.arange(low, high) + 0.5 - c) / stretch, method, -0.5)
        matrix[row, low:high] = weight / weight.sum()
    return matrix.astype(np.float32)


def _kernel(distance: np.ndarray, method: str, a: float) -> np.ndarray:
    """Triangle, or the cubic of coefficient `a`."""
    x = np.abs(distance)
    if method == "bilinear":
        return np.maximum(0.0, 1.0 - x)
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, inner, np.where(x < 2, outer, 0.0))


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

    Arguments are those of `resize_matrix`. A table at its own size stays as it is.

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
    rows, columns = (
        resize_matrix(side, length, method, antialias, align_corners=align_corners, offset=offset) for length in size
    )
    table = table.reshape(side, side, dim)
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("yh,xw,hwd->yxd", rows, columns, table, precision=highest).reshape(-1, dim)
