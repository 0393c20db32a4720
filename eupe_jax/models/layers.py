"""Building blocks shared by the encoders. Normalisation, softmax and residuals are float32; matmuls are in `dtype`."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from eupe_jax.models.fused_attention import FusedAttention, permute_columns, restore_columns
from eupe_jax.models.rope import HALVES, Rotation

AttentionFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | FusedAttention
Activation = Callable[[jax.Array], jax.Array]

# The published init truncates at +-2, a hundred standard deviations: a plain normal.
dense_init = nn.initializers.normal(0.02)

# "saved activations" -> what the backward pass keeps; the rest is computed again.
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # what matrix products and attention give, in the compute dtype: norms, activations and gains are computed again
    "names": jax.checkpoint_policies.save_only_these_names("qkv", "attention", "hidden", "depthwise", "branch"),
}


def stack_blocks(
    block: type[nn.Module], length: int, *, remat: str = "none", unroll: int = 1, broadcast_args: int = 0
) -> type[nn.Module]:
    """`block` repeated `length` times by `nn.scan`; parameters gain a leading axis of that length.

    Args:
      block: module whose call maps `(carry, *args)` to `(carry, per-block output)`.
      length: number of blocks.
      remat: "none" or a key of `REMAT_POLICIES`.
      unroll: blocks per iteration of the compiled loop; never changes the parameters.
      broadcast_args: number of `args`, the same for every block.

    Raises:
      ValueError: unknown `remat`.
    """
    if remat != "none":
        if remat not in REMAT_POLICIES:
            raise ValueError(f"remat must be one of {['none', *REMAT_POLICIES]}, got {remat!r}")
        # Inside a rolled loop nothing can be merged with the forward pass; in an unrolled one it could.
        block = nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=unroll > 1)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast,) * broadcast_args,
        length=length,
        unroll=min(unroll, length),
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def standardize(x: jax.Array, eps: float) -> jax.Array:
    """x [..., D] of mean zero and variance one over D. The backward pass keeps the result, and one factor a row."""
    return _standardize(x, eps)[0]


def _standardize(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    x = x - x.mean(axis=-1, keepdims=True)
    factor = jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + eps)
    return x * factor, factor


@standardize.defjvp
def _standardize_jvp(eps: float, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    y, factor = _standardize(*primals, eps)
    (dx,) = tangents
    return y, factor * (dx - dx.mean(axis=-1, keepdims=True) - y * (y * dx).mean(axis=-1, keepdims=True))


class LayerNorm(nn.Module):
    """LayerNorm over the last axis, computed in float32; returns `dtype`."""

    eps: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (width,))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        x = x.astype(jnp.float32)
        if jnp.finfo(self.dtype).bits < 32:
            # One pass over x, which a TPU makes while it is produced. Cancellation loses mean^2 / variance roundings of
            # float32: nothing that half precision shows.
            mean = x.mean(axis=-1, keepdims=True)
            variance = jnp.maximum(jnp.square(x).mean(axis=-1, keepdims=True) - jnp.square(mean), 0.0)
            x = (x - mean) * jax.lax.rsqrt(variance + self.eps)
        else:
            x = standardize(x, self.eps)
        return (x * scale + bias).astype(self.dtype)


class Scale(nn.Module):
    """LayerScale: a learned factor per channel, applied in float32 so that tiny factors survive bfloat16 compute."""

    init: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gamma = self.param("gamma", nn.initializers.constant(self.init), (x.shape[-1],))
        return x.astype(jnp.float32) * gamma


class QKV(nn.Module):
    """The joint query/key/value projection [D] -> [3D].

    With `mask_k_bias` the full bias is stored and its key third is multiplied by zero, so it gets no gradient and
    survives a round trip through checkpoints, whatever it holds.
    """

    use_bias: bool = True
    mask_k_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, permute: Callable[[jax.Array], jax.Array] = lambda columns: columns) -> jax.Array:
        """`permute` puts the output's columns into another order; the parameters keep theirs."""
        dim = x.shape[-1]
        kernel = self.param("kernel", dense_init, (dim, 3 * dim))
        out = x.astype(self.dtype) @ permute(kernel.astype(self.dtype))
        if not self.use_bias:
            return out
        bias = self.param("bias", nn.initializers.zeros, (3 * dim,))
        if self.mask_k_bias:
            bias = bias * k_bias_mask(dim)
        return _add_bias(out, permute(bias.astype(self.dtype)))


