"""HBM of a compiled step by what it holds, and what the compiler says when it does not fit."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax

_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([BKMGT]?)"
_TEMPORARIES_ALONE = rf"HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)"
# The compiler has three ways to say it: with buffers assigned, before, and with both kinds of cores counted.
_COMPLAINTS = (
    rf"Used {_SIZE} of {_SIZE} hbm",
    _TEMPORARIES_ALONE,
    rf"TensorCore Hbm usage: {_SIZE}, .*exceeding available bytes: {_SIZE}",
)

STUDENTS, OPTIMIZER, TEACHERS = "student parameters", "optimizer state", "teacher parameters"
BATCH, STATISTICS = "batch", "statistics and counters"
PADDING, OUTPUTS, TEMPORARIES, CODE = "padding of these", "outputs not in place", "temporaries", "program code"


@dataclass(frozen=True)
class OutOfMemory:
    """What a compiler that ran out of HBM reports.

    needed, capacity: bytes. largest: (bytes, shape, where it comes from) of the largest allocations, largest first.
    """

    needed: float
    capacity: float
    largest: tuple[tuple[float, str, str], ...]

    @property
    def over(self) -> float:
        """Bytes above what the device has."""
        return self.needed - self.capacity


def argument_bytes(arguments: tuple[Any, Any, Any, Any]) -> dict[str, int]:
    """Bytes a device holds of the step's arguments (state, batch, teacher variables, statistics), by kind, unpadded."""
    state, batch, teachers, statistics = arguments
    kinds = {STUDENTS: 0, OPTIMIZER: 0, TEACHERS: 0, BATCH: 0, STATISTICS: 0}
    for student in state["students"].values():
        kinds[OPTIMIZER] += _shard_bytes(student["optimizer"])
        kinds[STUDENTS] += _shard_bytes({k: v for k, v in student.items() if k != "optimizer"})
    kinds[TEACHERS] = _shard_bytes(teachers)
    kinds[BATCH] = _shard_bytes(batch)
    kinds[STATISTICS] = _shard_bytes(statistics) + _shard_bytes({k: v for k, v in state.items() if k != "students"})
    return kinds


def _shard_bytes(tree: Any) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def hbm_by_kind(arguments: tuple[Any, Any, Any, Any], analysis: Any) -> dict[str, int]:
    """{kind: bytes of HBM on each device} from a compiled step's `memory_analysis()`.

    The sum is what the program needs in the worst case: everything that is ever alive, with fragmentation.
    """
    kinds = argument_bytes(arguments)
    kinds[PADDING] = max(analysis.argument_size_in_bytes - sum(kinds.values()), 0)
    kinds[OUTPUTS] = max(analysis.output_size_in_bytes - analysis.alias_size_in_bytes, 0)
    kinds[TEMPORARIES] = analysis.temp_size_in_bytes
    kinds[CODE] = analysis.generated_code_size_in_bytes
    return kinds


def read_out_of_memory(message: str, arguments: float) -> OutOfMemory | None:
    """What the error of a compiler says about memory; None where it is another error.

    arguments: bytes a device of the program's arguments, which one form of the message leaves out.
    """
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    for pattern in _COMPLAINTS:
        if found := re.search(pattern, message):
            needed, capacity = _bytes(*found.groups()[:2]), _bytes(*found.groups()[2:])
            if total := re.search(rf"Total hbm usage >= {_SIZE}", message):
                needed = max(needed, _bytes(*total.groups()))
            needed += arguments if pattern is _TEMPORARIES_ALONE else 0
            return OutOfMemory(needed, capacity, tuple(_allocations(message)))
    return None  # VMEM, or host memory: not a matter of what the run holds


def _allocations(message: str) -> Iterator[tuple[float, str, str]]:
    for block in re.split(r"\n\s*\d+\. ", message)[1:]:
        size, shape = re.search(rf"Size: {_SIZE}", block), re.search(r"Shape: (\S+)", block)
        if size and shape:
            origin = re.search(r'op_name="([^"]*)"', block)
            yield _bytes(*size.groups()), shape[1], origin[1] if origin else ""


def _bytes(number: str, unit: str) -> float:
    return float(number) * _UNITS[unit]


def first_change(
    kinds: dict[str, float], remat: dict[str, str], batch_per_chip: float, *, capacity: float, fsdp: int, room: int
) -> str:
    """The first thing to change in a config whose step does not fit, or barely.

    kinds: as `hbm_by_kind`; of a program that did not compile, the arguments alone. remat: policy of every student.
    capacity: bytes. fsdp: devices that a weight is cut over now; room: that a slice has for it.
    """
    weights = {k: kinds.get(k, 0) for k in (STUDENTS, OPTIMIZER, TEACHERS)}
    held, largest = sum(weights.values()), max(weights, key=weights.get)
    if held > kinds.get(TEMPORARIES, capacity / 2):
        if room % (2 * fsdp) == 0:
            return f"most of it is {largest}: cut parameters over more devices (--config.mesh.fsdp={2 * fsdp})"
        if held > capacity:
            return f"{largest} alone, cut over {fsdp} devices of {room}: more chips"
    for policy, stricter in (("none", "names"), ("dots", "names"), ("dots_no_batch", "names"), ("names", "full")):
        if names := [name for name, chosen in remat.items() if chosen == policy]:
            flags = " ".join(f"--config.students.{name}.remat={stricter}" for name in names)
            return f"keep fewer activations for the backward pass: {flags}"
    if batch_per_chip > 1:
        return f"fewer images at a time ({batch_per_chip:g} a chip now): --config.accumulate, twice as large"
    return "more chips, or --config.mesh.tensor=2: one image a chip does not fit"
