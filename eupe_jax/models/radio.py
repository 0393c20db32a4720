"""RADIOv2.5 encoders, from their published behaviour: a ViT with several class tokens and a cropped position table.

Every teacher of RADIO had a class token of its own; those of the teachers with a summary, side by side, are the
encoder's summary. Registers and class tokens get no position. The table is as large as the largest image; a smaller
one gets the whole table, shrunk bilinearly to its longer side and cropped. Training RADIO draws random crops of the
table instead; here `train` changes nothing.

Verified against public facts: names, sizes and tokens give exactly the published numbers of stored values (98,233,353,
319,881,225 and 651,642,889, nine of them no weights), and the forward pass is tested against transformers' independent
RADIO. Not verified, for want of weights: the features themselves, and `align_corners`. The authors' code of 2024, when
these models came out, interpolated with it; their later code and transformers without, which is the default here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from eupe_jax.models.layers import Activation, AttentionFn, PatchEmbed, check_fit, exact_gelu, stack_blocks
from eupe_jax.models.resize import resize_positions
from eupe_jax.models.spec import EncoderSpec, Family, Layout, Tensor
from eupe_jax.models.transformer import Block, timm_block_rows

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Radio(nn.Module):
    """RADIO encoder. Sequence: [class tokens, registers, patches row-major]; no norm follows the blocks.

    Attributes:
      max_image_size: side in pixels of the largest image the position table was made for.
      num_cls_tokens: class tokens, one per teacher.
      summary: which of them make the encoder's "cls", in this order.
      num_registers: registers, the encoder's "storage".
      align_corners: whether the ends of the shrunk position table are the ends of the table (see above).
      dtype, residual_dtype, remat, scan_unroll, attention_fn, gelu, materialize: as for `vit.VisionTransformer`.
    """

    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    patch_size: int = 16
    max_image_size: int = 2048
    num_cls_tokens: int = 4
    summary: tuple[int, ...] = (0, 1, 2)
    num_registers: int = 4
    align_corners: bool = False
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
        """All tokens of the last block and of chosen ones.

        Args:
          images: float [B, H, W, 3], pixel-normalised. Sides that are no multiple of the patch are cut off.
          train: accepted for the common interface; nothing here depends on it.
          layers: blocks whose output is wanted, negative ones counted from the end.

        Returns:
          "cls" [B, len(summary) * D], "storage" [B, R, D], "patches" [B, h, w, D]; "tokens" [B, T, D], the whole
          sequence; "layers": a list of dicts of the first three, one per entry of `layers`.

        Raises:
          ValueError: image smaller than a patch, settings that contradict each other, or `layers` out of range.
        """
        del train
        self._check()
        if any(not -self.depth <= i < self.depth for i in layers):
            raise ValueError(f"layers {tuple(layers)} out of range for a model of {self.depth} blocks")
        patches = PatchEmbed(self.width, self.patch_size, self.dtype, use_bias=False, name="patch_embed")(images)
        batch, h, w, dim = patches.shape
        init = nn.initializers.normal(dim**-0.5)
        table = self.param("pos_embed", init, ((self.max_image_size // self.patch_size) ** 2, dim))
        x = patches.reshape(batch, h * w, dim).astype(self.residual_dtype) + self._positions(table, h, w)
        n_prefix = self.num_cls_tokens + self.num_registers
        prefix = self.param("tokens", init, (n_prefix, dim)).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(prefix, (batch, n_prefix, dim)), x], axis=1)

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

        def split(tokens):
            tokens = tokens.astype(jnp.float32)
            return {
                "cls": tokens[:, list(self.summary)].reshape(batch, -1),
                "storage": tokens[:, self.num_cls_tokens : n_prefix],
                "patches": tokens[:, n_prefix:].reshape(batch, h, w, dim),
            }

        return {**split(x), "tokens": x, "layers": [split(per_block[i]) for i in layers]}

    def __call__(self, images: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """[B, H, W, 3] -> {"cls": [B, len(summary) * D], "storage": [B, R, D], "patches": [B, h, w, D]}, float32.

        Raises:
          ValueError: as `features`, and for sides that are no multiple of the patch.
        """
        check_fit(images, self.patch_size)
        out = self.features(images, train=train)
        return {name: out[name] for name in ("cls", "storage", "patches")}

    def _positions(self, table: jax.Array, h: int, w: int) -> jax.Array:
        """[h * w, D] of the residual stream's dtype: the top left h x w of the table at max(h, w) squared."""
        side = max(h, w)
        square = resize_positions(table, (side, side), "bilinear", align_corners=self.align_corners)
        return square.reshape(side, side, -1)[:h, :w].reshape(h * w, -1).astype(self.residual_dtype)

    def _check(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        if self.max_image_size % self.patch_size:
            raise ValueError(f"max_image_size {self.max_image_size} is not a multiple of patch_size {self.patch_size}")
        if not self.summary or any(not 0 <= i < self.num_cls_tokens for i in self.summary):
            raise ValueError(f"summary {self.summary} must name some of the {self.num_cls_tokens} class tokens")


def _describe(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    module = Radio(**kwargs)
    return {
        "cls_dim": len(module.summary) * module.width,
        "patch_dim": module.width,
        "patch_size": module.patch_size,
        "num_storage_tokens": module.num_registers,
    }


def _constants(module: Radio) -> dict[str, np.ndarray]:
    """The pixel statistics, which the original applies itself, and which of the class tokens make the summary."""
    return {
        "radio_model.summary_idxs": np.asarray(module.summary, np.int64),
        "radio_model.input_conditioner.norm_mean": np.asarray(CLIP_MEAN, np.float32).reshape(3, 1, 1),
        "radio_model.input_conditioner.norm_std": np.asarray(CLIP_STD, np.float32).reshape(3, 1, 1),
    }


OFFICIAL = Layout(
    (
        Tensor("params/patch_embed/kernel", "radio_model.model.patch_generator.embedder.weight", "patches"),
        Tensor("params/pos_embed", "radio_model.model.patch_generator.pos_embed", "batched"),
        Tensor("params/tokens", "radio_model.model.patch_generator.cls_token.token"),
        *timm_block_rows("radio_model.model.blocks.{i}"),
    ),
    constants=_constants,
    extras=("radio_model.adaptors.",),
)


def _spec(size: str, width: int, depth: int, heads: int) -> EncoderSpec:
    kwargs = {"width": width, "depth": depth, "num_heads": heads, "mlp_dim": 4 * width}
    return EncoderSpec(
        f"radio_v2_5_{size}",
        "radio",
        kwargs,
        **_describe(kwargs),
        resolution=768,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        licence="NVIDIA Source Code License (non-commercial)",
        hub_repo=f"nvidia/RADIO-{size.upper()}",
        hub_file="model.safetensors",
    )


SPECS = (_spec("b", 768, 12, 12), _spec("l", 1024, 24, 16), _spec("h", 1280, 32, 16))

FAMILY = Family("radio", Radio, SPECS, _describe, {"official": OFFICIAL})
