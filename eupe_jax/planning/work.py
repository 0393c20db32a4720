"""What one instruction of a compiled program does: FLOPs of its products, bytes that it moves from and to HBM."""

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from eupe_jax.planning.collectives import KINDS
from eupe_jax.planning.hlo import Computation, HloError, Instruction, Module, Shape
from eupe_jax.planning.kernel_calls import is_kernel, kernel_flops

# ---- FLOPs


def flops(module: Module, where: Computation, instruction: Instruction) -> tuple[int, float]:
    """(FLOPs of all products in an instruction, passes over the matrix unit that they take on average)."""
    if is_kernel(instruction):
        return kernel_flops(instruction), 1.0
    total, passes = 0, 0
    for product, inner in _products(module, where, instruction):
        count = _dot_flops(product, inner) if product.opcode == "dot" else _convolution_flops(product, inner)
        total += count
        passes += count * _passes(product, inner)
    return total, passes / total if total else 1.0


def _products(module: Module, where: Computation, instruction: Instruction) -> Iterator:
    if instruction.opcode in ("dot", "convolution"):
        yield instruction, where
    elif instruction.opcode in ("fusion", "async-start") and instruction.calls:
        inner = module.computations[instruction.calls]
        for part in inner.instructions.values():
            yield from _products(module, inner, part)


def _passes(product: Instruction, where: Computation) -> int:
    if all(shape.dtype != "f32" for shape in where.operand_shapes(product)):
        return 1
    precision = re.search(r"operand_precision=\{(\w+)", product.attributes)
    return {"highest": 6, "high": 3}.get(precision[1] if precision else "", 1)


def _dot_flops(product: Instruction, where: Computation) -> int:
    left = where.instructions[product.operands[0]].shapes[0]
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", product.attributes)
    sizes = (left.dims[int(axis)] for axis in contracted[1].split(",") if axis) if contracted else ()
    return 2 * product.shapes[0].elements * math.prod(sizes)


def _convolution_flops(product: Instruction, where: Computation) -> int:
    """Multiply-adds x 2 over the positions of the window that meet the input (batched products are dilated ones)."""
    left, right = (where.instructions[name].shapes[0].dims for name in product.operands[:2])
    out = product.shapes[0].dims
    labels = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", product.attributes)
    if not labels:
        raise HloError(f"convolution {product.name!r} of the compiled program names no dimensions")
    of_left, of_right, of_out = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", product.attributes)
    window = dict(part.split("=") for part in window[1].split()) if window else {}
    count = 2 * out[of_out.index("b")] * out[of_out.index("f")] * right[of_right.index("i")]
    for axis in (c for c in of_out if c.isdigit()):
        number = int(axis)

        def along(key: str, default: str, number: int = number) -> str:
            return window[key].split("x")[number] if key in window else default

        count *= _positions(
            left[of_left.index(axis)],
            right[of_right.index(axis)],
            out[of_out.index(axis)],
            int(along("stride", "1")),
            int(along("pad", "0_0").split("_")[0]),
            int(along("lhs_dilate", "1")),
            int(along("rhs_dilate", "1")),
        )
    return count


@functools.lru_cache(maxsize=4096)
def _positions(size: int, window: int, out: int, stride: int, pad: int, dilate: int, window_dilate: int) -> int:
    """Pairs (output, tap of the window) that fall on an element of the input, along one axis."""
    starts = np.arange(out, dtype=np.int64) * stride - pad
    pairs = 0
    for tap in range(window):
        place = starts + tap * window_dilate
        pairs += int(np.count_nonzero((place >= 0) & (place % dilate == 0) & (place // dilate < size)))
    return pairs


# ---- bytes


def hbm_bytes(module: Module, where: Computation, instruction: Instruction) -> float:
    """Bytes that one run moves from and to HBM."""
    opcode = instruction.opcode
    if opcode == "fusion" and instruction.calls:
        return _fusion_bytes(module, where, instruction)
    if opcode in ("slice", "dynamic-slice", "gather"):
        source = where.instructions[instruction.operands[0]].shapes[0]
        out = instruction.shapes[0]
        return _slice_bytes(source, out) + out.hbm_bytes()
    if opcode in ("dynamic-update-slice", "scatter"):
        update = where.instructions[instruction.operands[1 if opcode == "dynamic-update-slice" else -1]].shapes[0]
        return update.hbm_bytes() + _slice_bytes(instruction.shapes[0], update)
    read = sum(shape.hbm_bytes() for shape in where.operand_shapes(instruction))
    return read + sum(shape.hbm_bytes() for shape in instruction.shapes)


def _slice_bytes(source: Shape, part: Shape) -> float:
    """HBM bytes of the part of `source` that has the sizes of `part`."""
    if len(part.dims) == len(source.dims):
        part = replace(source, dims=part.dims)  # in the layout of the whole
    return min(source.hbm_bytes(), replace(part, space=source.space).hbm_bytes())


def _fusion_bytes(module: Module, where: Computation, fusion: Instruction) -> float:
    inner = module.computations[fusion.calls]
    total = 0.0
    read: dict[str, float] = {}
    for number, name in enumerate(fusion.operands):
        source = where.instructions[name].shapes
        if len(source) == 1:
            bytes_ = _read_bytes(module, inner, inner.parameter(number), source[0])
        else:
            bytes_ = sum(shape.hbm_bytes() for shape in source)
        read[name] = max(read.get(name, 0.0), bytes_)
    total = sum(read.values())
    roots = [inner.root] if inner.root.opcode != "tuple" else [inner.instructions[n] for n in inner.root.operands]
    if len(roots) != len(fusion.shapes):
        return total + sum(shape.hbm_bytes() for shape in fusion.shapes)
    return total + sum(_written_bytes(module, inner, r, s) for r, s in zip(roots, fusion.shapes, strict=True))


_TRANSPARENT = ("bitcast", "reshape")
_CARRIED = (*KINDS, "custom-call", "tuple")


def _read_bytes(module: Module, where: Computation, value: Instruction, source: Shape) -> float:
    """HBM bytes read of an operand of a fusion, by how it is used inside."""
    full = source.hbm_bytes()
    if not full or value.root:  # a root hands it on whole
        return full
    total = 0.0
    for user in where.users(value.name):
        if user.opcode in _TRANSPARENT:
            part = _read_bytes(module, where, user, source)
        elif user.opcode in ("dynamic-slice", "slice") and user.operands[0] == value.name:
            part = _slice_bytes(source, user.shapes[0])
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            part = 0.0  # updated in place
        elif user.opcode in _CARRIED:
            part = 0.0  # a collective that goes on inside the fusion; its bytes are counted with it
        elif user.opcode == "fusion" and user.calls:
            inner = module.computations[user.calls]
            numbers = [n for n, name in enumerate(user.operands) if name == value.name]
            part = max(_read_bytes(module, inner, inner.parameter(n), source) for n in numbers)
        else:
            return full
        total += part
        if total >= full:
            return full
    return total


def _written_bytes(module: Module, where: Computation, value: Instruction, out: Shape) -> float:
    """HBM bytes written of a result of a fusion: of an update in place, only the update."""
    while value.opcode in _TRANSPARENT and value.operands:
        value = where.instructions[value.operands[0]]
    if value.opcode in ("parameter", *KINDS):
        return 0.0
    if value.opcode == "dynamic-update-slice":
        return _slice_bytes(out, where.instructions[value.operands[1]].shapes[0])
    if value.opcode == "fusion" and value.calls and len(value.shapes) == 1:
        inner = module.computations[value.calls]
        return _written_bytes(module, inner, inner.root, out)
    return out.hbm_bytes()
