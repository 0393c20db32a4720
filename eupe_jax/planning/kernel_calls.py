"""Pallas kernels in a compiled program: custom calls that carry the kernel whole, but no cycles."""

import base64
import functools
import hashlib
import json
import math
import re

from jaxlib.mlir import ir
from jaxlib.mosaic.python import tpu

from eupe_jax.planning.hlo import HloError, Instruction

TARGET = "tpu_custom_call"


def is_kernel(instruction: Instruction) -> bool:
    """Whether the instruction runs a Pallas kernel."""
    return instruction.opcode == "custom-call" and instruction.target == TARGET


def kernel_config(instruction: Instruction) -> dict:
    """The `custom_call_config` of a kernel: its body, its author's cost estimate, flags.

    Raises:
      HloError: it has none.
    """
    return _backend_config(instruction)["custom_call_config"]


def kernel_memory(instruction: Instruction) -> list[dict]:
    """The fast memory a kernel may take, in the form in which its author's `vmem_limit_bytes` reaches the compiler.

    Empty where it states no limit: the compiler's own holds.
    """
    # the compiler moves the offset to where its own part of the memory ends; a kernel alone starts at 0
    return [{**limit, "offset": "0"} for limit in _backend_config(instruction).get("scoped_memory_configs", [])]


def _backend_config(instruction: Instruction) -> dict:
    start = instruction.attributes.find("backend_config={")
    if start < 0:
        raise HloError(f"kernel {instruction.name!r} of the compiled program carries no configuration")
    config, _ = json.JSONDecoder().raw_decode(instruction.attributes[start + len("backend_config=") :])
    return config


def kernel_name(instruction: Instruction) -> str:
    """The name it was given: "rope_attention_backward" of ".../transpose(jvp(rope_attention_backward))/pallas_call"."""
    scopes = instruction.op_name.removesuffix("/pallas_call").split("/")
    names = re.findall(r"[\w.\-]+", scopes[-1])
    return names[-1] if names else instruction.name


def kernel_flops(instruction: Instruction) -> int:
    """FLOPs of one call, by its author's cost estimate.

    Raises:
      HloError: the kernel states none, so the program's FLOPs cannot be known.
    """
    cost = kernel_config(instruction).get("cost_estimate", {})
    if "flops" not in cost:
        raise HloError(f"kernel {kernel_name(instruction)!r} states no FLOPs: give its pallas_call a cost_estimate")
    return int(cost["flops"])


def kernel_key(instruction: Instruction) -> str:
    """What one call costs depends on this: the kernel's code and the steps of its grid."""
    body = kernel_config(instruction)["body"]
    return f"{kernel_digest(body)}x{kernel_steps(body)}"


def kernel_digest(body: str) -> str:
    """Digest of a kernel's code, whatever its grid and whichever file and line it was written in."""
    code = _GRID.sub("", _code(body))
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def kernel_steps(body: str) -> int:
    """Steps of the grid."""
    match = _GRID.search(_code(body))
    return math.prod(int(size) for size in match[1].split(",")) if match else 1


_GRID = re.compile(r"iteration_bounds = array<i64: ([\d, ]+)>")


@functools.lru_cache(maxsize=64)
def _code(body: str) -> str:
    """The kernel's operations as text, without where they stand in a file."""
    with ir.Context() as context:
        context.allow_unregistered_dialects = True
        tpu.register_dialect(context)
        module = ir.Module.parse(base64.b64decode(body))
        return module.operation.get_asm(enable_debug_info=False)
