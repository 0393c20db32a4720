"""Lays results side by side, beside the paper's tables: python launch/compare.py --out=comparison RESULT_FOLDER ...

Folders are searched for metrics.json files as launch/evaluate.py writes them. Prints a table; --out=FOLDER also writes
comparison.csv, comparison.md and comparison.png. Figures measured on other data than the paper's say so: a row of yours
is only comparable with the paper's where your folders hold ImageNet-1k, SPair-71k, NYUv2 and ADE20k.
"""

import csv
import dataclasses
import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags

from eupe_jax.evals import paper, registry, report
from eupe_jax.evals.paper import COLUMNS
from eupe_jax.files import write_whole
from launch import cli

OUT = flags.DEFINE_string("out", None, "folder for comparison.csv, comparison.md and comparison.png")
PAPER = flags.DEFINE_bool("paper", True, "also the paper's rows")


@dataclass(frozen=True)
class Row:
    """One measured encoder: figures in the paper's units by column, what they were measured on, and how."""

    checkpoint: str
    encoder: str
    cells: dict[str, float]
    data: dict[str, str]
    changed: dict[str, dict[str, Any]]  # column -> settings that are not the authors'


def collect(folders: list[Path]) -> dict[str, Row]:
    """{label: Row} from every metrics.json below `folders`; labels name the checkpoint where one model has several.

    Raises:
      FileNotFoundError: a folder is missing or holds no result. ValueError: damaged, or two results for one cell.
    """
    by_source = {(evaluation, metric): (col, factor) for col, (evaluation, metric, factor) in paper.SOURCES.items()}
    rows: dict[tuple, Row] = {}
    for folder in folders:
        found = sorted(folder.rglob(report.METRICS)) if folder.is_dir() else []
        if not found:
            raise FileNotFoundError(f"{folder} holds no {report.METRICS} of launch/evaluate.py")
        for path in found:
            content = report.read(path.parent)
            step = f" at step {content['step']}" if "step" in content else ""
            checkpoint = content.get("checkpoint", "") + step
            row = rows.setdefault((content["encoder"], checkpoint), Row(checkpoint, content["encoder"], {}, {}, {}))
            for metric, value in content["metrics"].items():
                column, factor = by_source.get((content["eval"], metric), (None, 1.0))
                if column is None:
                    continue
                if column in row.cells:
                    raise ValueError(f"two results for {row.encoder!r} ({checkpoint}), {column}: {path} and one before")
                row.cells[column] = value * factor
                row.data[column] = content.get("data", "")
                row.changed[column] = _changed(content["eval"], content.get("settings", {}))
    count = Counter(encoder for encoder, _ in rows)
    return {f"{e} ({c})" if count[e] > 1 else e: row for (e, c), row in rows.items()}


# How the work is done, not what is measured.
_WORK = {"threads", "batch_size", "eval_batch", "text_batch", "train_block", "query_block", "keep_features_mb"}
_WORK |= {"save_every", "scan_limit", "pictures"}


def _changed(evaluation: str, settings: dict[str, Any]) -> dict[str, Any]:
    defaults = json.loads(json.dumps(dataclasses.asdict(registry.settings(evaluation, {}))))
    trained = evaluation in ("segmentation", "depth")  # their batch size is part of the protocol
    ignored = _WORK - {"batch_size"} if trained else _WORK
    return {k: v for k, v in settings.items() if k not in ignored and v != defaults.get(k)}


def table(rows: dict[str, Row], with_paper: bool) -> list[dict[str, str]]:
    """One row an encoder, measured ones first; a figure whose settings are not the authors' has a star."""
    lines = []
    for name, row in rows.items():
        figures = {c: _figure(c, row.cells[c]) + "*" * bool(row.changed[c]) if c in row.cells else "" for c in COLUMNS}
        lines.append({"encoder": name, **figures, "from": "measured"})
    for name, values in paper.ROWS.items() if with_paper else ():
        cells = zip(COLUMNS, values, strict=True)
        lines.append({"encoder": name, **{c: "" if v is None else _figure(c, v) for c, v in cells}, "from": "paper"})
    return lines


def _figure(column: str, value: float) -> str:
    return f"{value:.3f}" if column in paper.LOWER_IS_BETTER else f"{value:.1f}"


def markdown(lines: list[dict[str, str]], rows: dict[str, Row]) -> str:
    """The table, and under it what each column was measured on and which settings are not the authors'."""
    heads = list(lines[0])
    units = {c: f"{c} {'↓' if c in paper.LOWER_IS_BETTER else '↑'}" for c in COLUMNS}
    out = ["| " + " | ".join(units.get(h, h) for h in heads) + " |", "|" + "---|" * len(heads)]
    out += ["| " + " | ".join(line.values()) + " |" for line in lines] + [""]
    for column in COLUMNS:
        if folders := sorted({row.data[column] for row in rows.values() if column in row.data}):
            out.append(f"{column} measured on {', '.join(folders)}  ")
    for name, row in rows.items():
        for column, changed in row.changed.items():
            if changed:
                out.append(f"\\* {name}, {column}: " + ", ".join(f"{k}={v}" for k, v in changed.items()) + "  ")
    return "\n".join(out) + "\n"


def figure(lines: list[dict[str, str]]) -> bytes:
    """One panel a column: measured encoders as bars, the paper's as grey ticks beside their names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = [c for c in COLUMNS if any(line[c] and line["from"] == "measured" for line in lines)]
    panels, axes = plt.subplots(
        1,
        max(len(columns), 1),
        figsize=(3.6 * max(len(columns), 1), 0.28 * len(lines) + 1.4),
        squeeze=False,
        sharey=True,
    )
    for axis, column in zip(axes[0], columns, strict=False):
        shown = list(enumerate(reversed(lines)))
        for y, line in shown:
            if line[column]:
                measured = line["from"] == "measured"
                axis.barh(y, float(line[column].rstrip("*")), color="#2f6f9f" if measured else "#c9c9c9")
                axis.text(float(line[column].rstrip("*")), y, f" {line[column]}", va="center", fontsize=7)
        axis.set_yticks([y for y, _ in shown], [line["encoder"] for _, line in shown], fontsize=7)
        axis.set_title(f"{column}{' (lower is better)' if column in paper.LOWER_IS_BETTER else ''}", fontsize=9)
        axis.margins(x=0.18)
        axis.spines[["top", "right"]].set_visible(False)
    panels.suptitle("measured (blue) beside the paper (grey)", fontsize=9)
    panels.tight_layout()
    buffer = io.BytesIO()
    panels.savefig(buffer, format="png", dpi=130)
    plt.close(panels)
    return buffer.getvalue()


def main() -> None:
    folders = [Path(argument) for argument in cli.arguments()]
    out = cli.require_local(OUT, "out") if OUT.value else None
    if not folders:
        raise ValueError("name at least one folder of results: python launch/compare.py runs/evals")
    rows = collect(folders)
    lines = table(rows, PAPER.value)
    text = markdown(lines, rows)
    print(text)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        sheet = io.StringIO()
        writer = csv.DictWriter(sheet, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
        contents = {"comparison.csv": sheet.getvalue().encode(), "comparison.md": text.encode()}
        contents["comparison.png"] = figure(lines)
        for name, content in contents.items():
            write_whole(out / name, content)
        print(f"wrote {out}")


if __name__ == "__main__":
    cli.run(main, arguments=True)
