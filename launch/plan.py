"""Compiles a recipe's real train step for TPUs that are not there, and predicts what the run would need and take:

    python launch/plan.py --config=configs/stage2_vitb.py --topology=v5e:16x16 --out=docs/plans/stage2_vitb_v5e.md

Prints memory by kind, FLOPs, collectives, step time by two estimates, MFU, days and chip-hours: all predicted. Needs
libtpu (the extra "tpu") and no TPU. --sweep compares remat policies, micro-batches and meshes; its JSON is that of the
best plan and all "rows". A compiled step is kept (--cache) and compiled again only when it changes. Exit status 1:
nothing fits, or a figure cannot be trusted.
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


class _Values(flags.ListParser):
    """Comma-separated values of one type, at least one."""

    def __init__(self, type_: type):
        super().__init__()
        self.type = type_

    def parse(self, argument: str | list) -> list:
        try:
            values = list(dict.fromkeys(self.type(value) for value in super().parse(argument)))
        except ValueError:
            raise ValueError("give whole numbers, with commas between them") from None
        if not values:
            raise ValueError("give at least one value")
        return values


def _axis(name: str, help_text: str) -> flags.FlagHolder:
    values = list(sweep.AXES[name])
    return flags.DEFINE(_Values(type(values[0])), name, values, f"with --sweep: {help_text}",
                        serializer=flags.CsvListSerializer(","))  # fmt: skip


AXES = {
    "remat": _axis("remat", "policies of all students"),
    "accumulate": _axis("accumulate", "micro-batches a step"),
    "fsdp": _axis("fsdp", "devices that parameters are cut over"),
    "tensor": _axis("tensor", "devices that share each image"),
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
    _check_flags()
    name = flags.FLAGS["config"].config_filename
    chosen = pairs.choose(config, PAIRS.value)
    cache = Path(CACHE.value) if CACHE.value else default_cache()
    check(config, topology, SLICES.value)
    if SWEEP.value:
        found, text, good = _sweep(config, name, topology, chosen, cache)
    else:
        found = make_plan(config, name, topology, SLICES.value, chosen, cache)
        found["overrides"] = _overrides(sys.argv[1:])
        text, good = report.markdown(found), found["fits"] and not found["problems"]
    if JSON.value:
        write_atomically(Path(JSON.value), json.dumps(found, indent=1).encode())
    if OUT.value:
        write_atomically(Path(OUT.value), text.encode())
    if HLO.value:
        _copy_hlo(found, cache, Path(HLO.value))
    print(text)
    if not good:
        sys.exit(1)


def _check_flags() -> None:
    """Before hours of compiling: flags that would do nothing, and files that could not be written.

    Raises:
      ValueError, OSError: names the flag.
    """
    if SWEEP.value and HLO.value:
        raise ValueError("--hlo is for one plan: leave --sweep out")
    for name in ("product", *AXES):
        if flags.FLAGS[name].present and not SWEEP.value:
            raise ValueError(f"--{name} compares variants: give --sweep too, or --config.FIELD=VALUE for one plan")
    for flag in (JSON, OUT, HLO, CACHE):
        if flag.value:
            cli.require_local(flag, flag.name)
    folders = {"json": _rows_folder(), "hlo": Path(HLO.value) if HLO.value else None}
    for flag in (JSON, OUT):
        if flag.value and Path(flag.value).is_dir():
            raise ValueError(f"--{flag.name}={flag.value} is a folder: name a file")
        folders[flag.name] = folders.get(flag.name) or (Path(flag.value).parent if flag.value else None)
    for name, folder in folders.items():
        try:
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--{name}: the folder {folder} cannot be made ({error.strerror})") from None


def _rows_folder() -> Path | None:
    """Beside --json, for the rows of a sweep as they come."""
    return Path(JSON.value).with_name(f"{Path(JSON.value).stem}_rows") if SWEEP.value and JSON.value else None


def _overrides(words: list[str]) -> list[str]:
    """Those of the config on a command line, as --config.FIELD=VALUE or in two words."""
    found = []
    for number, word in enumerate(words):
        if word.startswith(("--config.", "-config.")):
            value = words[number + 1 : number + 2]
            alone = "=" not in word and value and not value[0].startswith("--")
            found.append(f"{word}={value[0]}" if alone else word)
    return found


def _copy_hlo(plan: dict, cache: Path, folder: Path) -> None:
    """The programs of all pairs that compile.

    Raises:
      ValueError: the cache holds a pair's costs and not its program any more.
    """
    for pair in plan["pairs"]:
        source = cache / f"{pair['digest']}.hlo.gz"
        if source.exists():
            shutil.copyfile(source, folder / f"{pair['pair'].replace(':', '_')}.hlo.gz")
        elif pair["fits"]:
            raise ValueError(f"--hlo: the program {source} is gone: name a fresh --cache")


def _sweep(config, name: str, topology: str, chosen: list, cache: Path) -> tuple[dict, str, bool]:
    """(what --json gets, the report, whether a variant fits and its figures can be trusted)."""
    axes = {axis: flag.value for axis, flag in AXES.items()}
    cells = list(sweep.variants(config, axes, product=PRODUCT.value))
    rows = sweep.run(config, name, topology, SLICES.value, chosen, cache, cells, _rows_folder())
    found = sweep.document(rows)
    text = f"# {name} on {topology}: variants by predicted step time\n\n{sweep.markdown(rows)}\n"
    return found, text, found["fits"] and not found["problems"]


if __name__ == "__main__":
    cli.run(main)
