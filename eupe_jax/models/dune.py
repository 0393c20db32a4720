"""DUNE encoders, from their published behaviour: a DINOv2 ViT with registers, distilled from 2-D and 3-D teachers.

Differs from the ViT of `vit.py` in an absolute position table (class token and patches; registers have none) instead
of RoPE, and in the norms' epsilon. Other sizes interpolate the table bicubically with DINO's offset of 0.1.

Facts are those of public copies of the authors' code (sizes, names, LayerScale, registers, interpolation); no weights
were at hand. The trunk is tested against transformers' independent DINOv2 with registers, which interpolates otherwise.
The projectors towards the teachers are left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from eupe_jax.models.layers import Activation, AttentionFn, LayerNorm, PatchEmbed, check_fit, exact_gelu, stack_blocks
from eupe_jax.models.resize import resize_positions
from eupe_jax.models.spec import EncoderSpec, Family, Layout, Tensor
from eupe_jax.models.transformer import Block, norm_rows, timm_block_rows

DOWNLOADS = "https://download.europe.naverlabs.com/dune"


class Dune(nn.Module):
    """DUNE encoder. Sequence: [class token, registers, patches row-major].

    Attributes:
      mlp_dim: hidden width of the feed-forward layers.
      image_size: native side in pixels; fixes the size of the position table, other sizes interpolate it.
      final_norm: whether outputs pass the final norm, as the encoder alone returns them. The authors trained their
        projectors on tokens that do not.
      position_offset, position_antialias: of the interpolation, see `resize.resize_positions`.
      dtype, residual_dtype, remat, scan_unroll, attention_fn, gelu, materialize: as for `vit.VisionTransformer`.
    """

    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    image_size: int
    patch_size: int = 14
    num_registers: int = 4
    layerscale_init: float = 1e-4
    final_norm: bool = True
    position_offset: float = 0.1
    position_antialias: bool = False
    norm_eps: float = 1e-6
    dtype: Any = jnp.float32
    residual_dtype: Any = jnp.float32
    remat: str = "none"
    scan_unroll: int = 1
    attention_fn: AttentionFn | None = None
    gelu: Activation = exact_gelu
    materialize: bool = False

    @nn.compact
    def features(self, images: jax.Array, *, train: bool = False, layers: Sequence[int] = ()) -> dict[str, Any]:
        """All tokens, before and after the final norm, and those of chosen blocks.

        Args:
          images: float [B, H, W, 3], pixel-normalised. Sides that are no multiple of the patch are cut off.
          train: accepted for the common interface; nothing here depends on it.
          layers: blocks whose output is wanted, negative ones counted from the end.

        Returns:
          "cls" [B, D], "storage" [B, R, D], "patches" [B, h, w, D] as `final_norm` says; "prenorm", "normed"
          [B, T, D] around the final norm; "layers", "layers_prenorm": lists of dicts of the first three, one per entry
          of `layers`, with and without the final norm.

        Raises:
          ValueError: image smaller than a patch, width not divisible by the heads, image_size not divisible by the
            patch, or `layers` out of range.
        """
        del train
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if any(not -self.depth <= i < self.depth for i in layers):
            raise ValueError(f"layers {tuple(layers)} out of range for a model of {self.depth} blocks")
        patches = PatchEmbed(self.width, self.patch_size, self.dtype, name="patch_embed")(images)
        batch, h, w, dim = patches.shape
        x = self._embed(patches.reshape(batch, h * w, dim).astype(self.residual_dtype), h, w)

        blocks = stack_blocks(Block, self.depth, remat=self.remat, unroll=self.scan_unroll)(
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            layerscale_init=self.layerscale_init,
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
        normed, n_prefix = norm(x), 1 + self.num_registers

        def split(tokens):
            tokens = tokens.astype(jnp.float32)
            body = tokens[:, n_prefix:].reshape(batch, h, w, dim)
            return {"cls": tokens[:, 0], "storage": tokens[:, 1:n_prefix], "patches": body}

        return {
            **split(normed if self.final_norm else x),
            "prenorm": x,
            "normed": normed,
            "layers": [split(norm(per_block[i])) for i in layers],
            "layers_prenorm": [split(per_block[i]) for i in layers],
        }

    def __call__(self, images: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """[B, H, W, 3] -> {"cls": [B, D], "storage": [B, R, D], "patches": [B, h, w, D]}, float32; see `features`.

        Raises:
          ValueError: as `features`, and for sides that are no multiple of the patch.
        """
        check_fit(images, self.patch_size)
        out = self.features(images, train=train)
        return {name: out[name] for name in ("cls", "storage", "patches")}

    def _embed(self, x: jax.Array, h: int, w: int) -> jax.Array:
        """Adds positions to the patches [B, h * w, D] and puts class token and registers before them."""
        batch, _, dim = x.shape
        init = nn.initializers.normal(0.02)
        # Held for the sake of the weights; encoding without masks never uses it.
        self.param("mask_token", nn.initializers.zeros, (1, dim))
        positions = self.param("pos_embed", init, (1 + (self.image_size // self.patch_size) ** 2, dim))
        patch_positions = resize_positions(
            positions[1:], (h, w), "bicubic", antialias=self.position_antialias, offset=self.position_offset
        )
        x = x + patch_positions.astype(x.dtype)
        prefix = [self.param("cls_token", init, (1, dim)) + positions[:1]]
        if self.num_registers:
            prefix.append(self.param("storage_tokens", init, (self.num_registers, dim)))
        prefix = jnp.concatenate(prefix).astype(x.dtype)
        return jnp.concatenate([jnp.broadcast_to(prefix, (batch, *prefix.shape)), x], axis=1)


def _describe(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    module = Dune(**kwargs)
    return {
        "cls_dim": module.width,
        "patch_dim": module.width,
        "patch_size": module.patch_size,
        "num_storage_tokens": module.num_registers,
        "resolution": module.image_size,
    }


OFFICIAL = Layout(
    (
        Tensor("params/cls_token", "cls_token", "batched"),
        Tensor("params/pos_embed", "pos_embed", "batched"),
        Tensor("params/storage_tokens", "register_tokens", "batched"),
        Tensor("params/mask_token", "mask_token"),
        Tensor("params/patch_embed/kernel", "patch_embed.proj.weight", "conv"),
        Tensor("params/patch_embed/bias", "patch_embed.proj.bias"),
        # The blocks are one chunk of the authors' chunks.
        *timm_block_rows("blocks.0.{i}"),
        *norm_rows("norm", "norm"),
    ),
    prefixes=("module.", "_orig_mod."),
    extras=("projectors.", "teacher_norms."),
    within="encoder.",
)


def _spec(name: str, file: str, width: int, heads: int, image_size: int) -> EncoderSpec:
    kwargs = {"width": width, "depth": 12, "num_heads": heads, "mlp_dim": 4 * width, "image_size": image_size}
    return EncoderSpec(
        name,
        "dune",
        kwargs,
        **_describe(kwargs),
        licence="not verified; see the LICENSE of github.com/naver/dune",
        hub_repo=DOWNLOADS,
        hub_file=f"{file}.pth",
    )


SPECS = (
    _spec("dune_vits14_336", "dune_vitsmall14_336", 384, 6, 336),
    _spec("dune_vits14_448", "dune_vitsmall14_448", 384, 6, 448),
    _spec("dune_vitb14_336", "dune_vitbase14_336", 768, 12, 336),
    _spec("dune_vitb14_448", "dune_vitbase14_448", 768, 12, 448),
    # The model of the DUNE paper, trained with an earlier version of their code.
    _spec("dune_vitb14_448_paper", "dune_vitbase14_448_paper", 768, 12, 448),
)

FAMILY = Family("dune", Dune, SPECS, _describe, {"official": OFFICIAL})
