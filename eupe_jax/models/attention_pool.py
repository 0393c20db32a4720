"""Attention pooling (Perception Encoder, SigLIP): a learned probe reads all tokens and becomes the image's summary."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from eupe_jax.models.layers import QKV, Activation, LayerNorm, Mlp, dense_init, exact_gelu, plain_attention


class ProbeAttention(nn.Module):
    """Multi-head attention of queries [B, Q, D] over tokens [B, T, D] with one packed projection. Returns [B, Q, D]."""

    num_heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, query_BxQxD: jax.Array, x_BxTxD: jax.Array) -> jax.Array:
        dim = x_BxTxD.shape[-1]
        # The kernel stays packed as published; projecting the unused thirds is a thousandth of a tower's work.
        qkv = QKV(mask_k_bias=False, dtype=self.dtype, name="qkv")
        q = qkv(query_BxQxD)[..., :dim]
        k, v = jnp.split(qkv(x_BxTxD)[..., dim:], 2, axis=-1)
        q, k, v = (t.reshape(*t.shape[:2], self.num_heads, dim // self.num_heads) for t in (q, k, v))
        out = plain_attention(q, k, v).reshape(query_BxQxD.shape)
        return nn.Dense(dim, dtype=self.dtype, kernel_init=dense_init, name="proj")(out)


class AttentionPool(nn.Module):
    """Tokens [B, T, D], after the final norm -> float32 [B, D]: probe attention, then a residual MLP.

    `mlp_dim` is the MLP's hidden width; None: 4 * D.
    """

    num_heads: int = 8
    eps: float = 1e-5
    dtype: Any = jnp.float32
    mlp_dim: int | None = None
    gelu: Activation = exact_gelu

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        batch, _, dim = x_BxTxD.shape
        probe = self.param("probe", dense_init, (1, 1, dim))
        query = jnp.broadcast_to(probe, (batch, 1, dim)).astype(self.dtype)
        pooled = ProbeAttention(self.num_heads, self.dtype, name="attn")(query, x_BxTxD)
        pooled = pooled.astype(jnp.float32)
        hidden = LayerNorm(self.eps, self.dtype, name="norm")(pooled)
        mlp = Mlp(self.mlp_dim or 4 * dim, dtype=self.dtype, gelu=self.gelu, name="mlp")
        return (pooled + mlp(hidden))[:, 0]
