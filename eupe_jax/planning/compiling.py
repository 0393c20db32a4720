"""One step compiled for chips that are not there, and what the compiler says of it; kept by the program's digest."""

import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from eupe_jax.distill.resolutions import Resolutions
from eupe_jax.planning import memory, traced
from eupe_jax.sharding.chips import chip_of, topology
from eupe_jax.sharding.mesh import make_mesh
from eupe_jax.training import kernels, program

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax")
OPTIONS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # of the environment


@dataclass(frozen=True)
class Request:
    """What to compile: the step of `config` at `chosen` resolutions for `slices` slices of `topology`.

    cache: folder that keeps what was compiled, by the digest of the lowered program.
    """

    config: ConfigDict
    topology: str
    slices: int
    chosen: Resolutions
    cache: Path

    def digest(self) -> str:
        """Of everything but the folder: equal requests to equal code give equal programs."""
        return _sha256(
            self.config.to_json_best_effort(), self.topology, str(self.slices), repr(self.chosen), code_digest(),
            *versions(), *_options(),
        )  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of a step.

    Attributes:
      digest: of the lowered program with all that decides what becomes of it.
      lower_seconds, compile_seconds: on the machine that did it; peak_rss: bytes of its memory in the worst case.
      hbm: {kind: bytes a device}, see `memory.hbm_by_kind`; of a program that does not fit, the arguments alone.
      executed: FLOPs a device by origin, see `traced.executed_flops`.
      out_of_memory: the compiler's complaint as `memory.OutOfMemory`; None where it fits.
      text: path of the optimized HLO, gzip; None where there is none.
      largest: (bytes, shape, where it is made) of the largest arrays of a program that compiles and does not fit.
    """

    digest: str
    lower_seconds: float
    compile_seconds: float
    peak_rss: int
    hbm: dict[str, int]
    executed: dict[str, float]
    out_of_memory: memory.OutOfMemory | None
    text: str | None
    largest: tuple[tuple[float, str, str], ...] = ()

    def read_text(self) -> str:
        """The compiled program as text."""
        with gzip.open(self.text, "rt") as file:
            return file.read()


def versions() -> tuple[str, ...]:
    """ "jax 0.10.2", ... of what decides about a compiled program."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} without version")
    return tuple(found)


def compile_step(request: Request) -> Compiled:
    """Traces, lowers and compiles; or takes what the cache holds of the very same program.

    Raises:
      ValueError: the config or the topology is wrong, or the compiler refuses the program for another reason than HBM.
      ImportError: libtpu is missing.
    """
    config, start = request.config, time.monotonic()
    devices = topology(request.topology, request.slices)
    mesh = make_mesh(**config.mesh, devices=devices)
    run, trace = program.trace_step(config, mesh, request.chosen)
    executed = traced.executed_flops(trace, len(devices))
    lowered = trace.lower(lowering_platforms=("tpu",))
    options = json.dumps(kernels.compiler_options(config.compute, mesh))
    digest = _sha256(lowered.as_text(), options, request.topology, str(request.slices), repr(mesh.shape), *versions(),
                     *_options())  # fmt: skip
    lower_seconds = time.monotonic() - start

    def with_largest(compiled: Compiled) -> Compiled:
        over = sum(compiled.hbm.values()) > chip_of(devices[0]).hbm_bytes and compiled.out_of_memory is None
        found = tuple(traced.largest_arrays(trace, len(devices))) if over else ()
        return dataclasses.replace(compiled, largest=found)

    if kept := _kept(request.cache, digest):
        return with_largest(dataclasses.replace(kept, executed=executed))

    start, text, analysis, full = time.monotonic(), None, None, None
    try:
        compiled = lowered.compile()
        text, analysis = compiled.as_text(), compiled.memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        full = memory.read_out_of_memory(str(error), sum(memory.argument_bytes(run.arguments).values()))
        if full is None:
            raise ValueError(f"the compiler refuses the step: {str(error)[:2000]}") from None
        if not full.largest:
            full = dataclasses.replace(full, largest=tuple(traced.largest_arrays(trace, len(devices))))
    hbm = memory.hbm_by_kind(run.arguments, analysis) if analysis else memory.argument_bytes(run.arguments)
    seconds, rss = time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = Compiled(digest, lower_seconds, seconds, rss, hbm, executed, full, None)
    return with_largest(_keep(request.cache, result, text))


def default_cache() -> Path:
    """Where compiled steps are kept unless told otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eupe_jax" / "plans"


def _keep(cache: Path, result: Compiled, text: str | None) -> Compiled:
    cache.mkdir(parents=True, exist_ok=True)
    if text is not None:
        path = cache / f"{result.digest}.hlo.gz"
        write_atomically(path, gzip.compress(text.encode(), 6))
        result = dataclasses.replace(result, text=str(path))
    write_atomically(_entry(cache, result.digest), json.dumps(dataclasses.asdict(result), indent=1).encode())
    return result


def _kept(cache: Path, digest: str) -> Compiled | None:
    """What the cache holds; None also for what another version of this project wrote otherwise."""
    try:
        fields = json.loads(_entry(cache, digest).read_text())
        if fields["out_of_memory"] is not None:
            largest = tuple(tuple(allocation) for allocation in fields["out_of_memory"].pop("largest"))
            fields["out_of_memory"] = memory.OutOfMemory(**fields["out_of_memory"], largest=largest)
        kept = Compiled(**fields)
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    return kept if kept.text is None or os.path.exists(kept.text) else None


def _entry(cache: Path, digest: str) -> Path:
    return cache / f"{digest}.json"


def write_atomically(path: Path, content: bytes) -> None:
    """Writes under a temporary name and renames: readers see nothing or all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def kept_json(path: Path, make: Callable[[], dict]) -> dict:
    """What the file holds; where there is none, or no JSON, what `make()` returns, kept there."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        made = make()
        write_atomically(path, json.dumps(made, indent=1).encode())
        return made


def code_digest() -> str:
    """Digest of this project's code and tables: what a config becomes, and what that costs, depends on them."""
    root = Path(__file__).parents[1]
    files = sorted([*root.rglob("*.py"), *root.rglob("*.json")])
    return _sha256(*(str(p.relative_to(root)) + p.read_text() for p in files))


def _options() -> list[str]:
    """What the environment tells compilers, where it tells them anything."""
    return [f"{name}={value}" for name in OPTIONS if (value := os.environ.get(name))]


def _sha256(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:32]
