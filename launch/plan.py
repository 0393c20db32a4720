"""Compiles a recipe's real train step for TPUs that are not there, and predicts what the run would need and take:

    python launch/plan.py --config=configs/stage2_vitb.py --topology=v5e:16x16 --out=docs/plans/stage2_vitb_v5e.md

Prints memory by kind, FLOPs, collectives, step time by two estimates, MFU, days and chip-hours: all predicted. Needs
libtpu (the extra "tpu") and no TPU. --sweep compares remat policies, micro-batches and meshes. A compiled step is kept
(--cache) and compiled again only when it changes. Exit status 1: it does not fit, or a figure cannot be trusted.
"""

import os

# Before JAX is imported: this process compiles for TPUs and computes on none.
os.environ["JAX_PLATFORMS"] = "cpu"

import json  # noqa: E402
import shutil  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from absl import flags  # noqa: E402

from eupe_jax.planning import pairs, report, sweep  # noqa: E402
from eupe_jax.planning.compiling import default_cache, write_atomically  # noqa: E402
from eupe_jax.planning.plan import check, make_plan  # noqa: E402
from launch import cli  # noqa: E402

CONFIG = cli.define_config()
TOPOLOGY = flags.DEFINE_string("topology", None, "GENERATION:SIDES of one slice, such as v5e:16x16 or v5p:4x4x8")
SLICES = flags.DEFINE_integer("slices", 1, "slices, joined by the data-centre network")
PAIRS = flags.DEFINE_list("pairs", [], "STUDENT:TEACHER resolutions to compile, or 'all'; default: at most three")
JSON = flags.DEFINE_string("json", None, "file for the plan as JSON")
OUT = flags.DEFINE_string("out", None, "file for the report (Markdown)")
HLO = flags.DEFINE_string("hlo", None, "folder for the optimized HLO of every pair (gzip)")
CACHE = flags.DEFINE_string("cache", None, "folder of what was compiled; default: eupe_jax/plans in the user's cache")
SWEEP = flags.DEFINE_bool("sweep", False, "compare variants, one change at a time (see --remat and so on)")
PRODUCT = flags.DEFINE_bool("product", False, "with --sweep: all combinations")
AXES = {
    "remat": flags.DEFINE_list("remat", list(sweep.AXES["remat"]), "with --sweep: policies of all students"),
    "accumulate": flags.DEFINE_list("accumulate", list(sweep.AXES["accumulate"]), "with --sweep: micro-batches a step"),
    "fsdp": flags.DEFINE_list("fsdp", list(sweep.AXES["fsdp"]), "with --sweep: devices that parameters are cut over"),
    "tensor": flags.DEFINE_list("tensor", [1], "with --sweep: devices that share each image"),
}


def main() -> None:
    try:
        _main()
    except KeyboardInterrupt:
        print("interrupted: what was compiled is kept, the same command goes on from there", file=sys.stderr)
        sys.exit(130)


def _main() -> None:
    config = cli.require(CONFIG, "config")
    topology = cli.require(TOPOLOGY, "topology")
    name = flags.FLAGS["config"].config_filename
    chosen = pairs.choose(config, PAIRS.value)
    cache = Path(CACHE.value) if CACHE.value else default_cache()
    check(config, topology, SLICES.value)
    if SWEEP.value:
        _sweep(config, name, topology, chosen, cache)
        return
    plan = make_plan(config, name, topology, SLICES.value, chosen, cache)
    plan["overrides"] = [a for a in sys.argv[1:] if a.startswith("--config.")]
    text = report.markdown(plan)
    print(text)
    if JSON.value:
        write_atomically(Path(JSON.value), json.dumps(plan, indent=1).encode())
    if OUT.value:
        write_atomically(Path(OUT.value), text.encode())
    if HLO.value:
        _copy_hlo(plan, cache, Path(HLO.value))
    if plan["problems"] or not plan["fits"]:
        sys.exit(1)


def _copy_hlo(plan: dict, cache: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for pair in plan["pairs"]:
        source = cache / f"{pair['digest']}.hlo.gz"
        if source.exists():
            shutil.copyfile(source, folder / f"{pair['pair'].replace(':', '_')}.hlo.gz")


def _sweep(config, name: str, topology: str, chosen: list, cache: Path) -> None:
    axes = {a: [int(v) if a != "remat" else v for v in flag.value] for a, flag in AXES.items()}
    cells = list(sweep.variants(config, axes, product=PRODUCT.value))
    folder = Path(JSON.value).with_suffix("") if JSON.value else None
    rows = sweep.run(config, name, topology, SLICES.value, chosen, cache, cells, folder)
    text = f"# {name} on {topology}: variants by predicted step time\n\n{sweep.markdown(rows)}\n"
    print(text)
    if JSON.value:
        write_atomically(Path(JSON.value), json.dumps(rows, indent=1).encode())
    if OUT.value:
        write_atomically(Path(OUT.value), text.encode())


if __name__ == "__main__":
    cli.run(main)
