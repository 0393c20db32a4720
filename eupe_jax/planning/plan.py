"""What a recipe would cost on TPUs that are not there: its real steps compiled, fitted into HBM, and timed by estimate.

Everything here is predicted; nothing was measured on a TPU.
"""

import collections
import dataclasses
import datetime
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from eupe_jax.distill.resolutions import Resolutions
from eupe_jax.models import zoo
from eupe_jax.planning import background, compiling, costs, kernel_cycles, memory, pairs, traced
from eupe_jax.planning.collectives import Collective, whole_weight_all_reduces
from eupe_jax.planning.compiling import Compiled, Request
from eupe_jax.planning.xla_count import block_ratio
from eupe_jax.sharding.chips import Chip, chip_of, on_slice, topology
from eupe_jax.sharding.mesh import data_shards, make_mesh
from eupe_jax.training import kernels, pipeline, program
from eupe_jax.training.mesh_check import check_mesh
from eupe_jax.training.model_flops import StepFlops, step_flops

FREE_WANTED = 0.10  # of the HBM
FLOPS_TOLERANCE = 0.01  # between the compiled program and the trace: compilers drop and merge small products
FORWARD_TOLERANCE = 0.001  # between the trace and the count from the architecture
BACKWARD_TOLERANCE = 0.02  # the same; the first layer needs no gradient of the images, biases' are not in the count
XLA_RANGE = (0.999, 1.05)  # XLA's count of a block over ours: it counts norms and activations too
WIDE = 128  # in narrower models (smoke tests) these weigh more
OPERATIONS_KEPT = 24

ASSUMPTIONS = (
    "Predicted, not measured: no TPU was used. MFU = model FLOPs / (devices x peak bfloat16 FLOP/s x step time); model"
    " FLOPs are the teachers' forward passes and three times the forward passes of students and adapters. Recomputation"
    " counts as time, not as work.",
    "The step time is the longer of two estimates (roofline and the compiler's cycles), with every exposed collective.",
    "HBM is the sum of everything that is ever alive, fragmentation included, against what programs can use of it.",
    "Days and chip-hours are steps x step time: no start, evaluation, checkpoint or restart, and input never late.",
)


# ---- one pair of resolutions, in a process of its own


def plan_pair(request: Request) -> dict[str, Any]:
    """The costs of one compiled step, as plain numbers; see docs/plans for what they say.

    Raises:
      ValueError: the step cannot be compiled, for another reason than HBM.
    """
    compiled = compiling.compile_step(request)
    devices = topology(request.topology, request.slices)
    chip, work = chip_of(devices[0]), step_flops(request.config, request.chosen)
    result = {
        "pair": pairs.label(request.chosen),
        "digest": compiled.digest,
        "lower_seconds": compiled.lower_seconds,
        "compile_seconds": compiled.compile_seconds,
        "compile_rss_bytes": compiled.peak_rss,
        "model_flops": work.per_image * request.config.batch_size,
        "model_flops_per_image": dataclasses.asdict(work) | {"per_image": work.per_image},
        "executed_flops_per_device": compiled.executed,
        "xla_block_ratio": xla_ratios(request),
        "problems": _miscounts(request, compiled, work, len(devices)),
        **_memory(compiled, chip),
    }
    result["problems"] += _xla_problems(request.config, result["xla_block_ratio"])
    if result["fits"]:
        timed = _costs(request, compiled, chip, devices)
        result |= timed | {"problems": result["problems"] + timed["problems"]}
    return result


def xla_ratios(request: Request) -> dict[str, float]:
    """{"students.NAME" or "teachers.NAME": XLA's FLOPs of one block over ours} of every model that runs in the step."""
    config, sides = request.config, dict(request.chosen.teachers)
    found = {f"students.{k}": block_ratio(entry, request.chosen.student) for k, entry in config.students.items()}
    for name, entry in config.teachers.items():
        if entry.kind == "encoder":
            found[f"teachers.{name}"] = block_ratio(entry, sides[name])
    return found


def _xla_problems(config: ConfigDict, ratios: dict[str, float]) -> list[str]:
    problems = []
    for name, ratio in ratios.items():
        group, _, key = name.partition(".")
        if ratio < XLA_RANGE[0] or (ratio > XLA_RANGE[1] and not _narrow(config[group][key])):
            problems.append(f"XLA counts {ratio:.3f} x our FLOPs of a block of {name}")
    return problems


def _narrow(entry: ConfigDict) -> bool:
    return zoo.spec(entry.model, **entry.overrides).patch_dim < WIDE


