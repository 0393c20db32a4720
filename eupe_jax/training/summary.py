"""What a run says of itself before its first step: devices, batch, parameters, memory."""

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from eupe_jax.sharding.chips import chip_of
from eupe_jax.sharding.mesh import data_shards

GIB = 2**30


def size_of(tree: Any) -> tuple[int, int]:
    """(numbers in a tree of arrays or shapes with shardings, bytes of it on one device)."""
    numbers = held = 0
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        numbers += leaf.size
        held += math.prod(sharding.shard_shape(leaf.shape) if sharding else leaf.shape) * leaf.dtype.itemsize
    return numbers, held


def describe_run(config: ConfigDict, mesh: Mesh, state: Mapping, teachers: Mapping[str, Any]) -> list[str]:
    """Lines: devices and mesh, batch, and the parameters and bytes of every student and in-graph teacher.

    teachers: {name: variables}.
    """
    devices, shards = mesh.devices.flatten(), data_shards(mesh)
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    rows = config.batch_size // shards
    lines = [
        f"{devices.size} devices ({devices[0].device_kind}) of {jax.process_count()} process(es); mesh {axes}",
        f"batch {config.batch_size}: {rows} images in each of {shards} parts"
        + (f", in {config.accumulate} micro-batches" if config.accumulate > 1 else ""),
    ]
    for name, student in state["students"].items():
        backbone, adapters = (size_of(student["params"][part])[0] for part in ("backbone", "adapters"))
        held, optimizer = size_of(student["params"])[1], size_of(student["optimizer"])[1]
        lines.append(
            f"student {name}: {_millions(backbone)} parameters, adapters {_millions(adapters)}; on a device "
            f"{_gib(held)}, optimizer {_gib(optimizer)}"
        )
    for name, variables in teachers.items():
        numbers, held = size_of(variables)
        lines.append(f"teacher {name}: {_millions(numbers)} parameters, frozen; on a device {_gib(held)}")
    return lines


def describe_memory(compiled: Any, device: jax.Device) -> str:
    """Memory that one compiled step takes on a device, as its compiler counts it, beside what there is."""
    memory = compiled.memory_analysis()
    if memory is None:
        return "memory unknown: this platform's compiler does not tell"
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes  # the new state lies where the old one did
    code = memory.generated_code_size_in_bytes
    total = arguments + temporary + results + code
    chip = chip_of(device)
    room = f" of {_gib(chip.hbm_bytes)} ({total / chip.hbm_bytes:.0%})" if chip else ""
    return (
        f"{_gib(total)}{room} a device: state, teachers and batch {_gib(arguments)}, activations {_gib(temporary)}, "
        f"results {_gib(results)}, code {_gib(code)}"
    )


def _gib(number: float) -> str:
    return f"{number / GIB:.2f} GiB" if number >= GIB / 10 else f"{number / 2**20:.1f} MiB"


def _millions(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 1e6 else f"{number / 1e3:,.1f} k"
