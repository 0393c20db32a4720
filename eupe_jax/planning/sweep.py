"""Plans of one recipe under other remat policies, micro-batches and meshes, side by side."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

from eupe_jax.distill.resolutions import Resolutions
from eupe_jax.planning.compiling import write_atomically
from eupe_jax.planning.plan import make_plan
from eupe_jax.planning.report import milliseconds, table

AXES = {"remat": ("none", "names", "full"), "accumulate": (1, 2, 4), "fsdp": (8, 16, 32), "tensor": (1, 2)}
KEYS = ("fits", "hbm_free_fraction", "step_seconds", "predicted_mfu", "model_flops", "collectives", "chip_hours")
ERRORS = (ValueError, OSError, ImportError)  # a process that died is an OSError


def variants(config: ConfigDict, axes: Mapping[str, Sequence[Any]], *, product: bool = False) -> Iterator[dict]:
    """{axis: value} of every variant, the config's own first.

    axes: values to try, of `AXES`; `product`: every combination instead of one change at a time.
    """
    own = {axis: read(config, axis) for axis in axes}
    found = [own]
    if product:
        found = [{}]
        for axis, values in axes.items():
            found = [{**chosen, axis: value} for chosen in found for value in values]
        found.sort(key=lambda chosen: chosen != own)
    else:
        found += [{**own, axis: value} for axis, values in axes.items() for value in values if value != own[axis]]
    yield from found


def read(config: ConfigDict, axis: str) -> Any:
    """The config's value of a sweep's axis; several students' policies as one, joined by "+" where they differ."""
    if axis == "remat":
        return "+".join(dict.fromkeys(entry.remat for entry in config.students.values()))
    return config.accumulate if axis == "accumulate" else config.mesh[axis]


def changed(config: ConfigDict, variant: Mapping[str, Any]) -> ConfigDict:
    """A copy of the config with these values."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for axis, value in variant.items():
            if value == read(config, axis):
                continue
            if axis == "remat":
                for entry in config.students.values():
                    entry.remat = value
            elif axis == "accumulate":
                config.accumulate = value
            else:
                config.mesh[axis] = value
    return config


def run(
    config: ConfigDict,
    name: str,
    topology: str,
    slices: int,
    chosen: Sequence[Resolutions],
    cache: Path,
    cells: Sequence[dict],
    folder: Path | None = None,
) -> list[dict[str, Any]]:
    """One row a variant: its plan, or the error that it ended in; those that fit first, by predicted step time.

    folder: gets each row as a file of its own as soon as it is there. What was compiled is taken from the cache, so
    that an interrupted sweep goes on where it stopped.
    """
    rows = []
    with tqdm(cells, desc="sweep", unit="plan") as bar:
        for variant in bar:
            text = ", ".join(f"{k} {v}" for k, v in variant.items())
            bar.set_postfix_str(text)
            row: dict[str, Any] = {"variant": variant, "error": None, "plan": None}
            try:
                row["plan"] = make_plan(changed(config, variant), f"{name} ({text})", topology, slices, chosen, cache)
            except ERRORS as error:
                row["error"] = str(error)
            if folder is not None:
                label = "_".join(f"{k}-{v}" for k, v in variant.items())
                write_atomically(folder / f"{label}.json", json.dumps(row, indent=1).encode())
            rows.append(row)
    return sorted(rows, key=_order)


def _order(row: dict[str, Any]) -> tuple:
    plan = row["plan"]
    if plan is None:
        return (2, 0.0)
    return (0, plan["step_seconds"]) if plan["fits"] else (1, -plan["hbm_free_fraction"])


def document(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a sweep comes to: the plan of its best row, and which variant that is, beside all rows.

    Where no variant fits, that of the one that is nearest to it; where none could be planned, figures are None.
    """
    best = rows[0]
    plan = best["plan"] or dict.fromkeys(KEYS) | {"fits": False, "collectives": [], "problems": [best["error"]]}
    return plan | {"variant": best["variant"], "rows": list(rows)}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table."""
    axes = list(rows[0]["variant"])
    lines = []
    for row in rows:
        plan, cells = row["plan"], [str(row["variant"][axis]) for axis in axes]
        if plan is None:
            lines.append([*cells, "", "", "", "", "", row["error"].splitlines()[0][:160]])
            continue
        timed = plan["step_seconds"] is not None
        remarks = [plan["advice"] or "", *plan["problems"]]
        lines.append([
            *cells, f"{plan['batch_per_device']:g}", f"{plan['hbm_free_fraction']:.0%}",
            milliseconds(plan["step_seconds"]) if timed else "", f"{plan['predicted_mfu']:.1%}" if timed else "",
            f"{plan['chip_hours']:,.0f}" if timed else "", "; ".join(remarks).strip("; "),
        ])  # fmt: skip
    columns = (*axes, "images a device", "HBM free", "step", "MFU", "chip-hours", "remarks")
    return table(columns, lines)
