"""Adapter heads between a student's tokens and one teacher's (EUPE §4.1)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from eupe_jax.models.layers import exact_gelu


class Adapter(nn.Module):
    """Linear(no bias) -> LayerNorm -> exact GELU -> Linear(no bias): [..., D] -> [..., out_dim].

    Hidden width is 1536 in stage 1 and 3072 in stages 2 and 3 (EUPE §4.1). LayerNorm's eps is not published;
    1e-5 is PyTorch's default. Adapters compute in `dtype` and return float32: losses need the precision.
    """

    hidden_dim: int
    out_dim: int
    eps: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # PyTorch's default for linear layers, which AM-RADIO's adapters use; the paper is silent
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        x = nn.Dense(self.hidden_dim, use_bias=False, dtype=self.dtype, kernel_init=init, name="fc1")(x)
        x = nn.LayerNorm(epsilon=self.eps, dtype=jnp.float32, use_fast_variance=False, name="norm")(x)
        x = exact_gelu(x).astype(self.dtype)
        x = nn.Dense(self.out_dim, use_bias=False, dtype=self.dtype, kernel_init=init, name="fc2")(x)
        return x.astype(jnp.float32)


class AdapterBank(nn.Module):
    """One adapter for each teacher and token kind.

    Attributes:
      out_dims: {teacher: {"cls": width, "patches": width}}; a token kind that is left out has no adapter and no loss.

    Maps a student's {"cls": [B, D], "patches": [B, h, w, D']} to {teacher: {"cls": [B, Dc], "patches": [B, h, w, Dp]}}.
    """

    hidden_dim: int
    out_dims: dict[str, dict[str, int]]
    eps: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array]) -> dict[str, dict[str, jax.Array]]:
        return {
            teacher: {
                kind: Adapter(self.hidden_dim, width, self.eps, self.dtype, name=f"{teacher}_{kind}")(tokens[kind])
                for kind, width in kinds.items()
            }
            for teacher, kinds in self.out_dims.items()
        }
