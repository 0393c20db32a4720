"""SigLIP 2 vision towers, from their published behaviour: a plain ViT whose summary is an attention pool.

No class token joins the sequence: a learned table gives the positions (bicubic at other sizes than the native one), a
final norm follows the blocks, and one probe reads all tokens. These are the towers of fixed resolution; the "naflex"
ones, which take patch sequences, are another architecture. GELU is the tanh approximation throughout.

Sizes are those of the published configurations, but no weights were at hand to check them against; the forward pass,
the names and the parameter counts are tested against the independent PyTorch implementation in transformers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from eupe_jax.models.attention_pool import AttentionPool
from eupe_jax.models.layers import Activation, AttentionFn, LayerNorm, PatchEmbed, check_fit, stack_blocks, tanh_gelu
from eupe_jax.models.resize import resize_positions
from eupe_jax.models.spec import EncoderSpec, Family, Layout, Tensor
from eupe_jax.models.transformer import Block, dense_rows, norm_rows


class SiglipVision(nn.Module):
    """SigLIP 2 vision tower. Sequence: patches, row-major.

    Attributes:
      mlp_dim: hidden width of the feed-forward layers, the pool's included.
      num_heads: heads of the blocks and of the pool.
      image_size: native side in pixels; fixes the size of the position table, other sizes interpolate it.
      dtype, residual_dtype, remat, scan_unroll, attention_fn, gelu, materialize: as for `vit.VisionTransformer`.
    """

    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    patch_size: int
    image_size: int
    norm_eps: float = 1e-6
    dtype: Any = jnp.float32
    residual_dtype: Any = jnp.float32
    remat: str = "none"
    scan_unroll: int = 1
    attention_fn: AttentionFn | None = None
    gelu: Activation = tanh_gelu
    materialize: bool = False

    @nn.compact
    def features(
        self, images: jax.Array, *, train: bool = False, layers: Sequence[int] = (), norm_layers: bool = True
    ) -> dict[str, Any]:
        """All tokens, before and after the final norm, the image's summary, and the tokens of chosen blocks.

        Args:
          images: float [B, H, W, 3], pixel-normalised. Sides that are no multiple of the patch are cut off.
          train: accepted for the common interface; nothing here depends on it.
          layers: blocks whose output is wanted, negative ones counted from the end.
          norm_layers: whether these outputs pass the final norm.

        Returns:
          "prenorm", "normed": [B, h * w, D] around the final norm; "patches" [B, h, w, D] after it, "storage"
          [B, 0, D]; "pooled" [B, D]; "layers": a list of {"storage", "patches"}, one per entry of `layers`.

        Raises:
          ValueError: image smaller than a patch, width not divisible by the heads, or `layers` out of range.
        """
        del train
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        if any(not -self.depth <= i < self.depth for i in layers):
            raise ValueError(f"layers {tuple(layers)} out of range for a model of {self.depth} blocks")
        patches = PatchEmbed(self.width, self.patch_size, self.dtype, name="patch_embed")(images)
        batch, h, w, dim = patches.shape
        grid = self.image_size // self.patch_size
        table = self.param("pos_embed", nn.initializers.normal(dim**-0.5), (grid * grid, dim))
        x = patches.reshape(batch, h * w, dim).astype(self.residual_dtype)
        x = x + resize_positions(table, (h, w), "bicubic").astype(x.dtype)

        blocks = stack_blocks(Block, self.depth, remat=self.remat, unroll=self.scan_unroll)(
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            norm_eps=self.norm_eps,
            dtype=self.dtype,
            attention_fn=self.attention_fn,
            gelu=self.gelu,
            materialize=self.materialize,
            collect=bool(layers),
            name="blocks",
        )
        x, per_block = blocks(x)
        norm = LayerNorm(self.norm_eps, name="norm")
        normed = norm(x)
        pool = AttentionPool(self.num_heads, self.norm_eps, self.dtype, self.mlp_dim, self.gelu, name="attn_pool")

        def split(tokens):
            return {"storage": tokens[:, :0], "patches": tokens.reshape(batch, h, w, dim)}

        return {
            **split(normed),
            "pooled": pool(normed),
            "prenorm": x,
            "normed": normed,
            "layers": [split(norm(per_block[i]) if norm_layers else per_block[i]) for i in layers],
        }

    def __call__(self, images: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """[B, H, W, 3] -> {"cls": [B, D] (the pool's), "storage": [B, 0, D], "patches": [B, h, w, D]}, float32.

        Raises:
          ValueError: as `features`, and for sides that are no multiple of the patch. The native size always fits:
            so400m/14 was published for 384 pixels, of which it reads 378.
        """
        if images.shape[1:3] != (self.image_size, self.image_size):
            check_fit(images, self.patch_size)
        out = self.features(images, train=train)
        return {"cls": out["pooled"], "storage": out["storage"], "patches": out["patches"]}


def _describe(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    module = SiglipVision(**kwargs)
    return {
        "cls_dim": module.width,
        "patch_dim": module.width,
        "patch_size": module.patch_size,
        "num_storage_tokens": 0,
        "resolution": module.image_size,
    }


TRANSFORMERS = Layout(
    (
        Tensor("params/patch_embed/kernel", "embeddings.patch_embedding.weight", "conv"),
        Tensor("params/patch_embed/bias", "embeddings.patch_embedding.bias"),
        Tensor("params/pos_embed", "embeddings.position_embedding.weight"),
        *norm_rows("blocks/norm1", "encoder.layers.{i}.layer_norm1"),
        *dense_rows("blocks/attn/qkv", *(f"encoder.layers.{{i}}.self_attn.{part}_proj" for part in "qkv")),
        *dense_rows("blocks/attn/proj", "encoder.layers.{i}.self_attn.out_proj"),
        *norm_rows("blocks/norm2", "encoder.layers.{i}.layer_norm2"),
        *dense_rows("blocks/mlp/fc1", "encoder.layers.{i}.mlp.fc1"),
        *dense_rows("blocks/mlp/fc2", "encoder.layers.{i}.mlp.fc2"),
        *norm_rows("norm", "post_layernorm"),
        Tensor("params/attn_pool/probe", "head.probe"),
        Tensor("params/attn_pool/attn/qkv/kernel", "head.attention.in_proj_weight", "linear"),
        Tensor("params/attn_pool/attn/qkv/bias", "head.attention.in_proj_bias"),
        *dense_rows("attn_pool/attn/proj", "head.attention.out_proj"),
        *norm_rows("attn_pool/norm", "head.layernorm"),
        *dense_rows("attn_pool/mlp/fc1", "head.mlp.fc1"),
        *dense_rows("attn_pool/mlp/fc2", "head.mlp.fc2"),
    ),
    within="vision_model.",
    beside=("text_model.", "logit_scale", "logit_bias"),
)

# size -> width, depth, heads, hidden width
SIZES = {
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "giant_opt": (1536, 40, 16, 6144),
}


def _spec(size: str, patch_size: int, image_size: int) -> EncoderSpec:
    width, depth, heads, mlp_dim = SIZES[size]
    kwargs = {
        "width": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_dim": mlp_dim,
        "patch_size": patch_size,
        "image_size": image_size,
    }
    return EncoderSpec(
        f"siglip2_{size}_patch{patch_size}_{image_size}",
        "siglip",
        kwargs,
        **_describe(kwargs),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        licence="Apache-2.0",
        hub_repo=f"google/siglip2-{size.replace('_', '-')}-patch{patch_size}-{image_size}",
        # By its size the largest, with its text tower, comes in several files; not verified.
        hub_file="model.safetensors.index.json" if size == "giant_opt" else "model.safetensors",
    )


SPECS = tuple(
    _spec(size, patch_size, image_size)
    for size, patch_size, image_sizes in (
        ("base", 32, (256,)),
        ("base", 16, (224, 256, 384, 512)),
        ("large", 16, (256, 384, 512)),
        ("so400m", 14, (224, 384)),
        ("so400m", 16, (256, 384, 512)),
        ("giant_opt", 16, (256, 384)),
    )
    for image_size in image_sizes
)

FAMILY = Family("siglip", SiglipVision, SPECS, _describe, {"transformers": TRANSFORMERS})
