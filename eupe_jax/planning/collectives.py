"""The collectives of a compiled TPU program: what moves, over which network, and when it starts and is waited for.

How they look in the text, and what is easy to get wrong:
- One asynchronous collective is several fusions: a start, fusions with a matmul inside which it goes on, a done. All
  name one channel; it runs once.
- An `all-gather` outside a fusion that carries `async_collective_name` is *not* asynchronous: the attribute remembers
  the name it had before the compiler gave up hiding it.
- A reduce-scatter may be a fusion of an all-reduce and a slice ("all-reduce-scatter").
- Between slices there are no replica groups: the program of each slice sends to its host ("megascale" transfers).
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eupe_jax.planning.hlo import Computation, HloError, Instruction, Module
from eupe_jax.sharding.chips import Chip

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
HOP_SECONDS = 1e-6  # one hop of a ring, added to every collective
DCN_SECONDS = 100e-6  # one transfer between slices, added to every one
SMALL = 2**16  # elements of a weight below which its whole gradient is looked for by shape only
LONGEST_RING = 16  # a slice is a torus: many devices are reached along several axes

ASSUMPTIONS = (
    "A collective is a ring along one axis of the torus, both directions at once: (g-1)/g of its bytes over the axis's"
    " bandwidth (all-reduce: twice; all-to-all: each piece over every link on its way; a permutation: one direction),"
    " plus 1 microsecond a hop for half the ring, 8 hops at most. A slice with an axis that is no ring (v5e and v6e:"
    " fewer than 16 chips; others: no multiple of 4) has half the bandwidth.",
    "Between slices: the same ring over each device's share of its host's network, plus 0.1 ms a transfer.",
    "Collectives of one network run one after another; one hides behind the operations between its start and its"
    " done and costs what is left. What the compiler leaves synchronous is exposed whole.",
)


@dataclass(frozen=True)
class Collective:
    """One collective of the program.

    Attributes:
      kind: one of KINDS.
      bytes: payload of one run: the whole array that is gathered, reduced or scattered.
      group_size: devices (or slices, on "dcn") that take part.
      trips: how often it runs in one step.
      network: "ici" inside a slice, "dcn" between slices.
      overlapped: whether the compiler starts it before it waits for it.
      seconds: of all runs, hidden or not; `exposed_seconds` of them hold up the step.
      axes: mesh axes that the group spans, where the mesh is known.
      path: loops it lies in.
    """

    kind: str
    name: str
    op_name: str
    bytes: float
    shapes: tuple[tuple[int, ...], ...]
    group_size: int
    network: str
    overlapped: bool
    run_seconds: float
    group: tuple[int, ...] = ()
    trips: int = 1
    path: str = ""
    axes: tuple[str, ...] = ()
    exposed_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Of all its runs in a step."""
        return self.run_seconds * self.trips


@dataclass(frozen=True)
class Event:
    """What an instruction does to a collective: "start", "done", "sync" or "step" (goes on inside a fusion)."""

    what: str
    key: str
    collective: Collective | None = None


def event(module: Module, where: Computation, instruction: Instruction, chip: Chip) -> Event | None:
    """The collective that starts, runs or ends at `instruction`; None where there is none."""
    opcode = instruction.opcode
    if opcode in KINDS:
        return Event("sync", instruction.name, _collective(module, where, instruction, instruction, chip, False))
    if opcode in ("send", "recv", "send-done", "recv-done"):
        return _between_slices(where, instruction, chip)
    if opcode.endswith("-done") and opcode.removesuffix("-done") in (*KINDS, "async"):
        start = _starter(where, instruction)
        return Event("done", start) if start else None
    if opcode.endswith("-start") and opcode.removesuffix("-start") in KINDS:
        return Event("start", instruction.name, _collective(module, where, instruction, instruction, chip, True))
    if opcode in ("fusion", "async-start") and instruction.calls:
        return _fused(module, instruction, chip)
    return None


def _fused(module: Module, instruction: Instruction, chip: Chip) -> Event | None:
    inner = module.computations[instruction.calls]
    parts = [i for i in inner.instructions.values() if i.opcode in KINDS]
    if not parts:
        return None
    part = parts[0]
    if instruction.opcode == "async-start":
        return Event("start", instruction.name, _collective(module, inner, part, instruction, chip, True))
    targets = {i.target for i in inner.instructions.values() if i.opcode == "custom-call"}
    chain = re.search(r'chain_id="(\w+)"', part.attributes)
    key = f"{_channel(part)}/{chain[1] if chain else ''}"
    if "AsyncCollectiveStart" in targets:
        return Event("start", key, _collective(module, inner, part, instruction, chip, True))
    if "AsyncCollectiveDone" in targets:
        return Event("done", key)
    if chain:
        return Event("step", key)
    return Event("sync", instruction.name, _collective(module, inner, part, instruction, chip, False))


