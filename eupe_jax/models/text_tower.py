"""The text tower of the Perception Encoder core models, and the pair of towers that scores images against texts.

It is what makes zero-shot evaluation possible (EUPE App. C): the class token of a student, mapped back into an expert's
space, is compared with that expert's text embeddings.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from eupe_jax.models import perception_encoder
from eupe_jax.models.layers import LayerNorm, stack_blocks
from eupe_jax.models.perception_encoder import PerceptionEncoder
from eupe_jax.models.spec import Family, Layout, Tensor
from eupe_jax.models.transformer import BLOCK_ROWS, Block, norm_rows

VOCABULARY = 49408


def causal_attention(q_BxTxHxD: jax.Array, k_BxTxHxD: jax.Array, v_BxTxHxD: jax.Array) -> jax.Array:
    """Softmax attention in which a token sees itself and those before it; softmax in float32. Returns [B, T, H, D]."""
    scale = q_BxTxHxD.shape[-1] ** -0.5
    logits = jnp.einsum("bqhd,bkhd->bhqk", q_BxTxHxD, k_BxTxHxD, preferred_element_type=jnp.float32)
    seen = jnp.tril(jnp.ones(logits.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(seen, logits * scale, -jnp.inf), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v_BxTxHxD.dtype), v_BxTxHxD)


class TextTower(nn.Module):
    """Causal transformer over token ids, read out at the end-of-text token. The feed-forward ratio is 4.

    Attributes:
      context_length: longest sequence, in tokens.
      output_dim: width of the text embedding, equal to the vision tower's `output_dim`.
      dtype, residual_dtype, remat, scan_unroll: as for `vit.VisionTransformer`.
    """

    context_length: int
    width: int
    depth: int
    num_heads: int
    output_dim: int
    vocabulary: int = VOCABULARY
    norm_eps: float = 1e-5
    dtype: Any = jnp.float32
    residual_dtype: Any = jnp.float32
    remat: str = "none"
    scan_unroll: int = 1

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Text embeddings, before normalisation to unit length.

        Args:
          tokens: int [B, T] ids, T at most `context_length`. The largest id of a row is its end of text (the first one,
            if there are several); what follows it has no influence.

        Returns:
          float32 [B, output_dim].

        Raises:
          ValueError: sequence longer than `context_length`, or width not divisible by the heads.
        """
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        length = tokens.shape[1]
        if length > self.context_length:
            raise ValueError(f"texts of {length} tokens exceed the context of {self.context_length}; truncate them")
        token_embedding = self.param("token_embedding", nn.initializers.normal(0.02), (self.vocabulary, self.width))
        positions = self.param("pos_embed", nn.initializers.normal(0.01), (self.context_length, self.width))
        x = (token_embedding[tokens] + positions[:length]).astype(self.residual_dtype)
        blocks = stack_blocks(Block, self.depth, remat=self.remat, unroll=self.scan_unroll)(
            num_heads=self.num_heads,
            mlp_dim=4 * self.width,
            norm_eps=self.norm_eps,
            dtype=self.dtype,
            attention_fn=causal_attention,
            name="blocks",
        )
        x, _ = blocks(x)
        end = jnp.argmax(tokens, axis=-1)
        x = LayerNorm(self.norm_eps, name="norm")(x[jnp.arange(x.shape[0]), end])
        projection = self.param(
            "text_projection", nn.initializers.normal(self.width**-0.5), (self.width, self.output_dim)
        )
        return x @ projection


class ImageTextModel(nn.Module):
    """A Perception Encoder core model: both towers and the temperature of their similarity."""

    visual: PerceptionEncoder
    text: TextTower

    def setup(self):
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(jnp.log(1 / 0.07)), ())

    def __call__(self, images: jax.Array, tokens: jax.Array) -> dict[str, jax.Array]:
        """Scores every image against every text.

        Args:
          images: float [B, H, W, 3], pixel-normalised.
          tokens: int [C, T].

        Returns:
          "image" [B, E] and "text" [C, E] of unit length; "logits" [B, C], their cosines times exp(logit_scale).
        """
        image, text = unit(self.embed_images(images)), unit(self.embed_texts(tokens))
        return {"image": image, "text": text, "logits": jnp.exp(self.logit_scale) * image @ text.T}

    def embed_images(self, images: jax.Array) -> jax.Array:
        """Image embeddings [B, E] before normalisation to unit length, whatever the vision tower's `cls_output`."""
        return self.visual.features(images)["embedding"]

    def embed_texts(self, tokens: jax.Array) -> jax.Array:
        """Text embeddings [C, E] before normalisation to unit length."""
        return self.text(tokens)


def unit(x: jax.Array) -> jax.Array:
    """`x` [..., D] divided by its length along the last axis."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _within(row: Tensor, path: str, name: str) -> Tensor:
    """A table row of a tower, in a model that holds the tower at params/`path` and calls it `name`."""
    return Tensor(row.path.replace("params/", f"params/{path}/", 1), f"{name}{row.name}", row.transform)


TEXT_TABLE = (
    Tensor("params/token_embedding", "token_embedding.weight"),
    Tensor("params/pos_embed", "positional_embedding"),
    *BLOCK_ROWS,
    *norm_rows("norm", "ln_final"),
    Tensor("params/text_projection", "text_projection"),
)
TABLE = (
    *(_within(row, "visual", "visual.") for row in perception_encoder.TABLE),
    *(_within(row, "text", "") for row in TEXT_TABLE),
    Tensor("params/logit_scale", "logit_scale"),
)


def _example_inputs(module: ImageTextModel) -> tuple[jax.ShapeDtypeStruct, ...]:
    images = jax.ShapeDtypeStruct((1, module.visual.patch_size, module.visual.patch_size, 3), jnp.float32)
    return images, jax.ShapeDtypeStruct((1, 1), jnp.int32)


FAMILY = Family("image_text", ImageTextModel, layouts={"official": Layout(TABLE)}, example_inputs=_example_inputs)

_TEXT_SIZES = {  # context length, width, depth, heads
    "pe_core_t16_384": (32, 512, 12, 8),
    "pe_core_s16_384": (32, 512, 12, 8),
    "pe_core_b16_224": (32, 1024, 24, 16),
    "pe_core_l14_336": (32, 1024, 24, 16),
    "pe_core_g14_448": (72, 1280, 24, 20),
}


def build(name: str, dtype: Any = jnp.float32) -> ImageTextModel:
    """Both towers of a published core model; `name` is the zoo name of its vision tower.

    Raises:
      ValueError: `name` is no Perception Encoder core model.
    """
    if name not in _TEXT_SIZES:
        raise ValueError(f"no text tower belongs to {name!r}; known are {', '.join(_TEXT_SIZES)}")
    visual = {spec.name: spec for spec in perception_encoder.SPECS}[name].kwargs
    sizes = dict(zip(("context_length", "width", "depth", "num_heads"), _TEXT_SIZES[name], strict=True))
    return ImageTextModel(
        visual=PerceptionEncoder(**visual, dtype=dtype),
        text=TextTower(**sizes, output_dim=visual["output_dim"], dtype=dtype),
    )
