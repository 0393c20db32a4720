"""Lays results side by side, beside the paper's tables: python launch/compare.py --out=comparison RESULT_FOLDER ...

Folders are searched for metrics.json files as launch/evaluate.py writes them. Prints a table; --out=FOLDER also writes
comparison.csv, comparison.md and comparison.png. Figures measured on other data than the paper's say so: a row of yours
is only comparable with the paper's where your folders hold ImageNet-1k, SPair-71k, NYUv2 and ADE20k.
"""

import csv
import io
import os
from pathlib import Path

from absl import flags

from eupe_jax.evals import paper, report
from launch import cli

OUT = flags.DEFINE_string("out", None, "folder for comparison.csv, comparison.md and comparison.png")
PAPER = flags.DEFINE_bool("paper", True, "also the paper's rows")


def collect(folders: list[Path]) -> dict[str, dict[str, tuple[float, str]]]:
    """{encoder: {column: (figure in the paper's unit, data folder)}} from every metrics.json below `folders`.

    Raises:
      FileNotFoundError: a folder is missing or holds no result. ValueError: damaged, or two results for one cell.
    """
    by_source = {
        (evaluation, metric): (column, factor) for column, (evaluation, metric, factor) in paper.SOURCES.items()
    }
    rows: dict[str, dict[str, tuple[float, str]]] = {}
    for folder in folders:
        found = sorted(folder.rglob(report.METRICS)) if folder.is_dir() else []
        if not found:
            raise FileNotFoundError(f"{folder} holds no {report.METRICS} of launch/evaluate.py")
        for path in found:
            content = report.read(path.parent)
            cells = rows.setdefault(content["encoder"], {})
            for metric, value in content["metrics"].items():
                column, factor = by_source.get((content["eval"], metric), (None, 1.0))
                if column is None:
                    continue
                if column in cells:
                    raise ValueError(f"two results for {content['encoder']!r}, {column}: {path} and one before it")
                cells[column] = (value * factor, content["data"])
    return rows


def table(rows: dict[str, dict[str, tuple[float, str]]], with_paper: bool) -> list[dict[str, str]]:
    """One row an encoder, measured ones first."""
    lines = []
    for name, cells in rows.items():
        figures = {c: _figure(c, cells[c][0]) if c in cells else "" for c in paper.COLUMNS}
        lines.append({"encoder": name, **figures, "from": "measured"})
    for name, values in paper.ROWS.items() if with_paper else ():
        cells = zip(paper.COLUMNS, values, strict=True)
        lines.append({"encoder": name, **{c: "" if v is None else _figure(c, v) for c, v in cells}, "from": "paper"})
    return lines


def _figure(column: str, value: float) -> str:
    return f"{value:.3f}" if column in paper.LOWER_IS_BETTER else f"{value:.1f}"


def markdown(lines: list[dict[str, str]], data: dict[str, set[str]]) -> str:
    """The table, and under it what each column was measured on."""
    heads = list(lines[0])
    units = {c: f"{c} {'↓' if c in paper.LOWER_IS_BETTER else '↑'}" for c in paper.COLUMNS}
    out = ["| " + " | ".join(units.get(h, h) for h in heads) + " |", "|" + "---|" * len(heads)]
    out += ["| " + " | ".join(line.values()) + " |" for line in lines]
    out += [""] + [f"{c} measured on {', '.join(sorted(data[c]))}" for c in paper.COLUMNS if data.get(c)]
    return "\n".join(out) + "\n"


def figure(lines: list[dict[str, str]]) -> bytes:
    """One panel a column: measured encoders as bars, the paper's as grey ticks beside their names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = [c for c in paper.COLUMNS if any(line[c] and line["from"] == "measured" for line in lines)]
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
                axis.barh(y, float(line[column]), color="#2f6f9f" if measured else "#c9c9c9")
                axis.text(float(line[column]), y, f" {line[column]}", va="center", fontsize=7)
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
    if not folders:
        raise ValueError("name at least one folder of results: python launch/compare.py runs/evals")
    rows = collect(folders)
    data: dict[str, set[str]] = {}
    for cells in rows.values():
        for column, (_, folder) in cells.items():
            data.setdefault(column, set()).add(folder)
    lines = table(rows, PAPER.value)
    text = markdown(lines, data)
    print(text)
    if OUT.value:
        out = Path(OUT.value)
        out.mkdir(parents=True, exist_ok=True)
        sheet = io.StringIO()
        writer = csv.DictWriter(sheet, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
        contents = {"comparison.csv": sheet.getvalue().encode(), "comparison.md": text.encode()}
        contents["comparison.png"] = figure(lines)
        for name, content in contents.items():
            partial = out / f".{name}.partial"
            partial.write_bytes(content)
            os.replace(partial, out / name)
        print(f"wrote {out}")


if __name__ == "__main__":
    cli.run(main, arguments=True)
