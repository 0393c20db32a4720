"""Makes every report of docs/plans: the published recipes on three pods, compiled and predicted by launch/plan.py.

python benchmarks/plans.py [--only stage2_vitb] [--out docs/plans]

What was compiled before is taken from the cache, so that an interrupted run goes on where it stopped. A plan that fails
is named in the index and does not stop the others; those that are not made this time keep their line.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # compiles for TPUs, computes on none

import importlib  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from tqdm import tqdm  # noqa: E402

from convert.cli import described, one_line  # noqa: E402
from eupe_jax.planning import pairs, report  # noqa: E402
from eupe_jax.planning.compiling import default_cache, write_atomically  # noqa: E402
from eupe_jax.planning.plan import make_plan  # noqa: E402

RECIPES = ("stage1_proxy", "stage2_vitb", "stage2_family", "stage3_vitb")
TOPOLOGIES = ("v5e:16x16", "v5p:4x4x8", "v6e:16x16")
ERRORS = (ValueError, OSError, ImportError)  # a process that died is an OSError

INTRODUCTION = """# Plans

Every recipe's real train step at its published batch size, compiled ahead of time for three pods and costed from the
compiled program. **All figures are predicted**; each report ends in the assumptions behind them. Made by
`python benchmarks/plans.py` (one command, resumable); one plan: `python launch/plan.py --help`.
[choices.md](choices.md) has what tanh in place of erf, the attention kernel and asynchronous collectives bring on each
chip, and what tanh costs a frozen teacher.
"""
TRIED = "[tried.md](tried.md) has what else was tried.\n"  # written by hand


def make(recipe: str, topology: str, cache: Path) -> dict:
    """The plan of configs/RECIPE.py on one slice."""
    config = importlib.import_module(f"configs.{recipe}").get_config()
    return make_plan(config, f"configs/{recipe}.py", topology, 1, pairs.choose(config), cache)


def file_name(recipe: str, topology: str) -> str:
    return f"{recipe}_{topology.replace(':', '_')}.md"


def row(recipe: str, topology: str, plan: dict) -> tuple[str, ...]:
    """One line of the index."""
    timed = plan["step_seconds"] is not None
    compile_seconds = sum(pair["compile_seconds"] for pair in plan["pairs"])
    rss = max(pair["compile_rss_bytes"] for pair in plan["pairs"])
    problems = one_line("; ".join(plan["problems"]) or "none", 80)
    return (
        f"[{recipe}]({file_name(recipe, topology)})", topology, str(plan["batch_size"]),
        f"{plan['hbm_free_fraction']:.0%}" if plan["fits"] else "does not fit",
        report.milliseconds(plan["step_seconds"]) if timed else "",
        f"{plan['predicted_mfu']:.1%}" if timed else "",
        f"{plan['images_per_second']:,.0f}" if timed else "", f"{plan['days']:.1f}" if timed else "",
        f"{plan['chip_hours']:,.0f}" if timed else "",
        report.milliseconds(sum(p["exposed_seconds"] for p in plan["pairs"]) / len(plan["pairs"])) if timed else "",
        f"{compile_seconds:.0f} s, {rss / 2**30:.1f} GiB", plan["date"], problems,
    )  # fmt: skip


COLUMNS = ("recipe", "pod", "batch", "HBM free", "step", "predicted MFU", "images/s", "days", "chip-hours",
           "exposed, mean of compiled pairs", "compiling took", "made", "problems")  # fmt: skip


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("--only", help="recipes whose name contains this")
    parser.add_argument("--topology", choices=TOPOLOGIES, help="one pod")
    parser.add_argument("--out", type=Path, default=Path("docs/plans"), help="folder of the reports")
    parser.add_argument("--cache", type=Path, help="folder of what was compiled")
    args = parser.parse_args()
    every = [(recipe, topology) for recipe in RECIPES for topology in TOPOLOGIES]
    wanted = [(r, t) for r, t in every if (args.only or "") in r and args.topology in (None, t)]
    index, failed = args.out / "index.json", 0
    if not wanted:
        parser.error(f"--only={args.only}: no such recipe, of {', '.join(RECIPES)}")
    rows = json.loads(index.read_text()) if index.exists() else {}
    for recipe, topology in tqdm(wanted, unit="plan"):
        name = file_name(recipe, topology)
        try:
            plan = make(recipe, topology, args.cache or default_cache())
            write_atomically(args.out / name, report.markdown(plan).encode())
            rows[name] = row(recipe, topology, plan)
            failed += bool(plan["problems"]) or not plan["fits"]
        except ERRORS as error:
            rows[name] = (recipe, topology, *[""] * (len(COLUMNS) - 3), one_line(error))
            failed += 1
        write_atomically(index, json.dumps(rows, indent=1).encode())
        in_order = [rows[file_name(r, t)] for r, t in every if file_name(r, t) in rows]
        tried = TRIED if (args.out / "tried.md").exists() else ""
        text = f"{INTRODUCTION}{tried}\n{report.table(COLUMNS, in_order)}\n"
        write_atomically(args.out / "README.md", text.encode())
    print((args.out / "README.md").read_text())
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