def _miscounts(request: Request, compiled: Compiled, work: StepFlops, devices: int) -> list[str]:
    """Passes that the trace counts otherwise than the architecture says.

    A gradient that nobody computes is missing in trace and program alike: only this count sees it.
    """
    images = request.config.batch_size / devices
    wanted = {
        traced.TEACHERS: (sum(work.teachers.values()), FORWARD_TOLERANCE),
        traced.STUDENTS: (sum(work.students.values()), FORWARD_TOLERANCE),
        traced.ADAPTERS: (sum(work.adapters.values()), FORWARD_TOLERANCE),
    }
    if not any(_narrow(entry) for entry in request.config.students.values()):
        wanted[traced.BACKWARD] = (2 * work.trained, BACKWARD_TOLERANCE)
    return [
        f"{term}: {compiled.executed.get(term, 0):.6g} FLOPs a device in the trace, {flops * images:.6g} by the"
        " architecture"
        for term, (flops, tolerance) in wanted.items()
        if abs(compiled.executed.get(term, 0) - flops * images) > tolerance * flops * images
    ]


def _memory(compiled: Compiled, chip: Chip) -> dict[str, Any]:
    full = compiled.out_of_memory
    needed = full.needed if full else sum(compiled.hbm.values())
    return {
        "fits": full is None and needed <= chip.hbm_bytes,
        "hbm_bytes": compiled.hbm,
        "hbm_needed": needed,
        "hbm_capacity": chip.hbm_bytes,
        "hbm_free_fraction": 1 - needed / chip.hbm_bytes,
        "largest_tensors": [list(item) for item in (full or compiled).largest],
    }


