"""What six students from one forward pass of the proxy cost, against six runs of one student each.

  python benchmarks/family.py [--batch 8] [--rounds 5] [--json FILE]

Two ratios, family over the sum of six: of FLOPs for the published sizes (2 for every multiply-add; teacher forward,
students and adapters forward and backward), and of time for a real step of all models at an eighth of their widths and
half their pixels on this machine, in float32, beside the FLOPs of that size. The seven programs take turns, and the
figures are medians over rounds: seconds, and processor seconds, which a busy machine disturbs less. Elementwise work
and small products weigh more at the reduced size, and only the teacher is shared: the measured ratio is the larger one.
JSON: flops_ratio, flops_ratio_reduced, seconds_ratio, cpu_seconds_ratio, and "seconds" of every program.
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

NARROW = 8  # widths are published ones over this
SIDE = 128
FAMILY = "family"


def reduced(batch: int, side: int = SIDE, *, shallow: bool = False) -> ConfigDict:
    """configs/stage2_family.py with narrow models and small pictures, on one device; depths are as published, or as
    small as they can be where `shallow` (a toy, to try the code)."""
    from configs import common, stage2_family
    from eupe_jax.models import zoo

    config = stage2_family.get_config()
    with config.unlocked():
        for entry in (*config.students.values(), *config.teachers.values()):
            spec = zoo.spec(entry.model)
            if spec.family == "vit":
                entry.overrides = ConfigDict({"embed_dim": spec.kwargs["embed_dim"] // NARROW})
            else:
                dims = tuple(dim // NARROW for dim in spec.kwargs["dims"])
                entry.overrides = ConfigDict({"dims": dims, "depthwise": "matmul"})
            if shallow:
                entry.overrides.update({"depth": 1} if spec.family == "vit" else {"depths": (1, 1, 1, 1)})
            entry.dtype = "float32"
        config.teachers.proxy.resolutions, config.teachers.proxy.checkpoint = (side,), "random"
        config.student_resolutions, config.data.image_size, config.batch_size = (side,), side, batch
        config.data.sources = ConfigDict({"synthetic": common.source("synthetic", "", size=side)})
        config.adapter.hidden_dim //= NARROW
        config.mesh.fsdp, config.data.threads = 1, 1
    return config.lock()


def alone(config: ConfigDict, student: str) -> ConfigDict:
    """The same run with one of its students."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for other in set(config.students) - {student}:
            del config.students[other]
    return config.lock()


def runs(config: ConfigDict) -> dict[str, ConfigDict]:
    """The family, and each of its members alone."""
    return {FAMILY: config} | {name: alone(config, name) for name in config.students}


def ratio(costs: Mapping[str, float]) -> float:
    """Cost of the family over the sum of all others."""
    return costs[FAMILY] / sum(cost for name, cost in costs.items() if name != FAMILY)


def flops(config: ConfigDict) -> dict[str, int]:
    """FLOPs for one image of every run."""
    from eupe_jax.training import pipeline
    from eupe_jax.training.model_flops import step_flops

    return {name: step_flops(run, pipeline.every_pair(run)[0]).per_image for name, run in runs(config).items()}


class Program:
    """One run's step, compiled, with a state of its own."""

    def __init__(self, config: ConfigDict) -> None:
        import jax
        import jax.numpy as jnp

        from eupe_jax.sharding.mesh import make_mesh
        from eupe_jax.training import assemble, pipeline, program

        mesh = make_mesh(**config.mesh, devices=jax.devices()[:1])
        described = program.abstract_run(config, mesh)
        loaded = assemble.load_teachers(config, mesh)
        state = assemble.init_state(config, described.students, mesh)
        batches = pipeline.batches(config, {}, mesh, start_step=0)
        statistics_of = jax.tree.map(lambda x: jnp.zeros(x.shape), described.arguments[3])
        for each in statistics_of.values():
            each["std"] = jax.tree.map(jnp.ones_like, each["std"])
        self._state, self._rest = state, (next(batches), loaded.variables, statistics_of)
        batches.close()
        steps = program.make_steps(config, described.students, described.teachers, mesh, described.state_shardings)
        (self._step,) = program.compile_steps(steps, (state, *self._rest), progress=False).values()

    def step(self) -> None:
        import jax

        self._state, metrics = self._step(self._state, *self._rest)
        jax.block_until_ready((self._state, metrics))


def measure(config: ConfigDict, rounds: int) -> dict[str, dict[str, float]]:
    """{"seconds": {run: median}, "cpu_seconds": {run: median}} of one step."""
    from tqdm import tqdm

    programs = {name: Program(run) for name, run in tqdm(runs(config).items(), desc="compiling")}
    taken: dict[str, dict[str, list[float]]] = {kind: {n: [] for n in programs} for kind in ("seconds", "cpu_seconds")}
    for program in programs.values():
        program.step()  # warm
    for _ in tqdm(range(rounds), desc="timing"):
        for name, program in programs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            program.step()
            taken["seconds"][name].append(time.perf_counter() - wall)
            taken["cpu_seconds"][name].append(time.process_time() - cpu)
    return {kind: {n: statistics.median(values) for n, values in runs_.items()} for kind, runs_ in taken.items()}


def compare(config: ConfigDict, rounds: int) -> dict[str, Any]:
    """What `--json` writes: both ratios, and what they come from."""
    from configs import stage2_family

    published, small, times = flops(stage2_family.get_config()), flops(config), measure(config, rounds)
    return {
        "flops_ratio": round(ratio(published), 4),
        "flops_ratio_reduced": round(ratio(small), 4),
        **{f"{kind}_ratio": round(ratio(found), 4) for kind, found in times.items()},
        "gflops_an_image": {name: round(value / 1e9, 2) for name, value in published.items()},
        **{kind: {name: round(value, 4) for name, value in found.items()} for kind, found in times.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.batch < 1 or args.rounds < 1:
        parser.error("--batch and --rounds must be at least 1")
    found = compare(reduced(args.batch), args.rounds)
    print(f"{'':16}{'GFLOP an image':>16}{'s a step, reduced':>20}{'processor s':>14}")
    for name, seconds in found["seconds"].items():
        print(f"{name:16}{found['gflops_an_image'][name]:16.1f}{seconds:20.3f}{found['cpu_seconds'][name]:14.3f}")
    print(
        f"family over six runs: {found['flops_ratio']:.3f} of the FLOPs at the published sizes (predicted cost); "
        f"reduced: {found['seconds_ratio']:.3f} of the time, {found['cpu_seconds_ratio']:.3f} of the processor time, "
        f"{found['flops_ratio_reduced']:.3f} of the FLOPs"
    )
    if args.json:
        partial = args.json.with_name(f".{args.json.name}.partial")
        partial.write_text(json.dumps(found, indent=2))
        partial.replace(args.json)


if __name__ == "__main__":
    main()