def _channel(instruction: Instruction) -> str:
    match = re.search(r"channel_id=(\d+)", instruction.attributes)
    return match[1] if match else instruction.name


def _starter(where: Computation, done: Instruction) -> str | None:
    """Name of the start that a done waits for."""
    name = done.operands[0] if done.operands else None
    while name in where.instructions:
        instruction = where.instructions[name]
        if instruction.opcode.endswith("-start"):
            return name
        name = instruction.operands[0] if instruction.operands else None
    return None


def _collective(module, inner: Computation, part: Instruction, outer: Instruction, chip: Chip, overlapped: bool):
    kind = part.opcode.removesuffix("-start")
    shapes = [shape for name in part.operands for shape in inner.instructions[name].shapes]
    if kind == "all-reduce" and outer is not part:
        scattered = sum(shape.elements for shape in outer.shapes if shape.dims)
        if scattered < sum(shape.elements for shape in shapes) and outer.opcode == "fusion":
            kind = "reduce-scatter"
    group = replica_group(part.attributes, module.partitions)
    size = len(group)
    whole = sum(shape.bytes for shape in shapes) * (size if kind == "all-gather" else 1)
    return Collective(
        kind,
        outer.name,
        outer.op_name or part.op_name,
        whole,
        tuple(shape.dims for shape in shapes),
        size,
        "ici",
        overlapped,
        ring_seconds(kind, whole, size, chip.ici_bandwidth) + HOP_SECONDS * (min(size, LONGEST_RING) // 2),
        group,
    )


def ring_seconds(kind: str, bytes_: float, group: int, bandwidth: float) -> float:
    """Seconds that a ring of `group` devices needs to move a payload of `bytes_`, by its bandwidth alone.

    bandwidth: bytes a second of a device's two links together.
    """
    if group < 2:
        return 0.0
    if kind == "all-to-all":  # every piece goes the shorter way round and takes up each link on it
        share = sum(min(distance, group - distance) for distance in range(1, group)) / group
    elif kind in ("collective-permute", "collective-broadcast"):
        share = 2.0  # one way only
    else:
        share = (2 if kind == "all-reduce" else 1) * (group - 1) / group
    return share * bytes_ / bandwidth


# ---- between slices

_MEGASCALE = {"ALL_REDUCE": "all-reduce", "ALL_GATHER": "all-gather", "REDUCE_SCATTER": "reduce-scatter",
              "ALL_TO_ALL": "all-to-all", "ONE_TO_ONE": "collective-permute"}  # fmt: skip


def _between_slices(where: Computation, instruction: Instruction, chip: Chip) -> Event | None:
    """A transfer is a send and a receive with one rendezvous name; the receive's done ends it."""
    if instruction.opcode.endswith("-done"):
        start = where.instructions.get(instruction.operands[0])
        key = start and _rendezvous(start)
        return Event("done", key) if key and instruction.opcode == "recv-done" else None
    key = _rendezvous(instruction)
    if key is None or instruction.opcode == "recv":
        return None
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    kind = _MEGASCALE.get(transfer[1] if transfer else "")
    if kind is None:
        raise HloError(
            f"transfer {instruction.name!r} between slices is of a kind unknown here: {transfer and transfer[1]}"
        )
    slices = _slices(instruction)
    payload = instruction.shapes[0]
    whole = payload.bytes * (slices if kind == "all-gather" else 1)
    seconds = ring_seconds(kind, whole, slices, chip.dcn_bandwidth) + DCN_SECONDS
    collective = Collective(
        kind, instruction.name, instruction.op_name, whole, (payload.dims,), slices, "dcn", True, seconds
    )
    return Event("start", key, collective)


def _rendezvous(instruction: Instruction) -> str | None:
    match = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', instruction.attributes)
    return match[1] if match and "megascale" in instruction.attributes else None


def _slices(instruction: Instruction) -> int:
    """Slices of `_xla_megascale_target="{1,2}x{0:7}"`: a list or a range, times the devices of each."""
    match = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', instruction.attributes)
    if not match:
        raise HloError(f"transfer {instruction.name!r} between slices does not say which slices take part")
    parts = [[int(n) for n in part.split(":")] for part in match[1].split(",")]
    return sum(part[-1] - part[0] + 1 for part in parts)


# ---- groups


def replica_group(attributes: str, partitions: int) -> tuple[int, ...]:
    """The devices of the first group, by their number in the program.

    The text has four forms: lists `{{0,1},{2,3}}`, iota `[2,4]<=[4,2]T(1,0)`, a mesh with the axes that take part
    `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}`, and pairs of a permutation.
    """
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(int(d) for d in match[1].split(","))
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        groups = _numbers(match[1])
        return tuple(int(d) for d in _iota(match[2], match[3]).reshape(groups[0], -1)[0])
    if match := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:,\s*device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}",
        attributes,
    ):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        sizes = list(axes.values())
        ids = (_iota(match[2], match[3]) if match[2] else np.arange(int(np.prod(sizes)))).reshape(sizes)
        member = re.findall(r"'(\w+)'", match[4])
        return tuple(int(d) for d in ids[tuple(slice(None) if name in member else 0 for name in axes)].reshape(-1))
    if match := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return int(match[1]), int(match[2])
    return tuple(range(partitions))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def _iota(shape: str, permutation: str | None) -> np.ndarray:
    ids = np.arange(int(np.prod(_numbers(shape)))).reshape(_numbers(shape))
    return ids.transpose(_numbers(permutation)) if permutation else ids


