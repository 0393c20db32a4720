"""Step time of a compiled TPU program that never ran: FLOPs, bytes, cycles and transfers read off its optimized HLO.

Two estimates of every operation: a *roofline* (the larger of FLOPs over peak and HBM bytes over bandwidth), and the
*compiler's*: its own `estimated_cycles` over the clock, never under the roofline. Both are predictions.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from eupe_jax.planning import collectives as collectives_lib
from eupe_jax.planning import work
from eupe_jax.planning.collectives import Collective
from eupe_jax.planning.hlo import Computation, HloError, Instruction, Module, parse, trip_count
from eupe_jax.planning.kernel_calls import is_kernel, kernel_key, kernel_name
from eupe_jax.planning.timeline import Done, Loop, Outcome, Run, Start, simulate
from eupe_jax.sharding.chips import Chip

UNKNOWN_FACTOR = 2.0  # on the roofline of an operation for which the compiler gives no cycles
UNKNOWN_KERNEL_FACTOR = 4.0  # the same, for a Pallas kernel whose schedule nobody counted

ASSUMPTIONS = (
    "FLOPs are those of matrix products and convolutions (2 per multiply-add) as compiled, at the chip's bfloat16 peak;"
    " products in higher precision are 3 or 6 passes.",
    "Bytes are what operations move from and to HBM, with the padding of tiles; what lies in VMEM moves none. A fusion"
    " that slices a stacked array reads the slice, one that updates it writes the update.",
    "Roofline: the larger of both, operation by operation. Compiler: its own cycle estimate over the clock, never less"
    f" than the roofline; without one (small scalar work), {UNKNOWN_FACTOR:g} x the roofline.",
    "Pallas kernels: bundles of the compiler's static schedule x iterations, one cycle a bundle, or the roofline of"
    f" what they read and write if that is longer; a kernel without a schedule counts {UNKNOWN_KERNEL_FACTOR:g} x.",
    "Copies between HBM and VMEM that start early run beside operations at the full HBM bandwidth; the program waits"
    " where it needs them. Of a conditional's branches the longest is taken.",
    "No time for launching a step, for waiting on input, or for thermal and power limits.",
    *collectives_lib.ASSUMPTIONS,
)

_FREE = frozenset(
    """parameter get-tuple-element tuple bitcast constant after-all add-dependency partition-id replica-id
    opt-barrier""".split()
)
_LAYOUT = ("copy", "transpose", "reshape", "pad", "concatenate", "slice", "dynamic-slice", "dynamic-update-slice")
_NO_WORK = ("ConcatBitcast", "AllocateBuffer", "AsyncCollectiveStart", "AsyncCollectiveDone", "Sharding",
            "SPMDFullToShardShape", "SPMDShardToFullShape", "AssumeGatherIndicesInBound")  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """One instruction of the schedule, of one run; `trips` runs make a step.

    Attributes:
      kind: "matmul" (any product or convolution), "kernel" (Pallas), "layout" (copies and the like), "other".
      path: loops it lies in: "12x/50x".
      flops: of one run, 2 for a multiply-add, whatever its precision.
      hbm_bytes: moved by one run.
      cycles: the compiler's, or counted bundles; None where there are none.
      roofline_seconds, compiler_seconds: of one run.
    """

    name: str
    op_name: str
    kind: str
    path: str
    trips: int
    flops: int
    hbm_bytes: float
    cycles: float | None
    roofline_seconds: float
    compiler_seconds: float
    opcode: str = ""


@dataclass(frozen=True)
class Estimate:
    """Costs of one step on one device.

    Attributes:
      flops: of matrix products, convolutions and Pallas kernels, recomputation included.
      hbm_bytes: moved by operations, early copies and collectives.
      roofline_seconds, compiler_seconds: sums over operations.
      exposed_seconds: what collectives add to the conservative of the two steps; `copy_seconds`: what waiting for
        copies adds to it.
      roofline_step_seconds, compiler_step_seconds: with all waiting.
      step_seconds: the longer of the two.
      uncounted: operations for which the compiler gives no cycles; `uncounted_seconds` of compiler_seconds are theirs.
    """

    operations: tuple[Operation, ...]
    collectives: tuple[Collective, ...]
    flops: int
    hbm_bytes: float
    roofline_seconds: float
    compiler_seconds: float
    exposed_seconds: float
    copy_seconds: float
    roofline_step_seconds: float
    compiler_step_seconds: float
    uncounted: tuple[str, ...]
    uncounted_seconds: float

    @property
    def step_seconds(self) -> float:
        """The larger of both estimates: neither alone counts everything."""
        return max(self.roofline_step_seconds, self.compiler_step_seconds)


def estimate(
    hlo_text: str,
    chip: Chip,
    *,
    kernels: Mapping[str, float] | None = None,
    mesh: Mapping[str, int] | None = None,
) -> Estimate:
    """Costs of the program `compiled.as_text()` on `chip`.

    Args:
      kernels: cycles of one call of each Pallas kernel by `kernel_calls.kernel_key` (`kernel_cycles.cycles_of`).
      mesh: axes of the mesh within one slice in order, to name the axes of collectives.

    Raises:
      HloError: a program that cannot be counted (a loop without constant bounds).
    """
    walk = _Walk(parse(hlo_text), chip, kernels or {}, mesh or {})
    steps = walk.schedule(walk.module.entry, 1, ())
    compiler = simulate(steps, lambda operation: operation.compiler_seconds)
    roofline = simulate(steps, lambda operation: operation.roofline_seconds)
    total = functools.partial(_total, walk.operations)
    slower = max(compiler, roofline, key=lambda outcome: outcome.seconds)
    uncounted = [o for o in walk.operations if o.cycles is None and o.compiler_seconds]
    return Estimate(
        operations=tuple(walk.operations),
        collectives=tuple(
            replace(c, exposed_seconds=slower.exposed.get(number, 0.0)) for number, c in enumerate(walk.collectives)
        ),
        flops=round(total("flops")),
        hbm_bytes=total("hbm_bytes") + walk.transfer_bytes,
        roofline_seconds=total("roofline_seconds"),
        compiler_seconds=total("compiler_seconds"),
        exposed_seconds=_exposed(slower),
        copy_seconds=slower.exposed.get("copy", 0.0),
        roofline_step_seconds=roofline.seconds,
        compiler_step_seconds=compiler.seconds,
        uncounted=tuple(o.name for o in uncounted),
        uncounted_seconds=sum(o.compiler_seconds * o.trips for o in uncounted),
    )


def _total(operations: list[Operation], field: str) -> float:
    return sum(getattr(operation, field) * operation.trips for operation in operations)


def _exposed(outcome: Outcome) -> float:
    return sum(seconds for name, seconds in outcome.exposed.items() if name != "copy")


class _Walk:
    """Turns computations into steps of a schedule, collecting operations and collectives on the way."""

    def __init__(self, module: Module, chip: Chip, kernels: Mapping[str, float], mesh: Mapping[str, int]):
        self.module, self.chip, self.kernels, self.mesh = module, chip, kernels, mesh
        self.operations: list[Operation] = []
        self.collectives: list[Collective] = []
        self.transfer_bytes = 0.0

    def schedule(self, where: Computation, trips: int, path: tuple[str, ...]) -> list:
        """Steps of one run of a computation that runs `trips` times a step."""
        steps: list = []
        for instruction in where.instructions.values():
            if instruction.opcode in _FREE:
                continue
            steps.extend(self._steps(where, instruction, trips, path))
        return steps

    def _steps(self, where: Computation, instruction: Instruction, trips: int, path: tuple[str, ...]) -> Iterator:
        opcode = instruction.opcode
        if opcode == "while":
            count = trip_count(self.module, where, instruction)
            body = self.module.computations[instruction.loop()[1]]
            yield Loop(self.schedule(body, trips * count, (*path, f"{count}x")), count)
        elif opcode in ("call", "conditional"):
            yield from self._branch(instruction, trips, path)
        elif event := collectives_lib.event(self.module, where, instruction, self.chip):
            yield from self._collective(where, instruction, event, trips, path)
        elif opcode.endswith("-start") and opcode != "async-start":
            yield Start(instruction.name, "copy", self._copied(instruction, trips) / self.chip.hbm_bandwidth)
        elif opcode.endswith("-done"):
            yield Done(instruction.operands[0])
        elif opcode not in ("recv", "send") and instruction.target not in _NO_WORK:
            yield self._operation(where, instruction, trips, path)

    def _branch(self, instruction: Instruction, trips: int, path: tuple[str, ...]) -> list:
        """Steps of a call, or of the longest branch of a conditional."""
        choices = []
        for name in instruction.called():
            branch = _Walk(self.module, self.chip, self.kernels, self.mesh)
            steps = branch.schedule(self.module.computations[name], trips, path)
            choices.append((simulate(steps, lambda o: o.compiler_seconds).seconds, len(choices), branch, steps))
        if not choices:
            raise HloError(f"{instruction.opcode} {instruction.name!r} of the compiled program calls nothing known")
        _, _, branch, steps = max(choices, key=lambda choice: choice[:2])
        shift = len(self.collectives)
        self.operations += branch.operations
        self.collectives += branch.collectives
        self.transfer_bytes += branch.transfer_bytes
        return _renumbered(steps, shift)

    def _collective(self, where, instruction, event, trips: int, path) -> Iterator:
        if event.what == "done":
            yield Done(event.key)
            return
        if event.what == "step":
            yield self._operation(where, instruction, trips, path)
            return
        c = event.collective
        axes = collectives_lib.mesh_axes(c.group, self.mesh) if self.mesh and c.network == "ici" else ()
        number = len(self.collectives)
        self.collectives.append(replace(c, trips=trips, path="/".join(path), axes=axes))
        moved = sum(shape.hbm_bytes() for shape in where.operand_shapes(instruction))
        written = instruction.shapes if event.what == "sync" else instruction.shapes[1:2]
        self.transfer_bytes += trips * (moved + sum(shape.hbm_bytes() for shape in written))
        yield Start(event.key, c.network, c.run_seconds, number)
        if event.what == "sync":
            yield Done(event.key)
        if instruction.cycles or work.flops(self.module, where, instruction)[0]:  # a fusion that computes besides
            yield self._operation(where, instruction, trips, path)

    def _copied(self, instruction: Instruction, trips: int) -> float:
        """HBM bytes of one early copy: what it writes, and as much read, of which one side is VMEM."""
        arrays = [shape for shape in instruction.shapes if shape.dims][:2]
        if not arrays:
            return 0.0
        moved = replace(min(arrays, key=lambda shape: shape.elements), space=0)  # of an array and its slice, the slice
        bytes_ = moved.hbm_bytes() * sum(side.space == 0 for side in arrays)
        self.transfer_bytes += trips * bytes_
        return bytes_

    def _operation(self, where: Computation, instruction: Instruction, trips: int, path: tuple[str, ...]) -> Run:
        flops, passes = work.flops(self.module, where, instruction)
        moved = work.hbm_bytes(self.module, where, instruction)
        cycles, kind, factor = instruction.cycles, _kind(instruction, flops), UNKNOWN_FACTOR
        if kind == "kernel":
            cycles, factor = self.kernels.get(kernel_key(instruction)), UNKNOWN_KERNEL_FACTOR
        roofline = max(flops * passes / self.chip.peak_flops, moved / self.chip.hbm_bandwidth)
        compiler = roofline * factor if cycles is None else max(roofline, cycles / self.chip.clock_hz)
        operation = Operation(
            kernel_name(instruction) if kind == "kernel" else instruction.name,
            instruction.op_name, kind, "/".join(path), trips, flops, moved, cycles, roofline, compiler,
            instruction.opcode,
        )  # fmt: skip
        self.operations.append(operation)
        return Run(operation)


def _renumbered(steps: list, shift: int) -> list:
    """Steps of another walk, with the numbers of its collectives as they are in this one."""
    out = []
    for step in steps:
        if isinstance(step, Start) and step.item is not None:
            step = replace(step, item=step.item + shift)
        elif isinstance(step, Loop):
            step = Loop(_renumbered(step.body, shift), step.trips)
        out.append(step)
    return out


def _kind(instruction: Instruction, flops: int) -> str:
    if is_kernel(instruction):
        return "kernel"
    if flops:
        return "matmul"
    name = instruction.name.split(".")[0].removesuffix("_fusion")
    return "layout" if instruction.opcode in _LAYOUT or name.replace("_", "-") in _LAYOUT else "other"
