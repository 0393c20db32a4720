"""How long a checkpoint stops training: the loop waits in `Checkpoints.save` until the state is off the devices.

  python benchmarks/save_blocking.py [--config configs/stage2_vitb.py] [--saves 3] [--step-seconds 0.1098] [--json FILE]

The state is that of the recipe, whole: backbone, adapters and AdamW's two moments, with zeros for weights. In place of
the training step stands an update of all of it, jitted, with its buffers donated, as the step's are: what is saved must
have left them before the next one. Told are
  blocked   seconds in `save`, of the loop; and by how much GB, to scale it to other states
  fraction  blocked / interval, where the interval is the recipe's `save_every` steps of --step-seconds. The default is
            the shortest step that docs/plans predicts for stage 2 of ViT-B (v6e:16x16): the hardest case. Bar: 5%
  written   seconds until a save is on the disk, in the background; were they more than the interval, saves would wait
            for each other
  steps     median seconds of steps during a save, and of the others. Here threads that write share the processor with
            the step; on an accelerator they do not.
A host of a pod copies its own shards alone: GB is an upper bound for each.
"""

import argparse
import importlib
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

BAR = 0.05


def make_state(config: Any) -> tuple[dict, dict]:
    """Zeros of the shapes and types of the recipe's training state and statistics."""
    import jax
    import jax.numpy as jnp

    from eupe_jax.sharding.mesh import make_mesh
    from eupe_jax.training import program

    with config.unlocked():
        config.mesh.fsdp = 1
    mesh = make_mesh(**config.mesh, devices=jax.devices()[:1])
    described, _, _, statistics_of = program.abstract_run(config, mesh).arguments
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), (described, statistics_of))


def measure(config: Any, folder: str, saves: int, steps: int) -> dict:
    """Seconds of every save, of its writing, and of the steps during saves and outside them."""
    import jax

    from eupe_jax.training.checkpoints import Checkpoints

    state, statistics_of = make_state(config)
    size = sum(x.nbytes for x in jax.tree.leaves(state["students"])) / 1e9
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x + x, tree), donate_argnums=0)
    with config.unlocked():
        config.checkpoint.keep = 1
    saver = Checkpoints(folder, config.checkpoint)
    found = {"gigabytes": size, "blocked": [], "written": [], "steps_during": [], "steps_outside": []}

    def step() -> float:
        nonlocal state
        began = time.perf_counter()
        state = jax.block_until_ready(update(state))
        return time.perf_counter() - began

    step()
    number = 0
    for _ in range(saves):
        found["steps_outside"] += [step() for _ in range(steps)]
        number += 1
        began = time.perf_counter()
        saver.save(number, state, statistics_of, {}, {"students": {}}, force=True)
        found["blocked"].append(time.perf_counter() - began)
        while saver.saving:
            found["steps_during"].append(step())
        saver.wait()
        found["written"].append(time.perf_counter() - began)
    saver.close()
    return found


def summary(found: dict, interval: float) -> dict:
    blocked = statistics.median(found["blocked"])
    during, outside = (statistics.median(found[name] or [float("nan")]) for name in ("steps_during", "steps_outside"))
    return {
        "gigabytes": found["gigabytes"],
        "blocked_s": blocked,
        "blocked_worst_s": max(found["blocked"]),
        "blocked_s_per_gb": blocked / found["gigabytes"],
        "interval_s": interval,
        "fraction": blocked / interval,
        "fraction_worst": max(found["blocked"]) / interval,
        "bar": BAR,
        "written_s": statistics.median(found["written"]),
        "step_during_save_s": during,
        "step_outside_s": outside,
        "step_ratio": during / outside,
        "saves": len(found["blocked"]),
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "load_average": os.getloadavg()[0],
    }


def table(result: dict) -> str:
    rows = [
        ("state", f"{result['gigabytes']:.2f} GB"),
        ("blocked, median of saves (worst)", f"{result['blocked_s']:.2f} s ({result['blocked_worst_s']:.2f} s)"),
        ("blocked by GB", f"{result['blocked_s_per_gb']:.2f} s"),
        ("interval between saves", f"{result['interval_s']:.0f} s"),
        ("blocked of it, median (worst)", f"{result['fraction']:.2%} ({result['fraction_worst']:.2%}), bar {BAR:.0%}"),
        ("written after", f"{result['written_s']:.1f} s"),
        ("step during a save", f"{result['step_during_save_s']:.2f} s, {result['step_ratio']:.2f}x the others'"),
        ("machine", f"{result['cores']} cores, load {result['load_average']:.0f}"),
    ]
    return "\n".join(f"{name:34s} {value}" for name, value in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/stage2_vitb.py", help="a file of configs/: FILE or FILE:MODE")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="steps before each save")
    parser.add_argument("--step-seconds", type=float, default=0.1098, help="of the training step that is to be saved")
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    name, _, mode = args.config.partition(":")
    recipe = importlib.import_module(".".join(Path(name).with_suffix("").parts))
    config = recipe.get_config(*[mode] if mode else [])
    interval = config.checkpoint.save_every * args.step_seconds
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result = summary(measure(config, folder, args.saves, args.steps), interval)
    result |= {"config": args.config, "step_seconds": args.step_seconds, "save_every": config.checkpoint.save_every}
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