@jax.custom_vjp
def _add_bias(x_BxTxD: jax.Array, bias_D: jax.Array) -> jax.Array:
    """x + bias. The bias's gradient is a product with ones: behind the kernel's gradient, which no sum can be merged
    with, a TPU is ten times faster at a matrix product than at a sum over rows.
    """
    return x_BxTxD + bias_D


def _add_bias_forward(x: jax.Array, bias: jax.Array) -> tuple[jax.Array, None]:
    return x + bias, None


def _add_bias_backward(_: None, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows = grad.reshape(-1, grad.shape[-1])
    total = jax.lax.dot_general(
        jnp.ones((1, rows.shape[0]), grad.dtype), rows, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    return grad, total[0].astype(grad.dtype)


_add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def k_bias_mask(dim: int) -> jax.Array:
    """float32 [3 * dim]: one for queries and values, zero for keys."""
    return jnp.ones((3, dim)).at[1].set(0.0).reshape(-1)


@jax.custom_jvp
def softmax(logits: jax.Array) -> jax.Array:
    """Softmax over the last axis of [..., N]. The backward pass keeps the result alone, not the exponentials too."""
    return jax.nn.softmax(logits, axis=-1)


@softmax.defjvp
def _softmax_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (logits,), (dx,) = primals, tangents
    y = softmax(logits)
    return y, y * (dx - (y * dx).sum(axis=-1, keepdims=True))


def plain_attention(q_BxTxHxD: jax.Array, k_BxTxHxD: jax.Array, v_BxTxHxD: jax.Array) -> jax.Array:
    """Softmax attention with logits scaled by `D ** -0.5`; logits and softmax in float32. Returns [B, T, H, D].

    Heads are moved before tokens first: XLA's CPU backend is three times as fast on plain batched matrix products.
    """
    q, k, v = (x.swapaxes(1, 2) for x in (q_BxTxHxD, k_BxTxHxD, v_BxTxHxD))
    logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
    weights = softmax(logits * q.shape[-1] ** -0.5)
    return jnp.einsum("bhqk,bhkd->bhqd", weights.astype(v.dtype), v).swapaxes(1, 2)


class Attention(nn.Module):
    """Self-attention. `attention_fn` replaces `plain_attention`; a `FusedAttention` rotates too, where heads fit it.

    `rotation` gives queries and keys their positions, on as many trailing tokens as the tables of `rope` have; None
    leaves them as they are.
    """

    num_heads: int
    qkv_bias: bool = True
    mask_k_bias: bool = True
    proj_bias: bool = True
    dtype: Any = jnp.float32
    attention_fn: AttentionFn | None = None
    rotation: Rotation | None = HALVES
    materialize: bool = False

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, *rope: jax.Array) -> jax.Array:
        dim = x_BxTxD.shape[-1]
        x_BxTxD = written_out(x_BxTxD, self.materialize)
        qkv = QKV(self.qkv_bias, self.mask_k_bias, self.dtype, name="qkv")
        fused = isinstance(self.attention_fn, FusedAttention)
        if fused and self.attention_fn.fits(self.num_heads, dim // self.num_heads, x_BxTxD.shape[1], self.dtype):
            out = self._fused(qkv, x_BxTxD, *rope)
        else:
            permuted = fused and self.attention_fn.permuted
            projected = qkv(x_BxTxD, self._columns(restore_columns)) if permuted else qkv(x_BxTxD)
            attend = None if fused else self.attention_fn
            out = self._by_heads(attend or plain_attention, projected, *rope)
        proj = nn.Dense(dim, use_bias=self.proj_bias, dtype=self.dtype, kernel_init=dense_init, name="proj")
        return checkpoint_name(proj(out), "branch")

    def _by_heads(self, attend: Callable, projected_BxTx3D: jax.Array, *rope: jax.Array) -> jax.Array:
        batch, tokens, dim = *projected_BxTx3D.shape[:2], projected_BxTx3D.shape[2] // 3
        projected = checkpoint_name(projected_BxTx3D, "qkv")
        projected = projected.reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = projected[:, :, 0], projected[:, :, 1], projected[:, :, 2]
        if self.rotation is not None:
            q, k = self.rotation.turn(q, *rope), self.rotation.turn(k, *rope)
        return checkpoint_name(attend(q, k, v).reshape(batch, tokens, dim), "attention")

    def _fused(self, qkv: QKV, x_BxTxD: jax.Array, *rope: jax.Array) -> jax.Array:
        none = (jnp.zeros((0, x_BxTxD.shape[-1] // self.num_heads)),) * 2  # tables of no token
        projected = qkv(x_BxTxD) if self.attention_fn.permuted else qkv(x_BxTxD, self._columns(permute_columns))
        tables = (self.rotation or HALVES).half_tables(*(rope if self.rotation is not None else none))
        return self.attention_fn(checkpoint_name(projected, "qkv"), *tables, self.num_heads)

    def _columns(self, reorder: Callable) -> Callable[[jax.Array], jax.Array]:
        """`reorder` for these heads: `permute_columns` or `restore_columns`."""
        interleaved = (self.rotation or HALVES).interleaved
        return functools.partial(reorder, num_heads=self.num_heads, interleaved=interleaved)


def exact_gelu(x: jax.Array) -> jax.Array:
    """x [...] times the normal distribution function of x, in float32.

    By erf, as PyTorch does it: erfc, which `jax.nn.gelu` takes, splits into cases, and in a wide layer a TPU spends as
    long on these as on the matrix product before.
    """
    wide = x.astype(jnp.float32)
    return (wide * (0.5 + 0.5 * jax.lax.erf(wide * 2**-0.5))).astype(x.dtype)


@jax.custom_jvp
def exact_gelu_with_slope(x: jax.Array) -> jax.Array:
    """`exact_gelu` whose backward pass keeps one array, the slope, which costs the forward pass little."""
    return exact_gelu(x)


@exact_gelu_with_slope.defjvp
def _exact_gelu_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    wide = x.astype(jnp.float32)
    below = 0.5 + 0.5 * jax.lax.erf(wide * 2**-0.5)
    slope = below + wide * jnp.exp(-0.5 * wide * wide) * (2 * math.pi) ** -0.5
    return (wide * below).astype(x.dtype), (dx * slope).astype(x.dtype)


def tanh_gelu(x: jax.Array) -> jax.Array:
    """The usual approximation of `exact_gelu`, [...] -> [...]; its error is at most 5e-4."""
    return jax.nn.gelu(x, approximate=True)


def written_out(x: jax.Array, materialize: bool) -> jax.Array:
    """x [...], computed and stored before anything reads it, if `materialize`.

    Left to itself the compiler may merge a norm or an activation into the matrix product behind it, which then computes
    it again for every tile: on TPUs with fast matrix units that takes longer than the product.
    """
    return jax.lax.optimization_barrier(x) if materialize else x


class Mlp(nn.Module):
    """Linear, GELU, linear. materialize: see `written_out`."""

    hidden: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    gelu: Activation = exact_gelu
    materialize: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def dense(width, name):
            return nn.Dense(width, use_bias=self.use_bias, dtype=self.dtype, kernel_init=dense_init, name=name)

        hidden = checkpoint_name(dense(self.hidden, "fc1")(written_out(x, self.materialize)), "hidden")
        activated = written_out(self.gelu(hidden), self.materialize)
        return checkpoint_name(dense(x.shape[-1], "fc2")(activated), "branch")


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x). materialize: see `written_out`."""

    hidden: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    materialize: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def dense(width, name):
            return nn.Dense(width, use_bias=self.use_bias, dtype=self.dtype, kernel_init=dense_init, name=name)

        x = written_out(x, self.materialize)
        gate, value = (checkpoint_name(dense(self.hidden, name)(x), "hidden") for name in ("w1", "w2"))
        gated = written_out(jax.nn.silu(gate) * value, self.materialize)
        return checkpoint_name(dense(x.shape[-1], "w3")(gated), "branch")


FFN_LAYERS = {"mlp": None, "swiglu": 8, "swiglu32": 32, "swiglu64": 64, "swiglu128": 128}


def ffn_hidden(ffn_layer: str, dim: int, ratio: float) -> int:
    """Hidden width: `ratio * dim` for "mlp"; two thirds of it, rounded up to the alignment, for "swiglu[N]".

    Raises:
      ValueError: unknown `ffn_layer`.
    """
    if ffn_layer not in FFN_LAYERS:
        raise ValueError(f"ffn_layer must be one of {list(FFN_LAYERS)}, got {ffn_layer!r}")
    hidden, align = int(ratio * dim), FFN_LAYERS[ffn_layer]
    if align is None:
        return hidden
    hidden = int(hidden * 2 / 3)
    return hidden + (-hidden) % align


def feed_forward(
    ffn_layer: str, dim: int, ratio: float, use_bias: bool, dtype: Any, gelu: Activation, materialize: bool, name: str
) -> nn.Module:
    """The feed-forward module that `ffn_layer` names ("mlp", which takes `gelu`, "swiglu", "swiglu64", ...)."""
    hidden = ffn_hidden(ffn_layer, dim, ratio)
    if ffn_layer == "mlp":
        return Mlp(hidden, use_bias, dtype, gelu, materialize, name=name)
    return SwiGLU(hidden, use_bias, dtype, materialize, name=name)


def check_fit(images_BxHxWxC: jax.Array, multiple: int) -> None:
    """Encoders cut off what does not fill a token, as the originals do; asked for that by mistake, they refuse.

    Raises:
      ValueError: a side is no positive multiple of `multiple` pixels; the message gives the nearest that are.
    """
    height, width = images_BxHxWxC.shape[1:3]
    if height % multiple or width % multiple or not height or not width:
        nearest = sorted({(_near(height, multiple, up), _near(width, multiple, up)) for up in (False, True)})
        sizes = " or ".join(f"{h}x{w}" for h, w in nearest)
        raise ValueError(f"image of {height}x{width} pixels: sides must be multiples of {multiple}; nearest is {sizes}")


def _near(side: int, multiple: int, up: bool) -> int:
    return max(-(-side // multiple) if up else side // multiple, 1) * multiple


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one linear map: [B, H, W, 3] -> [B, H // p, W // p, dim]. Rests are cut off."""

    dim: int
    patch_size: int
    dtype: Any = jnp.float32
    use_bias: bool = True

    @nn.compact
    def __call__(self, images_BxHxWxC: jax.Array) -> jax.Array:
        batch, height, width, channels = images_BxHxWxC.shape
        p = self.patch_size
        h, w = height // p, width // p
        if not h or not w:
            raise ValueError(f"image of {height}x{width} pixels is smaller than one patch of {p}x{p}")
        bound = (channels * p * p) ** -0.5

        def uniform(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        kernel = self.param("kernel", uniform, (p, p, channels, self.dim))
        patches = images_BxHxWxC[:, : h * p, : w * p].astype(self.dtype).reshape(batch, h, p, w, p, channels)
        out = jnp.einsum("bhpwqc,pqcd->bhwd", patches, kernel.astype(self.dtype))
        if not self.use_bias:
            return out
        return out + self.param("bias", uniform, (self.dim,)).astype(self.dtype)