def _costs(request: Request, compiled: Compiled, chip: Chip, devices: list) -> dict[str, Any]:
    text = compiled.read_text()
    mesh = make_mesh(**request.config.mesh, devices=devices)
    within = {axis: size // request.slices if axis == "data" else size for axis, size in mesh.shape.items()}
    cycles = kernel_cycles.cycles_of(text, chip, request.topology)
    found = costs.estimate(text, on_slice(chip, request.topology), kernels=cycles, mesh=within)
    executed = sum(compiled.executed.values())
    work = step_flops(request.config, request.chosen).per_image * request.config.batch_size
    arguments = program.abstract_run(request.config, mesh).arguments
    cut, held = _cut_shapes(arguments), _cut_shapes(arguments, cut=False)
    return {
        "program_flops_per_device": found.flops,
        "flops_difference": found.flops / executed - 1,
        "hbm_traffic_bytes": found.hbm_bytes,
        "roofline_seconds": found.roofline_step_seconds,
        "compiler_seconds": found.compiler_step_seconds,
        "exposed_seconds": found.exposed_seconds,
        "copy_seconds": found.copy_seconds,
        "uncounted_seconds": found.uncounted_seconds,
        "step_seconds": found.step_seconds,
        "predicted_mfu": work / (len(devices) * chip.peak_flops * found.step_seconds),
        "roofline_mfu": work / (len(devices) * chip.peak_flops * found.roofline_step_seconds),
        "collectives": _collectives(found.collectives),
        "operations": _operations(found.operations),
        "kinds": _kinds(found.operations),
        "problems": _program_problems(pairs.label(request.chosen), found, executed, cut, held),
    }


def _program_problems(
    label: str,
    found: costs.Estimate,
    executed: float,
    cut: Sequence[tuple[int, ...]],
    held: Sequence[tuple[int, ...]] = (),
) -> list[str]:
    """Where the compiled program does not do the work of the trace, or sums whole gradients of weights that are cut."""
    problems, difference = [], found.flops / executed - 1
    if abs(difference) > FLOPS_TOLERANCE:
        problems.append(
            f"the program of {label} has {found.flops:.4g} FLOPs a device, the trace {executed:.4g}"
            f" ({difference:+.1%}): its time cannot be trusted"
        )
    for collective in whole_weight_all_reduces(found.collectives, cut, held=held):
        problems.append(f"an all-reduce of a whole weight: {_describe(collective)}")
    return problems


def _cut_shapes(arguments: tuple, cut: bool = True) -> list[tuple[int, ...]]:
    """Shapes of the parameters that lie in parts on the devices; not `cut`: of those that every device holds whole."""
    weights = (arguments[0]["students"], arguments[2])
    return sorted({x.shape for x in jax.tree.leaves(weights) if x.sharding.is_fully_replicated is not cut})


def _collectives(found: Sequence[Collective]) -> list[dict[str, Any]]:
    """Alike ones together, by their time in the step."""
    groups: dict[tuple, dict] = {}
    for c in found:
        axes = "+".join(c.axes)
        key = (c.kind, c.network, axes, c.group_size, c.bytes, c.overlapped, c.exposed_seconds > 0, c.op_name)
        entry = groups.setdefault(
            key,
            {"kind": c.kind, "network": c.network, "axes": axes, "group_size": c.group_size, "bytes_each": c.bytes,
             "runs": 0, "bytes": 0.0, "seconds": 0.0, "exposed_seconds": 0.0, "overlapped": c.overlapped,
             "name": c.name, "of": c.op_name},
        )  # fmt: skip
        entry["runs"] += c.trips
        entry["bytes"] += c.bytes * c.trips
        entry["seconds"] += c.seconds
        entry["exposed_seconds"] += c.exposed_seconds
    return sorted(groups.values(), key=lambda e: (-e["exposed_seconds"], -e["seconds"]))


def _describe(c: Collective) -> str:
    shapes = ", ".join("x".join(map(str, dims)) for dims in c.shapes)
    return f"{c.kind} {c.name} of {shapes} over {c.group_size} devices, {c.trips} times a step ({c.op_name})"


def _operations(found: Sequence[costs.Operation]) -> list[dict[str, Any]]:
    """Those that hold the time: alike ones (by where the code made them) together."""
    groups: dict[tuple, dict] = {}
    for o in found:
        key = (o.kind, o.op_name or o.name, o.path)
        entry = groups.setdefault(
            key,
            {"kind": o.kind, "name": o.name, "of": o.op_name, "loop": o.path, "runs": 0, "seconds": 0.0,
             "roofline_seconds": 0.0, "flops": 0},
        )  # fmt: skip
        entry["runs"] += o.trips
        entry["seconds"] += o.compiler_seconds * o.trips
        entry["roofline_seconds"] += o.roofline_seconds * o.trips
        entry["flops"] += o.flops * o.trips
    return sorted(groups.values(), key=lambda e: -e["seconds"])[:OPERATIONS_KEPT]


def _kinds(found: Sequence[costs.Operation]) -> dict[str, dict[str, float]]:
    sums: dict[str, dict[str, float]] = collections.defaultdict(lambda: {"seconds": 0.0, "roofline_seconds": 0.0})
    for o in found:
        sums[o.kind]["seconds"] += o.compiler_seconds * o.trips
        sums[o.kind]["roofline_seconds"] += o.roofline_seconds * o.trips
    return dict(sums)


# ---- the whole recipe


def check(config: ConfigDict, topology_name: str, slices: int) -> None:
    """What can be seen to be wrong before anything is compiled.

    Raises:
      ValueError: names the field and the fix. ImportError: libtpu is missing.
    """
    if not config.students:
        raise ValueError("config.students is empty: a plan needs at least one student")
    pipeline.check_config(config)
    devices = topology(topology_name, slices)
    mesh = make_mesh(**config.mesh, devices=devices)
    hosts = len({device.process_index for device in devices})
    check_mesh(config, mesh, hosts)


def describe(config: ConfigDict, name: str, topology_name: str, slices: int) -> dict[str, Any]:
    """The run without its costs: chips, mesh, batch, parameters."""
    devices = topology(topology_name, slices)
    chip = chip_of(devices[0])
    mesh = make_mesh(**config.mesh, devices=devices)
    state, _, teachers, _ = program.abstract_run(config, mesh).arguments

    def count(tree: Any) -> int:
        return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))

    return {
        "config": name,
        "topology": topology_name,
        "slices": slices,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": list(compiling.versions()),
        "code": compiling.code_digest()[:12],
        "chip": dataclasses.asdict(chip),
        "devices": len(devices),
        "chips": len(devices) // chip.devices,
        "hosts": len({device.process_index for device in devices}),
        "mesh": dict(mesh.shape),
        "batch_size": config.batch_size,
        "accumulate": config.accumulate,
        "batch_per_device": config.batch_size / data_shards(mesh) / config.accumulate,
        "total_steps": config.total_steps,
        "remat": {student: entry.remat for student, entry in config.students.items()},
        "kernels": _kernels(config, mesh),
        "compiler_options": kernels.compiler_options(config.compute, mesh) or {},
        "parameters": {
            "students": {
                k: {part: count(v["params"][part]) for part in v["params"]} for k, v in state["students"].items()
            },
            "teachers": {k: count(v) for k, v in teachers.items()},
        },
    }


