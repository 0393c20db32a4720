"""ConvMixer (arXiv 2201.09792) as a family of encoders: patches, then depthwise and pointwise convolutions.

Differs from the original in LayerNorm for batch norm: nothing here keeps running averages, and a step may see few
images. The class token is the normed average of the last map. Its place is eupe_jax/models/convmixer.py.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from eupe_jax.models.layers import Activation, LayerNorm, check_fit, exact_gelu, stack_blocks
from eupe_jax.models.spec import EncoderSpec, Family

NORM_EPS = 1e-6


class Block(nn.Module):
    """x + norm(gelu(depthwise(x))), then norm(gelu(pointwise(x))). One step of the scan."""

    kernel_size: int
    dtype: Any
    gelu: Activation

    @nn.compact
    def __call__(self, x_BxhxwxD: jax.Array) -> tuple[jax.Array, None]:
        dim, window = x_BxhxwxD.shape[-1], (self.kernel_size, self.kernel_size)
        spatial = nn.Conv(dim, window, feature_group_count=dim, dtype=self.dtype, name="dwconv")(x_BxhxwxD)
        x = x_BxhxwxD + LayerNorm(NORM_EPS, name="norm1")(self.gelu(spatial))
        pointwise = nn.Dense(dim, dtype=self.dtype, name="pwconv1")(x)
        return LayerNorm(NORM_EPS, name="norm2")(self.gelu(pointwise)).astype(x_BxhxwxD.dtype), None


class ConvMixer(nn.Module):
    """ConvMixer encoder: the grid keeps its size, so the patch size is the stride.

    Attributes:
      width, depth, kernel_size, patch_size: as in the paper.
      dtype: of products. remat, scan_unroll: see `layers.stack_blocks`; every student's module must take `remat`.
      gelu: chosen by the chip (training/kernels.py) where a module has this field.
    """

    width: int = 256
    depth: int = 8
    kernel_size: int = 9
    patch_size: int = 16
    dtype: Any = jnp.float32
    remat: str = "none"
    scan_unroll: int = 1
    gelu: Activation = exact_gelu

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """[B, H, W, 3], pixel-normalised -> {"cls": [B, D], "storage": [B, 0, D], "patches": [B, h, w, D]}, float32.

        Raises:
          ValueError: sides that are no multiple of the patch size.
        """
        del train  # nothing here depends on it
        check_fit(images, self.patch_size)
        side = (self.patch_size, self.patch_size)
        x = nn.Conv(self.width, side, strides=side, padding="VALID", dtype=self.dtype, name="patch_embed")(images)
        x = LayerNorm(NORM_EPS, name="stem_norm")(self.gelu(x))
        blocks = stack_blocks(Block, self.depth, remat=self.remat, unroll=self.scan_unroll)
        x, _ = blocks(self.kernel_size, self.dtype, self.gelu, name="blocks")(x)
        norm = LayerNorm(NORM_EPS, name="norm")
        storage = jnp.zeros((images.shape[0], 0, self.width), jnp.float32)
        return {"cls": norm(x.mean(axis=(1, 2), dtype=jnp.float32)), "storage": storage, "patches": norm(x)}


def _describe(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What an EncoderSpec says that follows from the constructor's arguments."""
    module = ConvMixer(**kwargs)
    width = module.width
    return {"cls_dim": width, "patch_dim": width, "patch_size": module.patch_size, "num_storage_tokens": 0}


def _spec(name: str, **kwargs: Any) -> EncoderSpec:
    return EncoderSpec(name, "convmixer", kwargs, **_describe(kwargs), licence="")  # no weights were published


SPECS = (
    _spec("convmixer_small", width=256, depth=8),
    _spec("convmixer_base", width=512, depth=16),
)

FAMILY = Family("convmixer", ConvMixer, SPECS, _describe)
