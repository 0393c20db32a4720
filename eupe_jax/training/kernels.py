"""Which kernels a model computes with: chosen by the devices of the mesh, never stored in a checkpoint.

TPUs take the fused RoPE and attention kernel, GPUs cuDNN's attention, everything else plain operations. On a TPU the
form of GELU, and whether collectives run beside computation, are a matter of the chip's generation: docs/plans/tried.md
has what was tried, choices.md what tanh costs a teacher.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from eupe_jax.models import zoo
from eupe_jax.models.fused_attention import FusedAttention, permute_columns
from eupe_jax.models.layers import exact_gelu, exact_gelu_with_slope, plain_attention, tanh_gelu
from eupe_jax.models.rope import HALVES
from eupe_jax.sharding.chips import chip_of
from eupe_jax.sharding.rules import path_name

ATTENTION = ("auto", "fused", "cudnn", "plain")
TEACHER_GELU = ("auto", "exact", "tanh")
ASYNC_COLLECTIVES = ("auto", "on", "off")

_JOINT = re.compile("/blocks/attn/qkv/(kernel|bias)$")  # of every encoder that takes an attention
# Chips whose compiler merges norms and activations into the matrix products behind them, and computes them once a tile.
_MATERIALIZE = ("v5p", "v6e")
# Where erf, though computed once, takes a frozen teacher longer than the matrix product before it.
_TANH = ("v6e",)
# v5e gathers ahead of time unasked.
_ASYNC = ("v5p", "v6e")
ASYNC_OPTIONS = {
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_enable_async_all_gather": "true",
}


def model_fields(compute: ConfigDict, mesh: Mesh, model: str, *, frozen: bool) -> dict[str, Any]:
    """Constructor fields of zoo model `model` for the devices of `mesh`, from `config.compute`.

    frozen: a teacher, whose GELU may be approximated where that pays. Trained models compute as published.

    Raises:
      ValueError: a choice that does not exist, or not on these devices; names the field.
    """
    check(compute)
    known = zoo.family(model).module.__dataclass_fields__
    attend = attention_fn(compute.attention, mesh)
    if frozen and isinstance(attend, FusedAttention):
        attend = dataclasses.replace(attend, permuted=True)
    fields = {
        "attention_fn": attend,
        "gelu": _gelu(compute, mesh, model, frozen),
        "materialize": _chip(mesh) in _MATERIALIZE or None,
    }
    return {name: value for name, value in fields.items() if value is not None and name in known}


def in_kernel_order(module: nn.Module, variables: Any) -> Any:
    """The variables of a frozen encoder as its attention reads them: nothing but the columns of its blocks' joint
    projections changes places, and only for a kernel that asks for it (`FusedAttention.permuted`).
    """
    attend = getattr(module, "attention_fn", None)
    if not (isinstance(attend, FusedAttention) and attend.permuted):
        return variables

    @jax.jit
    def reordered(x: jax.Array) -> jax.Array:
        return permute_columns(x, module.num_heads, getattr(module, "rotation", HALVES).interleaved)

    return jax.tree_util.tree_map_with_path(
        lambda path, x: reordered(x) if _JOINT.search(path_name(path)) else x, variables
    )


def compiler_options(compute: ConfigDict, mesh: Mesh) -> dict[str, str] | None:
    """Options of the compiler for the step's program; None where its defaults are best."""
    check(compute)
    if mesh.devices.flat[0].platform != "tpu":
        return None
    on = _chip(mesh) in _ASYNC if compute.async_collectives == "auto" else compute.async_collectives == "on"
    return dict(ASYNC_OPTIONS) if on else None


def check(compute: ConfigDict) -> None:
    """Raises ValueError, naming the field, for a value that it does not have."""
    for field, known in (
        ("attention", ATTENTION), ("teacher_gelu", TEACHER_GELU), ("async_collectives", ASYNC_COLLECTIVES)
    ):  # fmt: skip
        if compute[field] not in known:
            raise ValueError(f"compute.{field} is {compute[field]!r}: use one of {', '.join(known)}")


def teacher_gelu(compute: ConfigDict, mesh: Mesh) -> str:
    """What `compute.teacher_gelu` means on these devices: "exact" or "tanh"."""
    if compute.teacher_gelu != "auto":
        return compute.teacher_gelu
    return "tanh" if _chip(mesh) in _TANH else "exact"


def attention_fn(choice: str, mesh: Mesh) -> Callable | FusedAttention | None:
    """The attention of the encoders on these devices; None: plain.

    Raises:
      ValueError: the choice does not run there.
    """
    platform, tensor = mesh.devices.flat[0].platform, mesh.shape.get("tensor", 1)
    if choice == "auto":
        choice = {"tpu": "fused" if tensor == 1 else "plain", "gpu": "cudnn"}.get(platform, "plain")
        return {"fused": FusedAttention(mesh), "cudnn": cudnn_where_it_fits, "plain": None}[choice]
    if choice == "fused" and (platform != "tpu" or tensor != 1):
        raise ValueError(
            f"compute.attention='fused' needs TPUs and mesh.tensor=1, not {platform} devices and {tensor}: use 'auto'"
        )
    if choice == "cudnn" and platform != "gpu":
        raise ValueError(f"compute.attention='cudnn' needs GPUs, these are {platform} devices: use 'auto'")
    return {"fused": FusedAttention(mesh), "cudnn": cudnn_attention, "plain": None}[choice]


def cudnn_attention(q_BxTxHxD: jax.Array, k_BxTxHxD: jax.Array, v_BxTxHxD: jax.Array) -> jax.Array:
    """cuDNN's flash attention: half precision, head widths of 8, 16, ... 128 (Hopper: 256)."""
    return jax.nn.dot_product_attention(q_BxTxHxD, k_BxTxHxD, v_BxTxHxD, implementation="cudnn")


def cudnn_where_it_fits(q_BxTxHxD: jax.Array, k_BxTxHxD: jax.Array, v_BxTxHxD: jax.Array) -> jax.Array:
    """`cudnn_attention` where it takes such heads in that precision, else `plain_attention`."""
    half = q_BxTxHxD.dtype in (jnp.bfloat16, jnp.float16)
    width = q_BxTxHxD.shape[-1]
    attend = cudnn_attention if half and width % 8 == 0 and width <= 128 else plain_attention
    return attend(q_BxTxHxD, k_BxTxHxD, v_BxTxHxD)


def _chip(mesh: Mesh) -> str:
    """Its name among `chips.CHIPS`, "" for other devices."""
    chip = chip_of(mesh.devices.flat[0])
    return chip.name if chip else ""


def _gelu(compute: ConfigDict, mesh: Mesh, model: str, frozen: bool) -> Callable | None:
    """None: as the model has it."""
    fields = zoo.family(model).module.__dataclass_fields__
    if "gelu" not in fields or fields["gelu"].default is not exact_gelu:
        return None
    choice = teacher_gelu(compute, mesh) if frozen else "exact"
    if not frozen and mesh.devices.flat[0].platform == "cpu":
        return exact_gelu_with_slope  # memory is slow here: fewer arrays to keep are a tenth of a step's time
    return {"exact": exact_gelu, "tanh": tanh_gelu}[choice]