def _kernels(config: ConfigDict, mesh: Mesh) -> dict[str, dict[str, str]]:
    """What `config.compute` comes to on these chips: {"students.NAME": {constructor field: what it is}}."""
    found = {}
    for group, frozen in (("students", False), ("teachers", True)):
        for name, entry in config[group].items():
            if entry.get("kind", "encoder") == "encoder":
                fields = kernels.model_fields(config.compute, mesh, entry.model, frozen=frozen)
                found[f"{group}.{name}"] = {k: _named(v) for k, v in fields.items()}
    return found


def _named(value: Any) -> str:
    """A function by its name, a module by its class, a setting by its value."""
    return str(value) if isinstance(value, (bool, str)) else getattr(value, "__name__", type(value).__name__)


def make_plan(
    config: ConfigDict,
    name: str,
    topology_name: str,
    slices: int,
    chosen: Sequence[Resolutions],
    cache: Path,
    run: Callable[..., dict] = background.run,
) -> dict[str, Any]:
    """Compiles the chosen pairs, one after another, and adds up the stage.

    run: `run(function, request, title=...)` carries out one pair; by default in a process of its own.

    Raises:
      ValueError, ImportError: as `check`, before anything is compiled.
    """
    check(config, topology_name, slices)
    plan = describe(config, name, topology_name, slices)
    plan["pairs"] = [
        cached_pair(
            Request(config, topology_name, slices, pair, cache), f"{name} {topology_name} {pairs.label(pair)}", run
        )
        for pair in chosen
    ]
    return plan | add_up(plan, config, chosen)


def cached_pair(request: Request, title: str, run: Callable[..., dict] = background.run) -> dict[str, Any]:
    """`plan_pair` in a process of its own, or the result that the cache holds of the same request and code."""
    return compiling.kept_json(
        request.cache / f"pair-{request.digest()}.json", lambda: run(plan_pair, request, title=title)
    )


def add_up(plan: dict[str, Any], config: ConfigDict, chosen: Sequence[Resolutions]) -> dict[str, Any]:
    """The stage from its compiled pairs; figures that need a time are None where a pair does not fit."""
    results = plan["pairs"]
    worst = min(results, key=lambda result: result["hbm_free_fraction"])
    stage: dict[str, Any] = {
        "fits": all(result["fits"] for result in results),
        "hbm_free_fraction": worst["hbm_free_fraction"],
        "problems": [problem for result in results for problem in result.get("problems", ())],
        "advice": None,
        "assumptions": [*ASSUMPTIONS, *costs.ASSUMPTIONS],
        **dict.fromkeys(("step_seconds", "predicted_mfu", "images_per_second", "days", "chip_hours"), None),
        "collectives": [{"pair": r["pair"], **c} for r in results for c in r.get("collectives", ())],
    }
    if worst["hbm_free_fraction"] < FREE_WANTED:
        room = plan["mesh"]["data"] // plan["slices"] * plan["mesh"]["fsdp"]
        stage["advice"] = memory.first_change(
            worst["hbm_bytes"], plan["remat"], plan["batch_per_device"], capacity=worst["hbm_capacity"],
            fsdp=plan["mesh"]["fsdp"], room=room,
        )  # fmt: skip
    everything = pairs.every_pair(config)
    work = {pair: step_flops(config, pair) for pair in everything}
    stage["model_flops"] = float(np.mean([work[p].per_image for p in everything])) * config.batch_size
    known = {p: r["step_seconds"] for p, r in zip(chosen, results, strict=True) if r["fits"]}
    if len(known) == len(results):
        stage |= _times(plan, config, pairs.fit_seconds(known, work), work, known)
    return stage


def _times(plan: dict, config: ConfigDict, seconds: dict, work: dict, known: dict) -> dict[str, Any]:
    """Every pair is drawn equally often: the stage's step is their mean."""
    peak = plan["devices"] * plan["chip"]["peak_flops"]
    step = float(np.mean(list(seconds.values())))
    flops = {pair: work[pair].per_image * config.batch_size for pair in seconds}
    return {
        "step_seconds": step,
        "predicted_mfu": float(np.mean(list(flops.values()))) / (peak * step),
        "images_per_second": config.batch_size / step,
        "images_per_second_per_host": config.batch_size / step / plan["hosts"],
        "days": step * config.total_steps / 86400,
        "chip_hours": step * config.total_steps / 3600 * plan["chips"],
        "every_pair": [
            {"pair": pairs.label(pair), "step_seconds": value, "model_flops": flops[pair],
             "predicted_mfu": flops[pair] / (peak * value), "compiled": pair in known}
            for pair, value in seconds.items()
        ],
    }  # fmt: skip