def mesh_axes(group: Sequence[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes along which the devices of a group differ; devices are numbered row-major over the mesh of a slice.

    mesh: sizes of the axes within one slice.
    """
    if len(group) < 2 or max(group) >= np.prod(list(mesh.values())):
        return ()
    places = np.stack(np.unravel_index(list(group), tuple(mesh.values())))
    return tuple(name for name, place in zip(mesh, places, strict=True) if len(set(place.tolist())) > 1)


# ---- what should not be there


def whole_weight_all_reduces(
    collectives: Iterable[Collective],
    shapes: Iterable[tuple[int, ...]],
    cut_over: Sequence[str] = ("fsdp", "tensor"),
    held: Iterable[tuple[int, ...]] = (),
) -> list[Collective]:
    """All-reduces whose payload holds a whole weight (or its gradient) although the weight is cut over devices.

    Each should have been a reduce-scatter, which moves half the bytes and leaves each device what it keeps. (A
    reduce-scatter that the compiler wrote as a fusion of an all-reduce counts as one.) The gradient of a whole weight
    is summed over the axes that the weight is cut over, too: a sum over others alone is of a shard, whatever its shape.

    Args:
      shapes: of the parameters that are cut; stacked ones also count a layer, or a few, at a time.
      cut_over: mesh axes that parameters are cut over; told apart where the axes of collectives are known.
      held: shapes of the parameters that every device holds: a patch embedding has as many elements as a projection.
    """
    weights, whole = list(shapes), {_bare(part) for shape in held for part in (shape, shape[1:])}
    return [
        c
        for c in collectives
        if c.kind == "all-reduce"
        and (not c.axes or set(c.axes) & set(cut_over))
        and any(_holds(dims, weight, _bare(dims) in whole) for dims in c.shapes for weight in weights)
    ]


def _holds(dims: Sequence[int], weight: Sequence[int], exactly: bool) -> bool:
    """Whether a payload is as large as a weight, or one layer or more of a stack, however it was reshaped.

    Small arrays have many a number of elements in common, so they are told by their sizes alone; so is what has the
    shape of another parameter (`exactly`).
    """
    parts = [weight, weight[1:]] if len(weight) > 2 else [weight]
    if any(_bare(dims) == _bare(part) for part in parts):
        return True
    if exactly:
        return False
    part = math.prod(parts[-1])
    layers = [dims] if len(weight) < 3 or not dims or dims[0] > weight[0] else [dims, dims[1:]]
    return part >= SMALL and (math.prod(dims) == math.prod(weight) or any(math.prod(layer) == part for layer in layers))


def _bare(dims: Sequence[int]) -> tuple[int, ...]:
    """Sizes without ones, in any order: a layer of a stack, transposed or not."""
    return tuple(sorted(d for d in dims if d != 1))
