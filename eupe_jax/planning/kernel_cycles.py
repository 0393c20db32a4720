"""Cycles of Pallas kernels, for which the compiler estimates none: the bundles of its static schedule.

A TPU core runs one bundle of instructions a cycle, in order, and the compiler schedules around latencies. A kernel is
compiled alone for one device of the chip, the compiler writes its bundles down, and the bundles of the loop over the
grid, times its trips, are the cycles. (Waiting for HBM is not in them: the estimator takes the kernel's roofline where
that is longer.) Cycles counted once are kept in a table that comes with the project, and in the user's cache; both go
by a digest of the kernel's code, so that a kernel that changed is counted anew.

    python -m eupe_jax.planning.kernel_cycles PROGRAM.hlo.gz ...   # makes the table of the kernels in these programs
"""

import argparse
import contextlib
import datetime
import gzip
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eupe_jax.planning.hlo import HloError, Instruction, parse, parse_shapes
from eupe_jax.planning.kernel_calls import (
    TARGET,
    is_kernel,
    kernel_config,
    kernel_digest,
    kernel_key,
    kernel_memory,
    kernel_name,
    kernel_steps,
)
from eupe_jax.sharding.chips import Chip, chip_of, topology

TABLE = Path(__file__).with_name("kernel_cycles.json")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eupe_jax" / "kernel_cycles.json"

_DUMP = "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"


