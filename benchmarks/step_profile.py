"""Where the processor's time goes in the step of benchmarks/train_step.py, here and in PyTorch.

  python benchmarks/step_profile.py [--student eupe_vitt16] [--batch 8] [--steps 3] [--compile] [--top 0] [--json FILE]

One core, so that operations run one after another. Each side's own tracer says what share of a step every operation
takes; shares times the step's processor time (least of all steps) are the milliseconds that are printed, so that a
busy machine, which stretches everything, disturbs them little. --compile takes torch.compile instead of eager PyTorch.
"""

import argparse
import collections
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

PARTS = (
    "products of dense layers", "attention: products and softmax", "norms", "GELU", "slices and updates of stacks",
    "loss, optimizer and the rest",
)  # fmt: skip
DENSE, ATTENTION, NORMS, GELU, STACKS, REST = PARTS


def part_of_jax(op_name: str, opcodes: Iterable[str]) -> str:
    """The part that an instruction of the compiled step belongs to, by where the code made it and what it does."""
    product = "dot" in opcodes
    if "attn._by_heads" in op_name:
        return ATTENTION
    if product:
        return DENSE
    if re.search(r"dynamic_(update_)?(index|slice)", op_name):
        return STACKS
    if re.search(r"/norm\d?/|/norm$", op_name):
        return NORMS
    if re.search(r"/mlp/|/proxy_(cls|patches)/(erf|mul|exp|jit)", op_name):
        return GELU
    return REST


def part_of_torch(name: str) -> str:
    """The part that an operator, or a fused kernel of torch.compile, belongs to."""
    if "scaled_dot_product" in name:
        return ATTENTION
    if re.search(r"aten::(mm|addmm|bmm)$|mkl_linear|_linear_pointwise|convolution", name):
        return DENSE
    if "gelu" in name:
        return GELU
    if "layer_norm" in name:
        return NORMS
    return REST


def cpu_seconds(step: Callable[[], Any], steps: int) -> float:
    """The least processor time of a step."""
    found = []
    for _ in range(steps):
        start = time.process_time()
        step()
        found.append(time.process_time() - start)
    return min(found)


def by_share(spent: Mapping[str, float], seconds: float) -> dict[str, float]:
    """{operation: its share of `spent`, as milliseconds of a step of so many seconds}."""
    total = sum(spent.values())
    return {name: 1e3 * seconds * value / total for name, value in spent.items()}


def profile_jax(step: Any, steps: int) -> tuple[dict[str, float], dict[str, str]]:
    """({instruction: milliseconds a step}, {instruction: its part}) of a `train_step.JaxStep`."""
    import jax

    from eupe_jax.planning.hlo import parse

    step()  # warm
    seconds = cpu_seconds(step, steps)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level, options.host_tracer_level = 0, 3
    with tempfile.TemporaryDirectory(prefix="eupe_jax_profile_") as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(steps):
                step()
        (file,) = Path(folder).rglob("*.xplane.pb")
        events = [
            (dict(event.stats).get("hlo_op"), event.duration_ns)
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes
            for line in plane.lines
            for event in line.events
        ]
    computations = parse(step.compiled_text()).computations
    instructions = {name: i for c in computations.values() for name, i in c.instructions.items()}
    spent: dict[str, float] = collections.Counter()
    for name, duration in events:
        if name in instructions and instructions[name].opcode not in ("while", "call", "conditional"):
            spent[name] += duration
    parts = {}
    for name in spent:
        found = instructions[name]
        fused = computations[found.calls].instructions.values() if found.calls in computations else [found]
        parts[name] = part_of_jax(found.op_name, [i.opcode for i in fused])
    return by_share(spent, seconds), parts


def profile_torch(step: Any, steps: int) -> tuple[dict[str, float], dict[str, str]]:
    """({operator: milliseconds a step}, {operator: its part}) of a `train_step.TorchStep`."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):
        step()  # warm
    seconds = cpu_seconds(step, steps)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            step()
    spent = {event.key: event.self_cpu_time_total for event in found.key_averages()}
    return by_share(spent, seconds), {name: part_of_torch(name) for name in spent}


def sums(times: Mapping[str, float], parts: Mapping[str, str]) -> dict[str, float]:
    """Milliseconds of every part, and of all."""
    found = {part: sum(t for name, t in times.items() if parts[name] == part) for part in PARTS}
    return found | {"all": sum(times.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="eupe_vitt16", help="ViT student of the zoo")
    parser.add_argument("--batch", type=int, default=8, help="images a step")
    parser.add_argument("--steps", type=int, default=3, help="steps that are traced")
    parser.add_argument("--compile", action="store_true", help="torch.compile instead of eager PyTorch")
    parser.add_argument("--top", type=int, default=0, help="also print that many operations of each side")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    args = parser.parse_args()
    if min(args.batch, args.steps) < 1:
        parser.error("--batch and --steps must be at least 1")
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])  # before the runtimes start their threads
    from eupe_jax.training.host_memory import keep_freed_memory

    keep_freed_memory()
    import numpy as np
    import torch

    from benchmarks import train_step

    torch.set_num_threads(1)
    try:
        config = train_step.recipe(args.student, args.batch, 256, 3072)
    except ValueError as error:
        raise SystemExit(f"error: --student: {error}") from None
    images = np.random.default_rng(0).integers(0, 256, (args.batch, 256, 256, 3), np.uint8)
    jax_step = train_step.JaxStep(config, images)
    torch_step = train_step.TorchStep(config, jax_step, images, compile=args.compile)
    found = {"jax": profile_jax(jax_step, args.steps), "torch": profile_torch(torch_step, args.steps)}
    table = {side: sums(*profiled) for side, profiled in found.items()}
    print(f"ms a step of {args.batch} images, one core{'jax':>20}{'torch.compile' if args.compile else 'torch':>16}")
    for part in (*PARTS, "all"):
        print(f"{part:44}{table['jax'][part]:10.0f}{table['torch'][part]:16.0f}")
    for side, (times, parts) in found.items():
        for name in sorted(times, key=lambda name: -times[name])[: args.top]:
            print(f"{side:6}{times[name]:8.1f} ms  {parts[name]:34}{name}")
    if args.json:
        partial = args.json.with_name(f".{args.json.name}.partial")
        partial.write_text(json.dumps(table, indent=2) + "\n")
        partial.replace(args.json)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # beside this script lies executorch.py, a package's name
    main()
