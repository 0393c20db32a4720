"""Depthwise convolution in two formulations with the same parameters and results.

"conv" is XLA's grouped convolution, right for accelerators. On CPUs XLA runs it (and more so its gradients) tens of
times slower than the arithmetic needs; "matmul" writes the same sums as batched matrix products, one a channel.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

IMPLEMENTATIONS = ("conv", "matmul")
DENSE_PIXELS = 64  # up to here one [HW, HW] matrix a channel; above, one banded matrix a channel and row offset


def depthwise_conv(x_BxHxWxC: jax.Array, kernel_KxKx1xC: jax.Array) -> jax.Array:
    """'SAME' depthwise convolution, stride 1, odd K: XLA's grouped convolution."""
    return jax.lax.conv_general_dilated(
        x_BxHxWxC,
        kernel_KxKx1xC,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x_BxHxWxC.shape[-1],
    )


def _band(size: int, k: int) -> np.ndarray:
    """[size out, size in, k]: 1 where input i meets output o through tap t, that is i - o + k // 2 == t."""
    tap = np.arange(size)[None, :] - np.arange(size)[:, None] + k // 2
    return (tap[:, :, None] == np.arange(k)).astype(np.float32)


def depthwise_matmul(x_BxHxWxC: jax.Array, kernel_KxKx1xC: jax.Array) -> jax.Array:
    """The same as `depthwise_conv`, as matrix products batched over channels."""
    batch, height, width, channels = x_BxHxWxC.shape
    k = kernel_KxKx1xC.shape[0]
    taps = kernel_KxKx1xC[:, :, 0].astype(x_BxHxWxC.dtype)
    columns = _band(width, k).astype(taps.dtype)
    if height * width <= DENSE_PIXELS:
        rows = _band(height, k).astype(taps.dtype)
        matrix = jnp.einsum("yai,xbj,ijc->cabyx", rows, columns, taps).reshape(channels, height * width, height * width)
        x_CxBxP = x_BxHxWxC.reshape(batch, height * width, channels).transpose(2, 0, 1)
        y_CxBxP = jax.lax.dot_general(x_CxBxP, matrix, (((2,), (1,)), ((0,), (0,))))
        return y_CxBxP.transpose(1, 2, 0).reshape(batch, height, width, channels)
    matrix = jnp.einsum("xpj,ijc->cipx", columns, taps).reshape(channels, k * width, width)
    padded = jnp.pad(x_BxHxWxC.transpose(3, 0, 1, 2), ((0, 0), (0, 0), (k // 2, k // 2), (0, 0)))
    shifted = jnp.concatenate([padded[:, :, i : i + height] for i in range(k)], axis=-1)  # [C, B, H, K * W]
    y = jax.lax.dot_general(
        shifted.reshape(channels, batch * height, k * width), matrix, (((2,), (1,)), ((0,), (0,)))
    )
    return y.reshape(channels, batch, height, width).transpose(1, 2, 3, 0)


class DepthwiseConv(nn.Module):
    """7x7 depthwise convolution with bias; parameters `kernel` [7, 7, 1, C] and `bias` [C] whatever `implementation`.

    Raises:
      ValueError: unknown implementation.
    """

    implementation: str
    dtype: Any
    kernel_init: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.implementation not in IMPLEMENTATIONS:
            raise ValueError(f"depthwise is {self.implementation!r}: use one of {IMPLEMENTATIONS}")
        channels = x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (7, 7, 1, channels)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (channels,)).astype(self.dtype)
        convolve = depthwise_conv if self.implementation == "conv" else depthwise_matmul
        return convolve(x.astype(self.dtype), kernel) + bias
