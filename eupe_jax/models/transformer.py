"""The plain pre-norm block that most expert towers share, and its names in the Perception Encoder's weights."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from eupe_jax.models.layers import Activation, Attention, AttentionFn, LayerNorm, Mlp, Scale, exact_gelu
from eupe_jax.models.rope import Rotation
from eupe_jax.models.spec import Tensor


class Block(nn.Module):
    """x + ls1 * attention(norm1(x)), then x + ls2 * mlp(norm2(x)). One step of the scan; LayerScale is optional."""

    num_heads: int
    mlp_dim: int
    layerscale_init: float | None = None
    norm_eps: float = 1e-5
    rotation: Rotation | None = None
    gelu: Activation = exact_gelu
    materialize: bool = False
    dtype: Any = jnp.float32
    attention_fn: AttentionFn | None = None
    collect: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *rope: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        def scaled(y, name):
            return y if self.layerscale_init is None else Scale(self.layerscale_init, name=name)(y)

        stream = x.dtype
        attn = Attention(
            self.num_heads, mask_k_bias=False, dtype=self.dtype, attention_fn=self.attention_fn,
            rotation=self.rotation, materialize=self.materialize, name="attn",
        )
        mlp = Mlp(self.mlp_dim, dtype=self.dtype, gelu=self.gelu, materialize=self.materialize, name="mlp")
        y = attn(LayerNorm(self.norm_eps, self.dtype, name="norm1")(x), *rope)
        x = (x + scaled(y, "ls1")).astype(stream)
        y = mlp(LayerNorm(self.norm_eps, self.dtype, name="norm2")(x))
        x = (x + scaled(y, "ls2")).astype(stream)
        return x, x if self.collect else None


def norm_rows(path: str, name: str) -> tuple[Tensor, ...]:
    """State_dict rows of a LayerNorm at params/`path`, called `name` elsewhere."""
    return Tensor(f"params/{path}/scale", f"{name}.weight"), Tensor(f"params/{path}/bias", f"{name}.bias")


def dense_rows(path: str, *names: str) -> tuple[Tensor, ...]:
    """State_dict rows of a linear layer; several names share its outputs in equal parts."""
    return (
        Tensor(f"params/{path}/kernel", tuple(f"{name}.weight" for name in names), "linear"),
        Tensor(f"params/{path}/bias", tuple(f"{name}.bias" for name in names)),
    )


def attention_rows(path: str, name: str) -> tuple[Tensor, ...]:
    """State_dict rows of an attention layer with one packed input projection."""
    return (
        Tensor(f"params/{path}/qkv/kernel", f"{name}.in_proj_weight", "linear"),
        Tensor(f"params/{path}/qkv/bias", f"{name}.in_proj_bias"),
        Tensor(f"params/{path}/proj/kernel", f"{name}.out_proj.weight", "linear"),
        Tensor(f"params/{path}/proj/bias", f"{name}.out_proj.bias"),
    )


def mlp_rows(path: str, name: str) -> tuple[Tensor, ...]:
    """State_dict rows of a two-layer MLP."""
    return tuple(
        row
        for ours, theirs in (("fc1", "c_fc"), ("fc2", "c_proj"))
        for row in (
            Tensor(f"params/{path}/{ours}/kernel", f"{name}.{theirs}.weight", "linear"),
            Tensor(f"params/{path}/{ours}/bias", f"{name}.{theirs}.bias"),
        )
    )


BLOCK_ROWS = (
    *norm_rows("blocks/norm1", "transformer.resblocks.{i}.ln_1"),
    *attention_rows("blocks/attn", "transformer.resblocks.{i}.attn"),
    Tensor("params/blocks/ls1/gamma", "transformer.resblocks.{i}.ls_1.gamma"),
    *norm_rows("blocks/norm2", "transformer.resblocks.{i}.ln_2"),
    *mlp_rows("blocks/mlp", "transformer.resblocks.{i}.mlp"),
    Tensor("params/blocks/ls2/gamma", "transformer.resblocks.{i}.ls_2.gamma"),
)


def timm_block_rows(name: str) -> tuple[Tensor, ...]:
    """State_dict rows of blocks called as in timm and DINO; `name` has the `{i}`."""
    return (
        *norm_rows("blocks/norm1", f"{name}.norm1"),
        *dense_rows("blocks/attn/qkv", f"{name}.attn.qkv"),
        *dense_rows("blocks/attn/proj", f"{name}.attn.proj"),
        Tensor("params/blocks/ls1/gamma", f"{name}.ls1.gamma"),
        *norm_rows("blocks/norm2", f"{name}.norm2"),
        *dense_rows("blocks/mlp/fc1", f"{name}.mlp.fc1"),
        *dense_rows("blocks/mlp/fc2", f"{name}.mlp.fc2"),
        Tensor("params/blocks/ls2/gamma", f"{name}.ls2.gamma"),
    )
