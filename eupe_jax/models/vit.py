"""The EUPE / DINOv3 vision transformer: class, storage and patch tokens, axial RoPE, LayerScale (official behaviour).

Blocks are scanned, so every parameter of a block has a leading axis of length `depth`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from eupe_jax.models import rope
from eupe_jax.models.layers import (
    Activation,
    Attention,
    AttentionFn,
    LayerNorm,
    PatchEmbed,
    Scale,
    check_fit,
    exact_gelu,
    feed_forward,
    k_bias_mask,
    stack_blocks,
)
from eupe_jax.models.spec import EUPE_EXTRAS, EUPE_PREFIXES, EncoderSpec, Family, Layout, Tensor


class Block(nn.Module):
    """Pre-norm block: x + ls1 * attention(norm1(x)), then x + ls2 * mlp(norm2(x)). One step of the scan."""

    num_heads: int
    ffn_layer: str
    ffn_ratio: float
    ffn_bias: bool
    qkv_bias: bool
    mask_k_bias: bool
    proj_bias: bool
    layerscale_init: float | None
    norm_eps: float
    dtype: Any
    attention_fn: AttentionFn | None
    gelu: Activation
    materialize: bool
    collect: bool

    @nn.compact
    def __call__(self, x: jax.Array, sin: jax.Array, cos: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        dim, stream = x.shape[-1], x.dtype
        attn = Attention(
            self.num_heads, self.qkv_bias, self.mask_k_bias, self.proj_bias, self.dtype, self.attention_fn,
            materialize=self.materialize, name="attn",
        )  # fmt: skip
        mlp = feed_forward(
            self.ffn_layer, dim, self.ffn_ratio, self.ffn_bias, self.dtype, self.gelu, self.materialize, name="mlp"
        )

        def scaled(branch, name):
            return branch if self.layerscale_init is None else Scale(self.layerscale_init, name=name)(branch)

        y = attn(LayerNorm(self.norm_eps, self.dtype, name="norm1")(x), sin, cos)
        x = (x + scaled(y, "ls1")).astype(stream)
        y = mlp(LayerNorm(self.norm_eps, self.dtype, name="norm2")(x))
        x = (x + scaled(y, "ls2")).astype(stream)
        return x, x if self.collect else None


class VisionTransformer(nn.Module):
    """EUPE / DINOv3 ViT. Sequence: [class, storage..., patches row-major]; no absolute positions.

    Attributes:
      ffn_layer, ffn_ratio: "mlp" or "swiglu[alignment]", see `layers.ffn_hidden`.
      layerscale_init: initial LayerScale factor, None for blocks without LayerScale.
      mask_k_bias: keep the key third of the qkv bias out of the computation (it stays in the parameters).
      untie_cls_and_patch_norms: class and storage tokens get a final norm of their own (`cls_norm`).
      untie_global_and_local_cls_norm: holds the parameters of `local_cls_norm`, which encoding never uses.
      rope_*: see `rope.rope_periods`, `rope.patch_coords` and, for train time, `rope.draw_augmentation`.
      dtype: dtype of the matrix products. Norms, softmax, RoPE, parameters and outputs are float32.
      residual_dtype: dtype of the residual stream; bfloat16 would swallow branches scaled by 1e-5.
      remat, scan_unroll: see `layers.stack_blocks`.
      attention_fn: replaces plain attention; (q, k, v), each [B, T, heads, head_dim], -> the same shape.
      gelu: activation of the feed-forward layers, where they have that one.
      materialize: see `layers.written_out`; changes no result.
    """

    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    patch_size: int = 16
    num_storage_tokens: int = 4
    ffn_layer: str = "mlp"
    ffn_ratio: float = 4.0
    ffn_bias: bool = True
    qkv_bias: bool = True
    mask_k_bias: bool = True
    proj_bias: bool = True
    layerscale_init: float | None = 1e-5
    norm_eps: float = 1e-5
    untie_cls_and_patch_norms: bool = False
    untie_global_and_local_cls_norm: bool = False
    rope_base: float | None = 100.0
    rope_min_period: float | None = None
    rope_max_period: float | None = None
    rope_normalize_coords: str = "separate"
    rope_shift: float | None = None
    rope_jitter: float | None = None
    rope_rescale: float | None = 2.0
    dtype: Any = jnp.float32
    residual_dtype: Any = jnp.float32
    remat: str = "none"
    scan_unroll: int = 1
    attention_fn: AttentionFn | None = None
    gelu: Activation = exact_gelu
    materialize: bool = False

    @nn.compact
    def features(
        self,
        images: jax.Array,
        *,
        train: bool = False,
        masks: jax.Array | None = None,
        layers: Sequence[int] = (),
    ) -> dict[str, Any]:
        """All tokens, before and after the final norm, and those of chosen blocks.

        Args:
          images: float [B, H, W, 3], pixel-normalised. Sides that are no multiple of the patch are cut off.
          train: augment the RoPE coordinates (rescale, shift, jitter); takes the rng "rope".
          masks: bool [B, h * w]; True replaces a patch by the mask token.
          layers: blocks whose output is wanted, negative ones counted from the end.

        Returns:
          "cls" [B, D], "storage" [B, R, D], "patches" [B, h, w, D] after the final norm; "prenorm" [B, 1 + R + hw, D];
          "layers", "layers_prenorm": lists of dicts of the first three, one per entry of `layers`, with and without
            the final norm.

        Raises:
          ValueError: image smaller than a patch, width not divisible by the heads, `layers` out of range, masks of
            the wrong shape, or RoPE augmentation without a key.
        """
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        if any(not -self.depth <= i < self.depth for i in layers):
            raise ValueError(f"layers {tuple(layers)} out of range for a model of {self.depth} blocks")
        dim = self.embed_dim
        patches = PatchEmbed(dim, self.patch_size, self.dtype, name="patch_embed")(images)
        batch, h, w, _ = patches.shape
        x = patches.reshape(batch, h * w, dim).astype(self.residual_dtype)

        token_init = nn.initializers.normal(0.02)
        cls_token = self.param("cls_token", token_init, (1, 1, dim))
        prefix = [cls_token]
        if self.num_storage_tokens:
            prefix.append(self.param("storage_tokens", token_init, (1, self.num_storage_tokens, dim)))
        mask_token = self.param("mask_token", nn.initializers.zeros, (1, dim))
        if masks is not None:
            if masks.shape != (batch, h * w):
                raise ValueError(f"masks must be [batch, patches] = {(batch, h * w)}, got {masks.shape}")
            x = jnp.where(masks[..., None], mask_token.astype(x.dtype), x)
        prefix = jnp.concatenate(prefix, axis=1).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(prefix, (batch, *prefix.shape[1:])), x], axis=1)

        blocks = stack_blocks(Block, self.depth, remat=self.remat, unroll=self.scan_unroll, broadcast_args=2)(
            num_heads=self.num_heads,
            ffn_layer=self.ffn_layer,
            ffn_ratio=self.ffn_ratio,
            ffn_bias=self.ffn_bias,
            qkv_bias=self.qkv_bias,
            mask_k_bias=self.mask_k_bias,
            proj_bias=self.proj_bias,
            layerscale_init=self.layerscale_init,
            norm_eps=self.norm_eps,
            dtype=self.dtype,
            attention_fn=self.attention_fn,
            gelu=self.gelu,
            materialize=self.materialize,
            collect=bool(layers),
            name="blocks",
        )
        x, per_block = blocks(x, *self._rope(h, w, train))

        norm = LayerNorm(self.norm_eps, name="norm")
        cls_norm = LayerNorm(self.norm_eps, name="cls_norm") if self.untie_cls_and_patch_norms else norm
        n_prefix = 1 + self.num_storage_tokens
        if self.untie_global_and_local_cls_norm and self.is_initializing():
            LayerNorm(self.norm_eps, name="local_cls_norm")(x[:, :n_prefix])

        def split(tokens, normed):
            head, body = tokens[:, :n_prefix], tokens[:, n_prefix:]
            if normed:
                head, body = cls_norm(head), norm(body)
            return {"cls": head[:, 0], "storage": head[:, 1:], "patches": body.reshape(batch, h, w, dim)}

        return {
            **split(x, True),
            "prenorm": x,
            "layers": [split(per_block[i], True) for i in layers],
            "layers_prenorm": [split(per_block[i], False) for i in layers],
        }

    def __call__(self, images: jax.Array, train: bool = False, masks: jax.Array | None = None) -> dict[str, jax.Array]:
        """[B, H, W, 3] -> {"cls": [B, D], "storage": [B, R, D], "patches": [B, h, w, D]}, float32; see `features`.

        Raises:
          ValueError: as `features`, and for sides that are no multiple of the patch.
        """
        check_fit(images, self.patch_size)
        out = self.features(images, train=train, masks=masks)
        return {name: out[name] for name in ("cls", "storage", "patches")}

    def _rope(self, h: int, w: int, train: bool) -> tuple[jax.Array, jax.Array]:
        """Sine and cosine tables of the h x w grid, augmented at train time."""
        head_dim = self.embed_dim // self.num_heads
        periods = self.variable(
            "buffers",
            "rope_periods",
            lambda: jnp.asarray(
                rope.rope_periods(head_dim, self.rope_base, self.rope_min_period, self.rope_max_period)
            ),
        )
        coords = jnp.asarray(rope.patch_coords(h, w, self.rope_normalize_coords))
        augmentation = {"shift": self.rope_shift, "jitter": self.rope_jitter, "rescale": self.rope_rescale}
        if train and any(v is not None for v in augmentation.values()):
            if not self.has_rng("rope"):
                raise ValueError(
                    "train=True changes the RoPE coordinates and needs rngs={'rope': key}; "
                    "set rope_rescale, rope_shift and rope_jitter to None to train without"
                )
            factor, offset = rope.draw_augmentation(self.make_rng("rope"), **augmentation)
            coords = coords * factor + offset
        return rope.rope_table(periods.value, coords)


def _constants(module: VisionTransformer) -> dict[str, np.ndarray]:
    if not (module.qkv_bias and module.mask_k_bias):
        return {}
    mask = np.asarray(k_bias_mask(module.embed_dim))
    return {f"blocks.{i}.attn.qkv.bias_mask": mask for i in range(module.depth)}


def _describe(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    module = VisionTransformer(**kwargs)
    return {
        "cls_dim": module.embed_dim,
        "patch_dim": module.embed_dim,
        "patch_size": module.patch_size,
        "num_storage_tokens": module.num_storage_tokens,
        "resolution": max(256 // module.patch_size, 1) * module.patch_size,
    }


def _norm(path: str, name: str) -> tuple[Tensor, Tensor]:
    return Tensor(f"params/{path}/scale", f"{name}.weight"), Tensor(f"params/{path}/bias", f"{name}.bias")


def _dense(path: str, name: str) -> tuple[Tensor, Tensor]:
    return Tensor(f"params/{path}/kernel", f"{name}.weight", "linear"), Tensor(f"params/{path}/bias", f"{name}.bias")


TABLE = (
    Tensor("params/cls_token", "cls_token"),
    Tensor("params/storage_tokens", "storage_tokens"),
    Tensor("params/mask_token", "mask_token"),
    Tensor("buffers/rope_periods", "rope_embed.periods"),
    Tensor("params/patch_embed/kernel", "patch_embed.proj.weight", "conv"),
    Tensor("params/patch_embed/bias", "patch_embed.proj.bias"),
    *_norm("blocks/norm1", "blocks.{i}.norm1"),
    *_dense("blocks/attn/qkv", "blocks.{i}.attn.qkv"),
    *_dense("blocks/attn/proj", "blocks.{i}.attn.proj"),
    Tensor("params/blocks/ls1/gamma", "blocks.{i}.ls1.gamma"),
    *_norm("blocks/norm2", "blocks.{i}.norm2"),
    *(row for fc in ("fc1", "fc2", "w1", "w2", "w3") for row in _dense(f"blocks/mlp/{fc}", f"blocks.{{i}}.mlp.{fc}")),
    Tensor("params/blocks/ls2/gamma", "blocks.{i}.ls2.gamma"),
    *_norm("norm", "norm"),
    *_norm("cls_norm", "cls_norm"),
    *_norm("local_cls_norm", "local_cls_norm"),
)

# Hugging Face's DINOv3ViTModel: one projection for each of queries, keys and values, periods computed from a base.
_HF_K_BIAS = "layer.{i}.attention.k_proj.bias"
TRANSFORMERS_TABLE = (
    Tensor("params/cls_token", "embeddings.cls_token"),
    Tensor("params/storage_tokens", "embeddings.register_tokens"),
    Tensor("params/mask_token", "embeddings.mask_token", "batched"),
    Tensor("params/patch_embed/kernel", "embeddings.patch_embeddings.weight", "conv"),
    Tensor("params/patch_embed/bias", "embeddings.patch_embeddings.bias"),
    *_norm("blocks/norm1", "layer.{i}.norm1"),
    Tensor("params/blocks/attn/qkv/kernel", tuple(f"layer.{{i}}.attention.{p}_proj.weight" for p in "qkv"), "linear"),
    Tensor("params/blocks/attn/qkv/bias", tuple(f"layer.{{i}}.attention.{p}_proj.bias" for p in "qkv")),
    *_dense("blocks/attn/proj", "layer.{i}.attention.o_proj"),
    Tensor("params/blocks/ls1/gamma", "layer.{i}.layer_scale1.lambda1"),
    *_norm("blocks/norm2", "layer.{i}.norm2"),
    *(
        row
        for ours, theirs in (("fc1", "up"), ("fc2", "down"), ("w1", "gate"), ("w2", "up"), ("w3", "down"))
        for row in _dense(f"blocks/mlp/{ours}", f"layer.{{i}}.mlp.{theirs}_proj")
    ),
    Tensor("params/blocks/ls2/gamma", "layer.{i}.layer_scale2.lambda1"),
    *_norm("norm", "norm"),
)


def _transformers_constants(module: VisionTransformer) -> dict[str, np.ndarray]:
    """What their module always has: register tokens, be it none, and LayerScale."""
    fixed = {}
    if not module.num_storage_tokens:
        fixed["embeddings.register_tokens"] = np.zeros((1, 0, module.embed_dim), np.float32)
    if module.layerscale_init is None:
        ones = np.ones(module.embed_dim, np.float32)
        fixed |= {f"layer.{i}.layer_scale{k}.lambda1": ones for i in range(module.depth) for k in (1, 2)}
    return fixed


def _transformers_implied(module: VisionTransformer) -> dict[str, np.ndarray]:
    ones = np.ones(module.embed_dim, np.float32)
    implied = {"params/local_cls_norm/scale": ones, "params/local_cls_norm/bias": np.zeros_like(ones)}
    if module.rope_base is not None:  # their only way to say it
        implied["buffers/rope_periods"] = rope.rope_periods(module.embed_dim // module.num_heads, module.rope_base)
    return implied


LAYOUTS = {
    "official": Layout(TABLE, _constants, prefixes=EUPE_PREFIXES, extras=EUPE_EXTRAS),
    "transformers": Layout(
        TRANSFORMERS_TABLE,
        _transformers_constants,
        absent=lambda module: {_HF_K_BIAS} if module.mask_k_bias else (),
        implied=_transformers_implied,
        unread=("params/local_cls_norm/scale", "params/local_cls_norm/bias"),
        renames={"model.layer.": "layer."},  # files and modules of one version have either
    ),
}

EUPE_LICENCE = "FAIR Noncommercial Research License"
DINOV3_LICENCE = "DINOv3 License"


def _spec(name: str, dim: int, depth: int, heads: int, licence: str, repo: str | None, file: str | None, **kwargs):
    kwargs = {"embed_dim": dim, "depth": depth, "num_heads": heads, **kwargs}
    return EncoderSpec(name, "vit", kwargs, **_describe(kwargs), licence=licence, hub_repo=repo, hub_file=file)


def _eupe(size: str, dim: int, heads: int) -> EncoderSpec:
    repo = f"EUPE-ViT-{size.upper()}"
    return _spec(f"eupe_vit{size}16", dim, 12, heads, EUPE_LICENCE, f"facebook/{repo}", f"{repo}.pt")


def _dinov3(size: str, sha: str, dim: int, depth: int, heads: int, **kwargs) -> EncoderSpec:
    repo, file = f"facebook/dinov3-vit{size}-pretrain-lvd1689m", f"dinov3_vit{size}_pretrain_lvd1689m-{sha}.pth"
    return _spec(f"dinov3_vit{size}", dim, depth, heads, DINOV3_LICENCE, repo, file, **kwargs)


SPECS = (
    _eupe("t", 192, 3),
    _eupe("s", 384, 6),
    _eupe("b", 768, 12),
    _dinov3("s16", "08c60483", 384, 12, 6),
    _dinov3("s16plus", "4057cbaa", 384, 12, 6, ffn_layer="swiglu", ffn_ratio=6.0),
    _dinov3("b16", "73cec8be", 768, 12, 12),
    _dinov3("l16", "8aa4cbdd", 1024, 24, 16),
    _dinov3("h16plus", "7c1da9a5", 1280, 32, 20, ffn_layer="swiglu", ffn_ratio=6.0),
    _dinov3(
        "7b16",
        "a955f4ea",
        4096,
        40,
        32,
        ffn_layer="swiglu64",
        ffn_ratio=3.0,
        qkv_bias=False,
        untie_global_and_local_cls_norm=True,
    ),
    # The shape of the 1.9B proxy is unpublished; this is the trunk of PE-G as a DINOv3 ViT, which fits all that is
    # said of it. No weights exist.
    _spec("eupe_proxy", 1536, 50, 16, "", None, None, ffn_ratio=8960 / 1536),
)

FAMILY = Family("vit", VisionTransformer, SPECS, _describe, LAYOUTS)
