"""The text of an optimized TPU program as objects: computations, instructions, shapes with their place in memory.

Only what costs are counted from is read; everything else of an instruction stays in its `attributes`. The layout of a
shape says how much memory it takes: `bf16[261,261]{1,0:T(8,128)(2,1)S(1)}` lies row-major in tiles of 8 x 128, so as
264 x 384 elements, and `S(1)` is VMEM (no number, or 0: HBM).
"""

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

_BYTES = {"pred": 1, "token": 0, "opaque": 0, "bf16": 2, "s4": 0.5, "u4": 0.5, "s2": 0.25, "u2": 0.25, "f4e2m1fn": 0.5}

_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?|pred|token|opaque)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{\s*$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", re.DOTALL)
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_COMMENT = re.compile(r"/\*.*?\*/")
_PARENTHESIS = re.compile(r"[()]")
_NAME = re.compile(r"%([\w.\-]+)")


class HloError(ValueError):
    """A program that this reader does not understand: its costs would be wrong."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One array (a leaf of a tuple).

    Attributes:
      order: axes from the minor-most on ("minor to major"); empty where the text gives no layout.
      tile: sizes of the tile over the last of the minor-most axes, slowest first: (8, 128).
      space: memory space; 0 is HBM, 1 VMEM, others scalar memory and flags.
    """

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def elements(self) -> int:
        """Their number."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Bytes of the elements alone."""
        return self.elements * element_bytes(self.dtype)

    def padded_bytes(self) -> float:
        """Bytes with the padding of tiles."""
        if not self.dims:
            return self.bytes
        dims, fastest = list(self.dims), self.tile[::-1]
        for size, axis in zip(fastest, self.order, strict=False):
            dims[axis] = -(-dims[axis] // size) * size
        missing = math.prod(fastest[len(self.order) :])  # a vector in tiles of 8 x 128 fills one row of each
        return math.prod(dims) * missing * element_bytes(self.dtype)

    def hbm_bytes(self) -> float:
        """Bytes that a pass over it moves from or to HBM: 0 for what lies in VMEM."""
        return self.padded_bytes() if self.space == 0 else 0.0


@functools.cache
def element_bytes(dtype: str) -> float:
    """Bytes of one element; below 1 for types of a few bits. Raises HloError for an unknown type."""
    if dtype in _BYTES:
        return _BYTES[dtype]
    if match := re.match(r"[a-z]+(\d+)", dtype):
        return int(match[1]) / 8
    raise HloError(f"unknown element type {dtype!r} in the compiled program")


@functools.lru_cache(maxsize=4096)
def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Arrays of a type, tuples flattened in order."""
    return tuple(_shape(*match.groups()) for match in _SHAPE.finditer(text))


def _shape(dtype: str, dims: str, layout: str | None) -> Shape:
    sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
    order, _, rest = (layout or "").partition(":")
    tile = re.match(r"T\(([\d,]+)\)", rest)
    space = re.search(r"S\((\d+)\)", rest)
    return Shape(
        dtype,
        sizes,
        tuple(int(d) for d in order.split(",") if d),
        tuple(int(d) for d in tile[1].split(",")) if tile else (),
        int(space[1]) if space else 0,
    )


@dataclass(slots=True)
class Instruction:
    """One operation: `name = type opcode(operands), attributes`.

    Attributes:
      shapes: its results, tuples flattened.
      inside: the text between the parentheses: a parameter's number, a constant's value, operands by name.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: list[str]
    inside: str
    attributes: str
    root: bool

    @property
    def calls(self) -> str | None:
        """Name of the computation that a fusion or call runs; None where there is none."""
        return self._name_after("calls=")

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from: "jit(step)/while/body/dot_general"."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def cycles(self) -> int | None:
        """The compiler's own estimate; None where it makes none."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(match[1]) if match else None

    @property
    def target(self) -> str:
        """Target of a custom call."""
        match = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return match[1] if match else ""

    def _name_after(self, key: str) -> str | None:
        match = re.search(rf"\b{key}%?([\w.\-]+)", self.attributes)
        return match[1] if match else None

    def called(self) -> list[str]:
        """Computations of a call or a conditional, in order."""
        if match := re.search(r"(?:branch_computations|called_computations)=\{([^}]*)\}", self.attributes):
            return [name.strip().lstrip("%") for name in match[1].split(",")]
        keys = ("true_computation=", "false_computation=", "to_apply=", "calls=")
        return [name for key in keys if (name := self._name_after(key))]

    def loop(self) -> tuple[str, str]:
        """(condition, body) of a while."""
        return self._name_after("condition="), self._name_after("body=")


@dataclass(slots=True)
class Computation:
    """One computation of a program: its instructions by name, in the order of the text."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    _users: dict[str, list[Instruction]] | None = None
    _parameters: dict[int, Instruction] | None = None

    @property
    def root(self) -> Instruction:
        """The result; the last instruction where none is marked."""
        instructions = list(self.instructions.values())
        return next((i for i in instructions if i.root), instructions[-1])

    def users(self, name: str) -> list[Instruction]:
        """Instructions that read `name`."""
        if self._users is None:
            self._users = {}
            for instruction in self.instructions.values():
                for operand in dict.fromkeys(instruction.operands):
                    self._users.setdefault(operand, []).append(instruction)
        return self._users.get(name, [])

    def parameter(self, number: int) -> Instruction:
        """The instruction that stands for argument `number`. Raises KeyError."""
        if self._parameters is None:
            found = (i for i in self.instructions.values() if i.opcode == "parameter")
            self._parameters = {int(i.inside): i for i in found}
        return self._parameters[number]

    def operand_shapes(self, instruction: Instruction) -> Iterator[Shape]:
        """Arrays that `instruction` reads, each once, tuples flattened."""
        for name in dict.fromkeys(instruction.operands):
            if name in self.instructions:
                yield from self.instructions[name].shapes


@dataclass(frozen=True, slots=True)
class Module:
    """A program; `partitions` is the number of devices of a slice that run it."""

    computations: Mapping[str, Computation]
    entry: Computation
    partitions: int = 1


def parse(text: str) -> Module:
    """The optimized program that `compiled.as_text()` gives.

    Raises:
      HloError: the text holds no program.
    """
    computations: dict[str, Computation] = {}
    entry = current = None
    for line in _logical_lines(text):
        if not line.startswith(" "):
            if (match := _COMPUTATION.match(line)) and not line.startswith("HloModule"):
                current = computations[match[2]] = Computation(match[2])
                entry = current if match[1] else entry
        elif current is not None and (instruction := _instruction(line)):
            current.instructions[instruction.name] = instruction
    if entry is None:
        raise HloError("no ENTRY computation: this is not the text of a compiled program")
    header = re.search(r"^HloModule .*?num_partitions=(\d+)", text, re.MULTILINE)
    return Module(computations, entry, int(header[1]) if header else 1)


def _logical_lines(text: str) -> Iterator[str]:
    """Lines with their continuations: attributes and literals may run over several."""
    held: list[str] = []
    for line in text.split("\n"):
        starts = line[:1] in ("}", "") or line[:1] != " " or _INSTRUCTION.match(line)
        if starts and held:
            yield "\n".join(held)
            held = []
        held.append(line)
    if held:
        yield "\n".join(held)


def _instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if not match:
        return None
    rest = match[3]
    end = _closing(rest) if rest.startswith("(") else _type_end(rest)
    type_text, rest = rest[:end], rest[end:]
    opcode = _OPCODE.match(rest)
    if not opcode:
        raise HloError(f"instruction {match[2]!r} of the compiled program has no operation: {rest[:60]!r}")
    start = opcode.end()
    end = _closing(rest, start - 1)
    inside = rest[start : end - 1]
    inside = _COMMENT.sub("", inside) if "/*" in inside else inside
    shapes = parse_shapes(_COMMENT.sub("", type_text))
    return Instruction(
        match[2], opcode[1], shapes, _NAME.findall(inside), inside.strip(), rest[end:], match[1] is not None
    )


def _type_end(text: str) -> int:
    brace = text.find("{")
    space = text.find(" ")
    return text.index("}", brace) + 1 if 0 <= brace < space else space


def _closing(text: str, start: int = 0) -> int:
    """Just after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in _PARENTHESIS.finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise HloError(f"unclosed parenthesis in the compiled program: {text[:80]!r}")


# ---- trip counts


def trip_count(module: Module, where: Computation, loop: Instruction) -> int:
    """How often the body of a while runs: from its bound, its start and its step.

    The start matters: the compiler peels iterations off loops to overlap their collectives.

    Raises:
      HloError: the loop has no constant bounds.
    """
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(match[1])
    condition, body = (module.computations[name] for name in loop.loop())
    index, bound, direction = _bound(module, condition, loop)
    start = _constant(module, where, loop.operands[0], index)
    step = _step(module, body, index)
    if None in (bound, start, step) or not step:
        raise HloError(
            f"loop {loop.name!r} of the compiled program has no constant trip count "
            f"(start {start}, bound {bound}, step {step}): its costs cannot be counted"
        )
    distance = {"LT": bound - start, "LE": bound - start + 1, "GT": start - bound, "GE": start - bound + 1}
    span = distance.get(direction, abs(bound - start))
    return max(0, -(-span // abs(step)))


def _bound(module: Module, condition: Computation, loop: Instruction) -> tuple[int, int | None, str]:
    """(index of the counter in the loop's tuple, its bound, direction of the comparison that keeps the loop going)."""
    root = condition.root
    inner, arguments = condition, None
    if root.opcode == "fusion":
        arguments = root.operands
        inner = module.computations[root.calls]
        root = inner.root
    if root.opcode != "compare":
        raise HloError(f"loop {loop.name!r} of the compiled program does not end on a comparison")
    direction = re.search(r"direction=(\w+)", root.attributes)[1]
    index = bound = None
    for position, name in enumerate(root.operands):
        source = _source(inner, name)
        if source.opcode == "parameter" and arguments is not None:  # of the fusion: look outside
            source = _source(condition, arguments[int(source.inside)])
        if source.opcode == "get-tuple-element":
            index = _index(source)
            if position == 1:
                direction = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
        elif source.opcode == "constant":
            bound = int(source.inside)
    if index is None:
        raise HloError(f"loop {loop.name!r} of the compiled program compares no counter of its own")
    return index, bound, direction


def _index(element: Instruction) -> int:
    return int(re.search(r"index=(\d+)", element.attributes)[1])


def _source(where: Computation, name: str) -> Instruction:
    """The instruction that makes `name`, through copies of it."""
    instruction = where.instructions[name]
    while instruction.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start", "reshape"):
        instruction = where.instructions[instruction.operands[0]]
    return instruction


def _constant(module: Module, where: Computation, name: str, index: int) -> int | None:
    """The constant at `index` of the tuple that `name` makes; None where it is none."""
    source = _source(where, name)
    if source.opcode == "tuple":
        source = _source(where, source.operands[index])
    elif source.opcode in ("while", "get-tuple-element"):
        return None
    return int(source.inside) if source.opcode == "constant" and re.fullmatch(r"-?\d+", source.inside) else None


def _step(module: Module, body: Computation, index: int) -> int | None:
    """What the body adds to its counter."""
    update = _source(body, body.root.operands[index]) if body.root.opcode == "tuple" else None
    where, arguments = body, None
    if update is not None and update.opcode == "fusion":
        arguments, where = update.operands, module.computations[update.calls]
        update = _source(where, where.root.name)
    if update is None or update.opcode not in ("add", "subtract"):
        return None
    for name in update.operands:
        source = _source(where, name)
        if source.opcode == "parameter" and arguments is not None:
            source = _source(body, arguments[int(source.inside)])
        if source.opcode == "constant":
            return int(source.inside) * (1 if update.opcode == "add" else -1)
    return None
