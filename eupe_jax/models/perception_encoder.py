"""Perception Encoder vision towers (PE core, PE lang and PE spatial), from their published behaviour.

Two of EUPE's three stage-1 experts (EUPE §4.1) are of this family. They differ from the ViT of `vit.py` in an absolute
position table, interleaved 2-D rotary positions on integer coordinates, a norm before the blocks, and attention
pooling instead of a class token that is read out.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from eupe_jax.models.attention_pool import AttentionPool
from eupe_jax.models.layers import Activation, AttentionFn, LayerNorm, PatchEmbed, check_fit, exact_gelu, stack_blocks
from eupe_jax.models.resize import resize_positions
from eupe_jax.models.rope import Rotation
from eupe_jax.models.spec import EncoderSpec, Family, Layout, Tensor
from eupe_jax.models.transformer import BLOCK_ROWS, Block, attention_rows, mlp_rows, norm_rows

CLS_OUTPUTS = ("pool", "proj", "none")
PATCH_OUTPUTS = ("norm", "raw")
ROPE_THETA = 10000.0


def rope_table(height: int, width: int, head_dim: int, offset: int = 0) -> tuple[jax.Array, jax.Array]:
    """Sine and cosine of a row-major `height x width` grid: two float32 [height * width, head_dim].

    The first half of a head turns with the column (x), the second with the row (y); every angle fills two neighbouring
    channels. Positions are integers from `offset`, which is 1 where a class token holds position 0.

    Raises:
      ValueError: head_dim is not a multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"2-D RoPE needs a head width that is a multiple of 4, got {head_dim}")
    frequencies = ROPE_THETA ** -(np.arange(0, head_dim // 2, 2) / (head_dim // 2))
    rows, columns = np.meshgrid(np.arange(height) + offset, np.arange(width) + offset, indexing="ij")
    positions_Nx2 = np.stack([columns, rows], axis=-1).reshape(-1, 2)
    angles = np.repeat((positions_Nx2[..., None] * frequencies).reshape(height * width, -1), 2, axis=-1)
    return jnp.asarray(np.sin(angles), jnp.float32), jnp.asarray(np.cos(angles), jnp.float32)


def rotate_interleaved(x_BxTxHxD: jax.Array, sin_NxD: jax.Array, cos_NxD: jax.Array) -> jax.Array:
    """Rotates channel pairs (0, 1), (2, 3), ... of the last N of T tokens, in float32. Same shape and dtype back."""
    n_prefix = x_BxTxHxD.shape[1] - sin_NxD.shape[0]
    prefix, x = x_BxTxHxD[:, :n_prefix], x_BxTxHxD[:, n_prefix:].astype(jnp.float32)
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
    x = x * cos_NxD[None, :, None] + turned * sin_NxD[None, :, None]
    return jnp.concatenate([prefix, x.astype(prefix.dtype)], axis=1)


NEIGHBOURS = Rotation(rotate_interleaved, interleaved=True)


class PerceptionEncoder(nn.Module):
    """Perception Encoder vision tower. Sequence: [class token if any, patches row-major].

    Attributes:
      mlp_dim: hidden width of the feed-forward layers.
      image_size: native side in pixels; fixes the size of the position table, other sizes interpolate it.
      cls_token: whether a class token joins the sequence. It is never the encoder's "cls".
      final_norm: whether a norm follows the blocks.
      pool_heads: heads of the attention pool; None: no pool.
      output_dim: width of the projection behind the pool; None: no projection.
      layerscale_init: initial LayerScale factor; None: no LayerScale.
      cls_output: the encoder's "cls": "pool" (pooled, before the projection), "proj" (projected, the embedding that is
        compared with text) or "none". EUPE §3.2 gives class and patch targets one width, which only "pool" has.
      patch_output: the encoder's "patches": after the final norm ("norm") or before it ("raw").
      dtype, residual_dtype, remat, scan_unroll, attention_fn, gelu, materialize: as for `vit.VisionTransformer`.
    """

    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    patch_size: int
    image_size: int
    cls_token: bool = True
    final_norm: bool = True
    pool_heads: int | None = 8
    output_dim: int | None = None
    layerscale_init: float | None = None
    cls_output: str = "pool"
    patch_output: str = "norm"
    norm_eps: float = 1e-5
    dtype: Any = jnp.float32
    residual_dtype: Any = jnp.float32
    remat: str = "none"
    scan_unroll: int = 1
    attention_fn: AttentionFn | None = None
    gelu: Activation = exact_gelu
    materialize: bool = False

    rotation: ClassVar[Rotation] = NEIGHBOURS  # of queries and keys

    @nn.compact
    def features(
        self,
        images: jax.Array,
        *,
        train: bool = False,
        layers: Sequence[int] = (),
        norm_layers: bool = True,
    ) -> dict[str, Any]:
        """All tokens, before and after the final norm, the image's summary, and the tokens of chosen blocks.

        Args:
          images: float [B, H, W, 3], pixel-normalised. Sides that are no multiple of the patch are cut off.
          train: accepted for the common interface; nothing here depends on it.
          layers: blocks whose output is wanted, negative ones counted from the end.
          norm_layers: whether these outputs pass the final norm, where the tower has one.

        Returns:
          "prenorm", "normed": [B, T, D] around the final norm (equal without one), T = h * w, + 1 with a class token;
          "patches" [B, h, w, D] as `patch_output` says, "storage" [B, 0, D];
          "pooled" [B, D] and "embedding" [B, output_dim] (before unit length), where the tower has them;
          "layers": a list of {"cls" (with a class token), "storage", "patches"}, one per entry of `layers`.

        Raises:
          ValueError: image smaller than a patch, `layers` out of range, or settings that contradict each other.
        """
        del train
        self._check()
        if any(not -self.depth <= i < self.depth for i in layers):
            raise ValueError(f"layers {tuple(layers)} out of range for a model of {self.depth} blocks")
        patches = PatchEmbed(self.width, self.patch_size, self.dtype, use_bias=False, name="patch_embed")(images)
        batch, h, w, dim = patches.shape
        x = self._embed_positions(patches.reshape(batch, h * w, dim).astype(self.residual_dtype), h, w)
        x = LayerNorm(self.norm_eps, self.residual_dtype, name="pre_norm")(x)

        blocks = stack_blocks(Block, self.depth, remat=self.remat, unroll=self.scan_unroll, broadcast_args=2)(
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            layerscale_init=self.layerscale_init,
            norm_eps=self.norm_eps,
            rotation=self.rotation,
            dtype=self.dtype,
            attention_fn=self.attention_fn,
            gelu=self.gelu,
            materialize=self.materialize,
            collect=bool(layers),
            name="blocks",
        )
        x, per_block = blocks(x, *rope_table(h, w, dim // self.num_heads, offset=int(self.cls_token)))
        norm = LayerNorm(self.norm_eps, name="norm") if self.final_norm else lambda tokens: tokens
        normed = norm(x)

        def split(tokens):
            cls = {"cls": tokens[:, 0]} if self.cls_token else {}
            body = tokens[:, int(self.cls_token) :].reshape(batch, h, w, dim)
            return {**cls, "storage": tokens[:, :0], "patches": body}

        # The summary is always computed, so that its parameters exist whatever the outputs; jit drops what is unused.
        summary = {}
        if self.pool_heads is not None:
            pool = AttentionPool(self.pool_heads, self.norm_eps, self.dtype, gelu=self.gelu, name="attn_pool")
            summary["pooled"] = pool(normed)
        if self.output_dim is not None:
            proj = self.param("proj", nn.initializers.normal(dim**-0.5), (dim, self.output_dim))
            summary["embedding"] = summary["pooled"] @ proj
        tokens = split(normed if self.patch_output == "norm" else x)
        return {
            **summary,
            "storage": tokens["storage"].astype(jnp.float32),
            "patches": tokens["patches"].astype(jnp.float32),
            "prenorm": x,
            "normed": normed,
            "layers": [split(norm(per_block[i]) if norm_layers else per_block[i]) for i in layers],
        }

    def __call__(self, images: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """[B, H, W, 3] -> {"cls": [B, D] or [B, output_dim] or absent, "storage": [B, 0, D], "patches": [B, h, w, D]}.

        float32; see `cls_output`, `patch_output` and `features`.

        Raises:
          ValueError: as `features`, and for sides that are no multiple of the patch.
        """
        check_fit(images, self.patch_size)
        out = self.features(images, train=train)
        source = {"pool": "pooled", "proj": "embedding", "none": None}[self.cls_output]
        cls = {} if source is None else {"cls": out[source]}
        return {**cls, "storage": out["storage"], "patches": out["patches"]}

    def _embed_positions(self, x: jax.Array, h: int, w: int) -> jax.Array:
        """Puts the class token, if any, before the patches [B, h * w, D] and adds the position table."""
        grid, n_cls = self.image_size // self.patch_size, int(self.cls_token)
        init = nn.initializers.normal(self.width**-0.5)
        positions = self.param("pos_embed", init, (grid * grid + n_cls, self.width))
        x = x + resize_positions(positions[n_cls:], (h, w), "bilinear").astype(x.dtype)
        if not self.cls_token:
            return x
        cls = self.param("cls_token", init, (self.width,)) + positions[0]
        return jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, self.width)).astype(x.dtype), x], axis=1)

    def _check(self) -> None:
        for name, allowed in (("cls_output", CLS_OUTPUTS), ("patch_output", PATCH_OUTPUTS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.pool_heads is None and self.output_dim is not None:
            raise ValueError(f"output_dim={self.output_dim} projects the pooled tokens and needs pool_heads")
        if self.pool_heads is None and self.cls_output != "none":
            raise ValueError(f"cls_output={self.cls_output!r} needs pool_heads; a tower without a pool takes 'none'")
        if self.cls_output == "proj" and self.output_dim is None:
            raise ValueError("cls_output='proj' needs output_dim")
        if self.patch_output == "norm" and not self.final_norm:
            raise ValueError("patch_output='norm' needs final_norm; a tower without it takes 'raw'")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        for name in ("num_heads", "pool_heads"):
            if self.width % (getattr(self, name) or 1):
                raise ValueError(f"width {self.width} is not a multiple of {name} {getattr(self, name)}")


def _describe(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    module = PerceptionEncoder(**kwargs)
    return {
        "cls_dim": {"pool": module.width, "proj": module.output_dim}.get(module.cls_output),
        "patch_dim": module.width,
        "patch_size": module.patch_size,
        "num_storage_tokens": 0,
        "resolution": module.image_size,
    }


TABLE = (
    Tensor("params/patch_embed/kernel", "conv1.weight", "conv"),
    Tensor("params/cls_token", "class_embedding"),
    Tensor("params/pos_embed", "positional_embedding"),
    *norm_rows("pre_norm", "ln_pre"),
    *BLOCK_ROWS,
    *norm_rows("norm", "ln_post"),
    Tensor("params/attn_pool/probe", "attn_pool.probe"),
    *attention_rows("attn_pool/attn", "attn_pool.attn"),
    *norm_rows("attn_pool/norm", "attn_pool.layernorm"),
    *mlp_rows("attn_pool/mlp", "attn_pool.mlp"),
    Tensor("params/proj", "proj"),
)


def _spec(name: str, hub: str, size: tuple[int, ...], **kwargs: Any) -> EncoderSpec:
    fields = ("width", "depth", "num_heads", "mlp_dim", "patch_size", "image_size")
    kwargs = {**dict(zip(fields, size, strict=True)), **kwargs}
    return EncoderSpec(
        name,
        "perception_encoder",
        kwargs,
        **_describe(kwargs),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        licence="Apache-2.0",
        hub_repo=f"facebook/{hub}",
        hub_file=f"{hub}.pt",
    )


# The spatially aligned towers are whole core towers with nothing behind them; only the largest has LayerScale. Its
# settings are the authors' published ones, those of the smaller four were read in public copies of theirs and in timm.
# The language-aligned towers are cut before their last blocks and all have LayerScale; "Tiling" is another training
# of the same architecture.
_SPATIAL = {"final_norm": False, "pool_heads": None, "cls_output": "none", "patch_output": "raw"}
_LANG = {**_SPATIAL, "layerscale_init": 0.1}

SPECS = (
    _spec("pe_core_t16_384", "PE-Core-T16-384", (192, 12, 3, 768, 16, 384), output_dim=512),
    _spec("pe_core_s16_384", "PE-Core-S16-384", (384, 12, 6, 1536, 16, 384), output_dim=512),
    _spec("pe_core_b16_224", "PE-Core-B16-224", (768, 12, 12, 3072, 16, 224), output_dim=1024),
    _spec("pe_core_l14_336", "PE-Core-L14-336", (1024, 24, 16, 4096, 14, 336), output_dim=1024),
    _spec("pe_core_g14_448", "PE-Core-G14-448", (1536, 50, 16, 8960, 14, 448), output_dim=1280, cls_token=False),
    _spec("pe_lang_l14_448", "PE-Lang-L14-448", (1024, 23, 16, 4096, 14, 448), **_LANG),
    _spec("pe_lang_g14_448", "PE-Lang-G14-448", (1536, 47, 16, 8960, 14, 448), cls_token=False, **_LANG),
    _spec("pe_lang_l14_448_tiling", "PE-Lang-L14-448-Tiling", (1024, 23, 16, 4096, 14, 448), **_LANG),
    _spec("pe_lang_g14_448_tiling", "PE-Lang-G14-448-Tiling", (1536, 47, 16, 8960, 14, 448), cls_token=False, **_LANG),
    _spec("pe_spatial_t16_512", "PE-Spatial-T16-512", (192, 12, 3, 768, 16, 512), **_SPATIAL),
    _spec("pe_spatial_s16_512", "PE-Spatial-S16-512", (384, 12, 6, 1536, 16, 512), **_SPATIAL),
    _spec("pe_spatial_b16_512", "PE-Spatial-B16-512", (768, 12, 12, 3072, 16, 512), **_SPATIAL),
    _spec("pe_spatial_l14_448", "PE-Spatial-L14-448", (1024, 24, 16, 4096, 14, 448), **_SPATIAL),
    _spec(
        "pe_spatial_g14_448",
        "PE-Spatial-G14-448",
        (1536, 50, 16, 8960, 14, 448),
        cls_token=False,
        layerscale_init=0.1,
        **_SPATIAL,
    ),
)

# The text tower's names, beside the vision tower's in files of core models.
TEXT_NAMES = (
    "token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection", "logit_scale"
)  # fmt: skip
LAYOUTS = {"official": Layout(TABLE, within="visual.", beside=TEXT_NAMES)}
FAMILY = Family("perception_encoder", PerceptionEncoder, SPECS, _describe, LAYOUTS)
