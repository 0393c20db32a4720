"""RoPE and softmax attention in one TPU kernel that reads the qkv projection's output as it lies there.

On a TPU what costs time around attention is layout, not softmax: slicing queries, keys and values out of the
projection, rotating halves of 64 or 96 lanes and moving heads before tokens all rewrite the activations. Here the
projection's columns are put into another order instead (weights are small), so that every access is whole lanes:

    [q first halves | q second halves | k first halves | k second halves | v],  each [heads, half] (v: [heads, width])

and rotation is four multiplications. The whole sequence of a group of heads sits in VMEM; nothing is padded.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

LANES = 128
VMEM_BYTES = 100 * 2**20
WHOLE_ROWS = 520  # queries up to this many are one block of logits; more are cut into blocks of ROWS
ROWS = 256


def head_group(num_heads: int, head_dim: int) -> int | None:
    """The fewest heads whose halves fill whole lanes and that divide the heads; None where there are none."""
    for heads in range(1, num_heads + 1):
        if num_heads % heads == 0 and heads * head_dim // 2 % LANES == 0:
            return heads
    return None


def permute_columns(kernel: jax.Array, num_heads: int, interleaved: bool = False) -> jax.Array:
    """The qkv projection [..., 3D] (kernel or bias) with its columns in the order that the kernel reads.

    interleaved: rotation pairs neighbours (2i, 2i + 1) of a head instead of (i, i + half).
    """
    *lead, width = kernel.shape
    half = width // 3 // num_heads // 2
    q, k, v = jnp.split(kernel, 3, axis=-1)

    def halves_first(x: jax.Array) -> jax.Array:
        if interleaved:
            x = jnp.moveaxis(x.reshape(*lead, num_heads, half, 2), -1, -3)
        else:
            x = jnp.moveaxis(x.reshape(*lead, num_heads, 2, half), -2, -3)
        return x.reshape(*lead, width // 3)

    return jnp.concatenate([halves_first(q), halves_first(k), v], axis=-1)


def restore_columns(kernel: jax.Array, num_heads: int, interleaved: bool = False) -> jax.Array:
    """What `permute_columns` made this of: [..., 3 D] -> [..., 3 D]."""
    order = permute_columns(jnp.arange(kernel.shape[-1]), num_heads, interleaved)
    return jnp.take(kernel, jnp.argsort(order), axis=-1)


@dataclass(frozen=True)
class FusedAttention:
    """Attention for `layers.Attention` that takes the projection's output whole.

    Attributes:
      mesh: devices the batch is cut over, by `batch_axes`; None on a single device.
      interpret: run the kernel as plain JAX operations, on any device (slow: for tests).
      permuted: the projection's weights have been through `permute_columns` already: frozen ones, once for all, instead
        of in every layer of every step.
    """

    mesh: Mesh | None = None
    batch_axes: tuple[str, ...] = ("data", "fsdp")
    interpret: bool = False
    permuted: bool = False

    def fits(self, num_heads: int, head_dim: int, tokens: int, dtype: Any) -> bool:
        """Whether there is a kernel for such heads: halves of them, and one program's data within fast memory."""
        heads = _Heads.of(num_heads, head_dim)
        return head_dim % 2 == 0 and _fast_bytes(tokens, heads, jnp.dtype(dtype).itemsize) <= VMEM_BYTES

    def __call__(self, qkv_BxTx3D: jax.Array, sin_NxK: jax.Array, cos_NxK: jax.Array, num_heads: int) -> jax.Array:
        """[B, T, D] from a projection with permuted columns (`permute_columns`), in its dtype.

        sin, cos: float32 [N, head width / 2] for the last N tokens; tokens before them are not rotated.
        """
        qkv = qkv_BxTx3D
        heads = _Heads.of(num_heads, qkv.shape[2] // 3 // num_heads)
        tables = _tables(sin_NxK, cos_NxK, qkv.shape[1], heads)
        run = functools.partial(_attention, heads, self.interpret)
        if self.mesh is None:
            return run(qkv, tables)
        batch, whole = PartitionSpec(self.batch_axes), PartitionSpec()
        return jax.shard_map(run, mesh=self.mesh, in_specs=(batch, whole), out_specs=batch, check_vma=False)(
            qkv, tables
        )


@dataclass(frozen=True)
class _Heads:
    """How heads are shared out over programs: `groups` programs of `heads` heads each."""

    heads: int
    groups: int
    width: int  # of one head

    @classmethod
    def of(cls, num_heads: int, head_dim: int) -> "_Heads":
        # Heads that fill no whole lanes (192 / 3, 384 / 6) are all done by one program, which reads the whole row.
        group = head_group(num_heads, head_dim) or num_heads
        return cls(group, num_heads // group, head_dim)

    @property
    def half(self) -> int:
        """Columns of the half heads of one program."""
        return self.heads * self.width // 2

    @property
    def aligned(self) -> bool:
        return self.half % LANES == 0

    @property
    def scale(self) -> float:
        """Of logits that are exponents of two."""
        return self.width**-0.5 * math.log2(math.e)

    def head(self, h: int) -> slice:
        """Columns of a head among values; of its halves: `half_head`."""
        return slice(h * self.width, (h + 1) * self.width)

    def half_head(self, h: int) -> slice:
        return slice(h * self.width // 2, (h + 1) * self.width // 2)


def _fast_bytes(tokens: int, heads: _Heads, item: int) -> int:
    """What a backward program holds in fast memory, about: its inputs and outputs twice (one image is read or written
    while another is computed; `item` bytes an element), both tables, float32 copies of four halves and a block of
    logits three times over.
    """
    row = tokens * 2 * heads.half  # elements of queries, keys, values, output or a gradient
    rows = min(tokens, WHOLE_ROWS if tokens <= WHOLE_ROWS else ROWS)
    return 2 * 8 * item * row + 2 * 4 * row // 2 * 2 + 8 * 4 * row // 2 + 3 * 4 * rows * tokens


def _tables(sin: jax.Array, cos: jax.Array, tokens: int, heads: _Heads) -> jax.Array:
    """Sines and cosines of every token under the half heads of a program: [2, T, half]."""
    prefix = ((tokens - sin.shape[0], 0), (0, 0))
    tables = jnp.stack([jnp.pad(sin, prefix), jnp.pad(cos, prefix, constant_values=1.0)])
    return jnp.tile(tables, (1, 1, heads.heads))


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _rotate(x1: jax.Array, x2: jax.Array, sin: jax.Array, cos: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x1 * cos - x2 * sin, x2 * cos + x1 * sin


def _row_blocks(tokens: int) -> list[slice]:
    rows = tokens if tokens <= WHOLE_ROWS else ROWS
    return [slice(first, min(first + rows, tokens)) for first in range(0, tokens, rows)]


Parts = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def _rotated(parts: Parts, tables: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Halves of rotated queries and keys, in the dtype of the products."""
    q1, q2, k1, k2 = (x.astype(jnp.float32) for x in parts[:4])
    return tuple(x.astype(parts[4].dtype) for x in (*_rotate(q1, q2, *tables), *_rotate(k1, k2, *tables)))


def _head(x1: jax.Array, x2: jax.Array, half: slice) -> jax.Array:
    """Rotated queries or keys of one head: [T, width]."""
    return jnp.concatenate([x1[:, half], x2[:, half]], axis=1)


# Logits lie with keys before queries, [keys, queries]: the largest and the sum over keys then go from row to row, where
# lanes need not be shifted. They are in powers of two: an exponential multiplies by log2(e) anyway.


def _forward(parts: Parts, tables, heads: _Heads, with_sums: bool = False) -> tuple[jax.Array, ...]:
    """Attention of one program's heads: [T, heads * width].

    with_sums: also log2 of each query's sum of exponentials over keys, float32 [heads, T]: what `_backward` divides by.
    """
    v = parts[4]
    q1, q2, k1, k2 = _rotated(parts, tables)
    outputs, sums = [], []
    for h in range(heads.heads):
        half = heads.half_head(h)
        q, k = _head(q1, q2, half), _head(k1, k2, half)
        columns, exponents = [], []
        for block in _row_blocks(v.shape[0]):
            logits = _dot(k, q[block], (1, 1))
            largest = logits.max(axis=0, keepdims=True)
            weights = jnp.exp2((logits - largest) * heads.scale)
            total = weights.sum(axis=0, keepdims=True)
            columns.append(_dot(v[:, heads.head(h)], weights.astype(v.dtype), (0, 0)) / total)
            if with_sums:
                exponents.append(largest * heads.scale + jnp.log(total) * math.log2(math.e))
        outputs.append(jnp.concatenate(columns, axis=1))
        if with_sums:
            sums.append(jnp.concatenate(exponents, axis=1))
    out = jnp.concatenate(outputs, axis=0).T.astype(v.dtype)
    return (out, jnp.concatenate(sums, axis=0)) if with_sums else (out,)


def _backward(parts: Parts, tables, out: jax.Array, sums_HxT: jax.Array, grad: jax.Array, heads: _Heads) -> Parts:
    """Gradients of q1, q2, k1, k2 and v from the output, the sums of `_forward` and the output's gradient.

    The weights are computed again, whole from the logits and the sums: no pass over the keys has to wait for another.
    """
    v = parts[4]
    q1, q2, k1, k2 = _rotated(parts, tables)
    products_DxT = (grad.astype(jnp.float32) * out.astype(jnp.float32)).T
    dqs_DxT, dks, dvs = [], [], []  # of each head
    for h in range(heads.heads):
        half, head = heads.half_head(h), heads.head(h)
        q, k = _head(q1, q2, half), _head(k1, k2, half)
        inner = products_DxT[head].sum(axis=0, keepdims=True)
        dq, dk, dv = [], 0.0, 0.0
        for block in _row_blocks(v.shape[0]):
            g = grad[block, head]
            weights = jnp.exp2(_dot(k, q[block], (1, 1)) * heads.scale - sums_HxT[h : h + 1, block])
            dv = dv + _dot(weights.astype(v.dtype), g, (1, 0))
            dlogits = (weights * (_dot(v[:, head], g, (1, 1)) - inner[:, block])).astype(v.dtype)
            dq.append(_dot(k, dlogits, (0, 0)))
            dk = dk + _dot(dlogits, q[block], (1, 0))
        dqs_DxT.append(jnp.concatenate(dq, axis=1))
        dks.append(dk)
        dvs.append(dv)
    scale, middle = heads.width**-0.5, heads.width // 2
    first, second = slice(0, middle), slice(middle, None)
    dq1, dq2 = (jnp.concatenate([dq[part] for dq in dqs_DxT], axis=0).T * scale for part in (first, second))
    dk1, dk2 = (jnp.concatenate([dk[:, part] for dk in dks], axis=1) * scale for part in (first, second))
    sin, cos = tables
    dq, dk = _rotate(dq1, dq2, -sin, cos), _rotate(dk1, dk2, -sin, cos)  # the transpose of a rotation turns back
    return tuple(x.astype(v.dtype) for x in (*dq, *dk, jnp.concatenate(dvs, axis=1)))


# ---- kernels: where the parts lie


def _split_row(row: jax.Array, half: int) -> Parts:
    return tuple(row[:, i * half : (i + 1) * half] for i in range(4)) + (row[:, 4 * half :],)


def _forward_kernel(*refs, heads: _Heads):
    count = 5 if heads.aligned else 1
    inputs, tables, outputs = refs[:count], refs[count], refs[count + 1 :]
    parts = tuple(x[0] for x in inputs) if heads.aligned else _split_row(inputs[0][0], heads.half)
    results = _forward(parts, tables[...], heads, with_sums=len(outputs) == 2)
    outputs[0][0] = results[0]
    for ref, sums in zip(outputs[1:], results[1:], strict=True):
        ref[0, 0] = sums


def _backward_kernel(*refs, heads: _Heads):
    count = 5 if heads.aligned else 1
    inputs, (tables, out, sums, grad), outputs = refs[:count], refs[count : count + 4], refs[count + 4 :]
    parts = tuple(x[0] for x in inputs) if heads.aligned else _split_row(inputs[0][0], heads.half)
    gradients = _backward(parts, tables[...], out[0], sums[0, 0], grad[0], heads)
    if heads.aligned:
        for ref, x in zip(outputs, gradients, strict=True):
            ref[0] = x
    else:
        outputs[0][0] = jnp.concatenate(gradients, axis=1)


def _specs(tokens: int, heads: _Heads) -> tuple[list, pl.BlockSpec, list]:
    """Block specs of the projection's parts, of the output, and of the parts' gradients; grid: (image, group)."""
    half, groups = heads.half, heads.groups

    def part(offset: int, width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, tokens, width), lambda image, group: (image, 0, offset + group))

    out = part(0, 2 * half)
    if not heads.aligned:
        row = part(0, 6 * half)
        return [row], out, [row]
    # offsets count blocks: four stretches of half heads, then values in blocks twice as wide
    inputs = [part(i * groups, half) for i in range(4)] + [part(2 * groups, 2 * half)]
    return inputs, out, [part(0, half)] * 4 + [out]


def _call(kernel: Callable, name: str, qkv: jax.Array, heads: _Heads, products: int, interpret: bool, **specs):
    batch, tokens, width = qkv.shape
    return pl.pallas_call(
        functools.partial(kernel, heads=heads),
        grid=(batch, heads.groups),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES),
        cost_estimate=pl.CostEstimate(
            flops=products * 2 * batch * tokens * tokens * width // 3,
            bytes_accessed=(products // 2) * qkv.size * qkv.dtype.itemsize,
            transcendentals=batch * heads.heads * heads.groups * tokens * tokens,
        ),
        name=name,
        interpret=interpret,
        **specs,
    )


def _sums_spec(tokens: int, heads: _Heads) -> pl.BlockSpec:
    """Of the sums, [B, groups, heads, T]."""
    return pl.BlockSpec((1, 1, heads.heads, tokens), lambda image, group: (image, group, 0, 0))


def _run_forward(qkv: jax.Array, tables: jax.Array, heads: _Heads, interpret: bool, with_sums: bool) -> list[jax.Array]:
    """The output [B, T, D], and the sums [B, groups, heads, T] if asked for."""
    batch, tokens, width = qkv.shape
    inputs, out, _ = _specs(tokens, heads)
    table = pl.BlockSpec(tables.shape, lambda image, group: (0, 0, 0))
    specs, shapes = [out], [jax.ShapeDtypeStruct((batch, tokens, width // 3), qkv.dtype)]
    if with_sums:
        specs.append(_sums_spec(tokens, heads))
        shapes.append(jax.ShapeDtypeStruct((batch, heads.groups, heads.heads, tokens), jnp.float32))
    call = _call(
        _forward_kernel, "rope_attention", qkv, heads, 2, interpret,
        in_specs=[*inputs, table], out_specs=specs, out_shape=shapes,
    )  # fmt: skip
    return call(*[qkv] * len(inputs), tables)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(heads: _Heads, interpret: bool, qkv: jax.Array, tables: jax.Array) -> jax.Array:
    """The tables get no gradient: nobody trains positions."""
    return _run_forward(qkv, tables, heads, interpret, with_sums=False)[0]


def _attention_forward(heads, interpret, qkv, tables):
    # named here, where they become residuals: a name given outside would leave them to be computed again
    out, sums = (checkpoint_name(x, "attention") for x in _run_forward(qkv, tables, heads, interpret, with_sums=True))
    return out, (qkv, tables, out, sums)


def _attention_backward(heads, interpret, saved, grad):
    qkv, tables, out, sums = saved
    batch, tokens, width = qkv.shape
    inputs, whole, gradients = _specs(tokens, heads)
    table = pl.BlockSpec(tables.shape, lambda image, group: (0, 0, 0))
    widths = [width // 6] * 4 + [width // 3] if heads.aligned else [width]
    call = _call(
        _backward_kernel, "rope_attention_backward", qkv, heads, 5, interpret,
        in_specs=[*inputs, table, whole, _sums_spec(tokens, heads), whole], out_specs=gradients,
        out_shape=[jax.ShapeDtypeStruct((batch, tokens, w), qkv.dtype) for w in widths],
    )  # fmt: skip
    parts = call(*[qkv] * len(inputs), tables, out, sums, grad)
    return jnp.concatenate(parts, axis=2), jnp.zeros_like(tables)


_attention.defvjp(_attention_forward, _attention_backward)
