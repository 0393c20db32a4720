"""How well do teachers go together? Before any training, on a few thousand images:

python launch/teachers_report.py --config=configs/stage1_proxy.py --data=/data/images --out=runs/teachers
python launch/teachers_report.py --teachers=pe=teachers/pe_core_g --teachers=mine=host:package.module:Class \
    --teachers=untrained=random:eupe_vitb16 --data=/data/images --out=runs/teachers --resolution=224

Linear CKA, mutual ridge predictability, spread of scales and dimensions of class and patch tokens: tables here (--json:
everything as JSON instead) and as CSV in --out, compatibility.png, and a summary in plain words. --config names a run,
whose teachers are measured as it uses them; --teachers adds others (repeat it). The same command resumes what was
stopped.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from absl import flags

from eupe_jax.evals import compatibility, report
from eupe_jax.files import write_whole
from eupe_jax.training.checkpoints import versions
from launch import cli
from launch.teacher_sets import open_teachers

CONFIG = cli.define_config("recipe whose teachers are measured, e.g. configs/stage1_proxy.py")
TEACHERS = flags.DEFINE_multi_string("teachers", [], "NAME=SOURCE, what --checkpoint of launch/evaluate.py takes")
DATA = flags.DEFINE_string("data", None, "folder of images, also inside tar files")
OUT = flags.DEFINE_string("out", None, "folder for metrics.json, tables, the figure and what a stopped run left")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "compute type of --teachers in Flax")
IMAGES = flags.DEFINE_integer("images", 2000, "how many images, evenly spread over --data", lower_bound=1)
RESOLUTION = flags.DEFINE_integer("resolution", 0, "side in pixels for every teacher; 0: each its own", lower_bound=0)
PATCH_MEAN = flags.DEFINE_bool("patch_mean", False, "mean patch tokens stand in for class tokens that teachers lack")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 0, "images a forward pass; 0: as suits the device", lower_bound=0)
JSON = flags.DEFINE_bool("json", False, "print everything as JSON instead of tables")


def main() -> None:
    folder, out = cli.require_local(DATA, "data"), cli.require_local(OUT, "out")
    settings = compatibility.Settings(IMAGES.value, RESOLUTION.value, PATCH_MEAN.value, batch_size=BATCH_SIZE.value)
    if not folder.exists():
        raise FileNotFoundError(f"--data {folder}: no such folder")
    images = compatibility.load(folder, settings)
    teachers = open_teachers(CONFIG.value, TEACHERS.value, DTYPE.value)
    header = {
        "eval": "compatibility",
        "encoder": ", ".join(teachers),
        "fingerprint": ", ".join(teacher.fingerprint for teacher in teachers.values()),
        "data": str(folder.resolve()),
        "settings": dataclasses.asdict(settings),
        "teachers": {name: f"{t.name} at {settings.resolution or t.resolution} px" for name, t in teachers.items()},
    }
    found = report.read(out)
    if found is None:
        found = _measure(teachers, images, settings, out, header)
    elif not report.same(found, header):
        raise ValueError(f"--out {out} holds another report: choose another folder")
    print(json.dumps(found, indent=2) if JSON.value else text(found))


def _measure(teachers, images, settings: compatibility.Settings, out: Path, header: dict) -> dict:
    """Writes the report; what metrics.json then holds, tables included."""
    start = time.perf_counter()
    result = compatibility.run(teachers, images, settings, workdir=out / "work")
    header["seconds"] = round(time.perf_counter() - start, 1)
    header |= {"devices": f"{jax.device_count()} {jax.devices()[0].device_kind}", "versions": versions()}
    write_whole(out / "summary.txt", "\n".join(result.details["summary"]) + "\n")
    report.write(out, dataclasses.replace(result, details={**result.details, **result.tables}), header)
    shutil.rmtree(out / "work", ignore_errors=True)  # nothing that a finished report needs
    return report.read(out)


def text(found: Mapping) -> str:
    """The report for a terminal: a table of pairs, one of teachers, the summary."""
    details = found["details"]
    pairs = [
        {
            "tokens": row["tokens"],
            "A": row["one"],
            "B": row["other"],
            "CKA": _with_spread(row, "cka"),
            "CKA, raw": f"{row['cka_raw']:.3f}",
            "R2 A to B": _with_spread(row, "r2_one_to_other"),
            "R2 B to A": _with_spread(row, "r2_other_to_one"),
        }
        for row in details["pairs"]
    ]
    teachers = [
        {
            "tokens": row["tokens"],
            "teacher": row["teacher"],
            "width": str(row["width"]),
            "median std": f"{row['std_median']:.3g}",
            "largest/median": f"{row['std_ratio']:.1f}",
            "dead": str(row["dead"]),
            "directions": f"{row['participation']:.1f}",
            "raw": f"{row['participation_raw']:.1f}",
            "effective rank": f"{row['effective_rank']:.1f}",
            "place": f"{row['place_share']:.0%}",
            "R2 from all others": "-" if row["r2_from_all_others"] is None else _with_spread(row, "r2_from_all_others"),
        }
        for row in details["teachers"]
    ]
    blocks = [_table(pairs), _table(teachers), "\n".join(f"- {line}" for line in details["summary"])]
    return f"{details['images']} images of {found['data']}\n\n" + "\n\n".join(blocks)


def _with_spread(row: Mapping, figure: str) -> str:
    return f"{row[figure]:.3f} ± {row[f'{figure}_spread']:.3f}"


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


if __name__ == "__main__":
    cli.run(main)