@dataclass(frozen=True)
class Schedule:
    """What one kernel costs on one chip, whatever its grid.

    Attributes:
      step_cycles: bundles of one trip of the loop over the grid.
      extra_trips: trips beyond the grid's steps, which fill and drain the pipeline.
      outside_cycles: bundles outside the loop.
      cores: cores that share the grid.
      shapes, libtpu, date: for readers, except that another compiler may schedule otherwise: `libtpu` must be the
        installed one, where one is installed.
    """

    kernel: str
    step_cycles: int
    extra_trips: int
    outside_cycles: int
    cores: int
    shapes: str
    libtpu: str
    date: str

    def cycles(self, steps: int) -> float:
        """Of one call with a grid of `steps`."""
        return self.outside_cycles + self.step_cycles * (-(-steps // self.cores) + self.extra_trips)


def cycles_of(hlo_text: str, chip: Chip, topology_name: str) -> dict[str, float]:
    """Cycles of one call of every Pallas kernel in a compiled program, by `kernel_calls.kernel_key`.

    Kernels that no table knows are compiled, which takes seconds each and needs libtpu; they are kept in CACHE.

    Raises:
      ImportError: libtpu is needed and not installed.
      HloError: the compiler's schedule of a kernel has a form that is not understood.
    """
    kernels = {kernel_key(i): i for i in _kernels(hlo_text)}
    known = _read(TABLE) | _read(CACHE)
    missing = {_entry(chip, i): i for i in kernels.values() if not _valid(known.get(_entry(chip, i)))}
    if missing:
        counted = count(missing, topology_name)
        _add(CACHE, counted)
        known |= counted
    return {key: known[_entry(chip, i)].cycles(kernel_steps(_body(i))) for key, i in kernels.items()}


def _kernels(hlo_text: str) -> Iterable[Instruction]:
    for computation in parse(hlo_text).computations.values():
        yield from (i for i in computation.instructions.values() if is_kernel(i))


def _body(instruction: Instruction) -> str:
    return kernel_config(instruction)["body"]


def _entry(chip: Chip, instruction: Instruction) -> str:
    """Key of a table: chips that are one device or two are not the same."""
    return f"{chip.name}x{chip.devices}/{kernel_digest(_body(instruction))}"


# ---- tables


def _read(path: Path) -> dict[str, Schedule]:
    try:
        found = json.loads(path.read_text())
        return {key: Schedule(**value) for key, value in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        if path == TABLE:
            raise HloError(f"{path}: the table of kernels' cycles cannot be read: {error}") from None
        return {}  # a cache: counted anew


def _valid(schedule: Schedule | None) -> bool:
    installed = libtpu_version()
    return schedule is not None and installed in (None, schedule.libtpu)


def libtpu_version() -> str | None:
    """Version of the installed libtpu; None where there is none."""
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return None


def _add(path: Path, schedules: Mapping[str, Schedule]) -> None:
    """Adds to a table; a cache that cannot be written is done without."""
    with contextlib.suppress(OSError):
        _write(path, _read(path) | schedules)


def _write(path: Path, schedules: Mapping[str, Schedule]) -> None:
    """By way of a temporary file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps({key: asdict(value) for key, value in sorted(schedules.items())}, indent=1) + "\n")
    temporary.replace(path)


# ---- counting


def count(kernels: Mapping[str, Instruction], topology_name: str) -> dict[str, Schedule]:
    """Schedules of kernels (by any key), compiled in a process of its own: libtpu reads its options once.

    Raises:
      HloError: the compiler refuses one.
    """
    requests = [_request(instruction) for instruction in kernels.values()]
    with tempfile.TemporaryDirectory(prefix="eupe_jax_kernels_") as folder:
        environment = {**os.environ, "LIBTPU_INIT_ARGS": _DUMP.format(folder=folder), "JAX_PLATFORMS": "cpu"}
        search = [path for path in sys.path if path]
        environment["PYTHONPATH"] = os.pathsep.join(search)
        done = subprocess.run(
            [sys.executable, "-m", "eupe_jax.planning.kernel_cycles", "--compile", folder, "--topology", topology_name],
            input=json.dumps(requests), capture_output=True, text=True, env=environment,
        )  # fmt: skip
    if done.returncode:
        what = _last_error(done.stderr) or f"exit status {done.returncode}"
        raise HloError(f"compiling {len(requests)} kernel(s) alone for {topology_name} failed: {what}")
    answers = json.loads(done.stdout.strip().splitlines()[-1])
    return {key: Schedule(**answer) for key, answer in zip(kernels, answers, strict=True)}


def _last_error(stderr: str) -> str:
    """The exception that ended a process: its first two lines, for the compiler's messages go on and on."""
    lines = stderr.strip().splitlines()
    starts = [number for number, line in enumerate(lines) if re.match(r"[\w.]+Error: ", line)] or [len(lines) - 1]
    return " ".join(lines[starts[-1] : starts[-1] + 2]) if lines else ""


def _request(instruction: Instruction) -> dict:
    inputs = re.search(r"operand_layout_constraints=\{((?:[^{}]|\{[^{}]*\})*)\}", instruction.attributes)
    if not inputs:
        raise HloError(f"kernel {instruction.name!r} of the compiled program does not say what it takes")
    return {
        "name": kernel_name(instruction),
        "config": {
            "custom_call_config": kernel_config(instruction),
            "scoped_memory_configs": kernel_memory(instruction),
        },
        "inputs": [[s.dtype, s.dims] for s in parse_shapes(inputs[1])],
        "outputs": [[s.dtype, s.dims] for s in instruction.shapes],
        "steps": kernel_steps(_body(instruction)),
    }


_DTYPES = {"pred": np.bool_, "bf16": jax.numpy.bfloat16, "f32": np.float32, "f16": np.float16, "s32": np.int32,
           "u32": np.uint32, "s8": np.int8, "u8": np.uint8, "s16": np.int16, "u16": np.uint16}  # fmt: skip


def _compile(requests: Sequence[dict], topology_name: str, folder: Path) -> list[dict]:
    """Compiles kernels one by one; the compiler writes their bundles into `folder`, as `count` told it to."""
    device = topology(topology_name)[0]
    sharding = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())
    answers, seen = [], set()
    for request in requests:
        arguments = [jax.ShapeDtypeStruct(dims, _DTYPES[d], sharding=sharding) for d, dims in request["inputs"]]
        call = jax.ffi.ffi_call(
            TARGET,
            [jax.ShapeDtypeStruct(dims, _DTYPES[d]) for d, dims in request["outputs"]],
            custom_call_api_version=1,
            legacy_backend_config=json.dumps(request["config"]),
        )
        jax.jit(call).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
        written = [p for p in folder.glob("*-ffi_call*-final_bundles.txt") if "schedule-analysis" not in p.name]
        fresh = [p for p in written if p not in seen]
        seen.update(fresh)
        if len(fresh) != 1:
            raise HloError(f"kernel {request['name']!r}: the compiler wrote {len(fresh)} schedules, not one")
        answers.append(asdict(_schedule(request, fresh[0].read_text())))
    return answers


def _schedule(request: dict, bundles: str) -> Schedule:
    step, trips, outside = count_bundles(bundles)
    cores = 2 if "/* core id */" in bundles else 1
    shapes = ", ".join(f"{dtype}[{','.join(map(str, dims))}]" for dtype, dims in request["inputs"])
    extra = trips - -(-request["steps"] // cores) if trips else 0
    version, today = libtpu_version() or "", datetime.date.today().isoformat()
    return Schedule(request["name"], step, extra, outside, cores, shapes, version, today)


_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|\d+)\s+(?:[A-Z]{2})?\s*:\s*(?:>\s*)*\{", re.MULTILINE)
_LOOP_EXIT = re.compile(r"scmp\.\w+\.s32\.totalorder %\w+, (\d+) /\* loop exit test \*/")


def count_bundles(text: str) -> tuple[int, int, int]:
    """(bundles of one trip of the outermost loop, its trips, bundles outside) of a schedule as the compiler writes it.

    Loops inside the outermost one count with their own trips. Code behind a condition counts as if it always ran.

    Raises:
      HloError: a loop whose trips are no constant, or several loops one after another.
    """
    starts = list(_BUNDLE.finditer(text))
    lines = [text[a.start() : b.start()] for a, b in zip(starts, [*starts[1:], None], strict=False) if b] + [
        text[starts[-1].start() :]
    ]
    regions: dict[str, int] = {}
    loops = []  # (first bundle, last bundle, trips)
    for number, line in enumerate(lines):
        for region in re.findall(r"Start(?:/End empty)? region (\d+)", line):
            regions.setdefault(region, number)
        for target in re.findall(r"sbr\.rel[^;}]*target = \$region(\d+)", line):
            if target in regions:  # backwards
                loops.append((regions[target], number, _trips(lines, regions[target], number)))
    outermost = [loop for loop in loops if not any(_inside(loop, other) for other in loops)]
    if len(outermost) > 1:
        raise HloError("a kernel's schedule has several loops one after another: their cycles cannot be counted")
    if not outermost:
        return len(lines), 0, 0
    first, last, trips = outermost[0]
    body = last - first + 1
    for inner in loops:
        depth = [other for other in loops if _inside(inner, other)]
        if depth:  # its bundles are in the body once; every trip of it and of the loops around it, but the outermost
            around = math.prod(other[2] for other in depth if other != outermost[0])
            body += (inner[1] - inner[0] + 1) * (inner[2] - 1) * around
    return body, trips, len(lines) - (last - first + 1)


def _inside(loop: tuple, other: tuple) -> bool:
    return other != loop and other[0] <= loop[0] and loop[1] <= other[1]


def _trips(lines: Sequence[str], first: int, last: int) -> int:
    """The bound of the exit test nearest before the branch back."""
    for line in reversed(lines[first : last + 1]):
        if match := _LOOP_EXIT.search(line):
            return int(match[1])
    raise HloError("a kernel's schedule has a loop without constant trips: its cycles cannot be counted")


# ---- command


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the table anew from the kernels of programs: what the cache knows of them, and what is missing counted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="*", help="compiled programs, optimized HLO as text or gzip")
    parser.add_argument("--topology", help="count what is missing for these chips, such as v5e:16x16")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    if flags.compile:
        print(json.dumps(_compile(json.load(sys.stdin), flags.topology, Path(flags.compile))))
        return
    kernels = {kernel_digest(_body(i)): i for program in flags.programs for i in _kernels(_text(Path(program)))}
    if flags.topology and kernels:
        chip, known = chip_of(topology(flags.topology)[0]), _read(CACHE)
        missing = {_entry(chip, i): i for i in kernels.values() if not _valid(known.get(_entry(chip, i)))}
        _add(CACHE, count(missing, flags.topology) if missing else {})
    found = {key: schedule for key, schedule in _read(CACHE).items() if key.split("/")[1] in kernels}
    _write(TABLE, found)
    print(f"{TABLE}: {len(found)} schedules of {len(kernels)} kernels")


def _text(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()


if __name__ == "__main__":
    main()
