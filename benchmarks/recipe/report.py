"""The study's results as files: results.csv, table.md, tasks.png, curves.png. Conclusions are for people to draw."""

import csv
import io
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.recipe import measure, study
from eupe_jax.evals import report as eval_report
from eupe_jax.files import write_whole
from eupe_jax.training.metrics import read_metrics

RESULTS, TABLE, TASKS, CURVES = "results.csv", "table.md", "tasks.png", "curves.png"
FIELDS = ("seed", "row", "figure", "side", "value")

# From the floor to the ceiling, as the table and the figure list them.
ORDER = (
    "untrained", "shuffled", *(f"only_{name}" for name in study.EXPERTS),
    *(f"pair_{a}_{b}" for a, b in study.pairs()), "direct_raw", "direct", "direct_compute", "direct_wide",
    "stage12", "stage13", "stage123", "proxy", *(f"expert_{name}" for name in study.EXPERTS),
)  # fmt: skip
BOLD = ("direct", "stage12", "stage123")

Result = dict[str, str | float | int]


def collect(out: Path) -> list[Result]:
    """Every figure measured so far, one a line: seed ("" for experts, which have none), row, figure, side, value."""
    found = []
    for folder in sorted([*out.glob("seed*/*/tasks/*"), *out.glob("shared/expert_*/tasks/*")]):
        content = eval_report.read(folder)
        if content is None:
            continue
        row = folder.parent.parent.name
        seed = "" if row.startswith("expert_") else int(folder.parent.parent.parent.name.removeprefix("seed"))
        if folder.name == "similarity":
            found += [_similarity(seed, row, name, value) for name, value in content["metrics"].items()]
            continue
        task, _, side = folder.name.rpartition("_")
        for figure, name in measure.TAKEN[task].items():
            found.append(_result(seed, row, figure, int(side), content["metrics"][name]))
    return found


def _similarity(seed: int | str, row: str, name: str, value: float) -> Result:
    """A metric is called EXPERT_KIND_SIDE, or EXPERT_KIND_position_map: the map has side 0."""
    expert, kind, side = re.fullmatch(r"(.+)_(cls|patches)_(\d+|position_map)", name).groups()
    return _result(seed, row, f"{expert}_{kind}", 0 if side == "position_map" else int(side), value)


def _result(*values) -> Result:
    return dict(zip(FIELDS, values, strict=True))


class Figures:
    """The values of every cell over the seeds."""

    def __init__(self, results: Sequence[Result]) -> None:
        self._values: dict[tuple, list[float]] = {}
        for r in results:
            self._values.setdefault((r["row"], r["figure"], int(r["side"])), []).append(float(r["value"]))
        self.rows = [row for row in ORDER if any(key[0] == row for key in self._values)]
        self.similarities = sorted({key[1] for key in self._values} - set(measure.FIGURES))

    def values(self, row: str, figure: str, side: int) -> list[float]:
        return self._values.get((row, figure, side), [])

    def cell(self, row: str, figure: str, side: int) -> str:
        """The mean, with the standard deviation over seeds where there are several."""
        values = self.values(row, figure, side)
        if not values:
            return ""
        factor, digits = (100, 1) if measure.FIGURES.get(figure, ("", "", 1))[1] == "%" else (1, 3)
        text = f"{factor * statistics.mean(values):.{digits}f}"
        return text + (f" ± {factor * statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def write(out: Path, results: Sequence[Result], budget: float) -> None:
    """All four files, each whole."""
    figures = Figures(results)
    sheet = io.StringIO()
    writer = csv.DictWriter(sheet, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(results)
    write_whole(out / RESULTS, sheet.getvalue())
    write_whole(out / TABLE, table(out, figures, budget))
    write_whole(out / TASKS, _png(tasks_figure(figures)))
    write_whole(out / CURVES, _png(curves_figure(out)))


def table(out: Path, figures: Figures, budget: float) -> str:
    """The tables of tasks at each resolution and of agreement with the experts, in Markdown."""
    lines = ["# The replication's tables", "", "± is the standard deviation over seeds, where there are several.", ""]
    lines += [] if budget == 1.0 else [f"A trial with {budget:g} of the steps: its figures mean nothing.", ""]
    for side in measure.SIDES:
        heads = [f"{name}{'' if sign > 0 else ' (lower is better)'}" for name, _, sign in measure.FIGURES.values()]
        cells = [
            [_named(row), *_cost(out, row), *(figures.cell(row, figure, side) for figure in measure.FIGURES)]
            for row in figures.rows
        ]
        lines += [f"At {side} pixels:", "", *_markdown(["row", "steps", "TFLOPs", *heads], cells), ""]
    side = measure.SIDES[0]
    cells = [
        [_named(row), *(figures.cell(row, figure, side) for figure in figures.similarities)]
        for row in figures.rows
        if _comparable(row) and any(figures.values(row, figure, side) for figure in figures.similarities)
    ]
    if cells:
        maps = [_first(figures, figure) for figure in figures.similarities]
        cells.insert(0, ["position map", *maps])
        heads = [figure.replace("_", ", ") for figure in figures.similarities]
        lines += [
            f"Cosine with each expert's normalised tokens at {side} pixels:",
            "",
            *_markdown(["row", *heads], cells),
        ]
    return "\n".join([*lines, *compatibility(out, figures)]) + "\n"


def compatibility(out: Path, figures: Figures) -> list[str]:
    """What the teachers' report foretold of every two experts, beside what a second expert cost the first one."""
    found = eval_report.read(out / "shared" / "compatibility")
    measured = [] if found is None else [row for row in found["details"]["pairs"] if row["tokens"] == "patches"]
    cells = []
    for row in measured:
        for expert, other, r2 in (
            (row["one"], row["other"], row["r2_other_to_one"]),
            (row["other"], row["one"], row["r2_one_to_other"]),
        ):
            together = "pair_" + "_".join(sorted((expert, other), key=study.EXPERTS.index))
            side, figure = measure.SIDES[0], f"{expert}_patches"
            alone, shared = figures.values(f"only_{expert}", figure, side), figures.values(together, figure, side)
            if alone and shared:
                alone, shared = statistics.mean(alone), statistics.mean(shared)
                cells.append([expert, other, f"{row['cka']:.3f}", f"{r2:.3f}", f"{alone:.3f}", f"{shared:.3f}",
                              f"{alone - shared:+.3f}"])  # fmt: skip
    if not cells:
        return []
    heads = ["expert", "beside it", "CKA", "R2 from the other", "cosine alone", "cosine beside", "lost"]
    title = f"Experts two by two, patch tokens: foretold before training, and measured at {measure.SIDES[0]} pixels:"
    return ["", title, "", *_markdown(heads, cells)]


def _first(figures: Figures, figure: str) -> str:
    """The position map's cosine: the same whatever the encoder."""
    return next((figures.cell(row, figure, 0).split(" ")[0] for row in ("direct", *figures.rows)
                 if _comparable(row) and figures.values(row, figure, 0)), "")  # fmt: skip


def _comparable(row: str) -> bool:
    """Whether a row's cosines are of normalised tokens, as the others': raw ones have a mean in common."""
    return row not in study.runs() or study.runs()[row].normalized


def _named(row: str) -> str:
    return f"**{study.label(row)}**" if row in BOLD else study.label(row)


def _cost(out: Path, row: str) -> tuple[str, str]:
    """Steps of a row's own network, and training FLOPs of all that it took, in 1e12; those of experts not counted."""
    done = sorted(out.glob(f"seed*/{row}/{study.DONE}"))
    if not done:
        return "", ""
    facts = _facts(done[0].parent)
    steps = sum(fact["steps"] for name, fact in facts.items() if row == "proxy" or name != "proxy")
    return f"{steps:,}", f"{sum(fact['flops'] for fact in facts.values()) / 1e12:.1f}"


def _facts(folder: Path) -> dict[str, dict]:
    """{run: its steps and FLOPs} of a finished run and all that it goes back to."""
    return {name: json.loads((folder.parent / name / study.DONE).read_text()) for name in study.chain(folder.name)}


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    line = lambda cells: "| " + " | ".join(cells) + " |"  # noqa: E731
    return [line(heads), "|" + "---|" * len(heads), *map(line, rows)]


def tasks_figure(figures: Figures):
    """A panel a task: a row's mean at either resolution, and every seed as a small dot."""
    from matplotlib.figure import Figure

    rows = figures.rows[::-1]
    picture = Figure(figsize=(3.1 * len(measure.FIGURES) + 2.6, 0.34 * len(rows) + 1.5), dpi=140, layout="constrained")
    panels = picture.subplots(1, len(measure.FIGURES), sharey=True, squeeze=False)[0]
    for panel, (figure, (title, unit, sign)) in zip(panels, measure.FIGURES.items(), strict=True):
        factor = 100 if unit == "%" else 1
        for side, colour, shift in zip(measure.SIDES, ("#1f5f8b", "#d1792b"), (0.13, -0.13), strict=True):
            for y, row in enumerate(rows):
                values = [factor * v for v in figures.values(row, figure, side)]
                if values:
                    panel.plot(values, [y + shift] * len(values), "o", color=colour, alpha=0.35, markersize=3.5)
                    panel.plot(statistics.mean(values), y + shift, "|", color=colour, markersize=11, markeredgewidth=2)
            panel.plot([], [], "|", color=colour, markeredgewidth=2, label=f"{side} px")
        panel.set_title(f"{title} ({unit})" + ("" if sign > 0 else ", lower is better"), fontsize=9)
        panel.grid(axis="both", alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        if sign < 0:
            panel.invert_xaxis()
    panels[0].set_ylim(-0.6, len(rows) - 0.4)
    panels[0].set_yticks(range(len(rows)), [study.label(row) for row in rows], fontsize=8)
    for label, row in zip(panels[0].get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row in BOLD else "normal")
    panels[0].legend(fontsize=8, loc="lower right")
    return picture


def curves_figure(out: Path):
    """kNN inside training over images seen, and over training FLOPs, the proxy's included; a line a run, all seeds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    picture = Figure(figsize=(12, 4.4), dpi=140, layout="constrained")
    by_images, by_flops = picture.subplots(1, 2, sharey=True)
    names = [
        name for name in study.runs() if name not in study.NOT_ROWS and any(out.glob(f"seed*/{name}/{study.DONE}"))
    ]
    for number, name in enumerate(names):
        style = {"color": f"C{number % 10}", "linestyle": ("-", "--")[number // 10], "marker": "o", "markersize": 3}
        style |= {"linewidth": 2.2 if name in (*BOLD, "proxy") else 1.0}
        curves = [points for folder in sorted(out.glob(f"seed*/{name}")) if (points := _curve(folder))]
        for i, points in enumerate(curves):
            images, flops, values = zip(*points, strict=True)
            by_images.plot([n / 1000 for n in images], values, label=study.label(name) if i == 0 else None, **style)
            by_flops.plot(flops, values, **style)
    by_images.set(xlabel="the network's own training images (thousands)", ylabel="kNN at 64 px, mean per class (%)")
    by_flops.set(xlabel="training TFLOPs, the proxy's included, experts' excluded")
    for axes in (by_images, by_flops):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    picture.legend(*by_images.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return picture


def _curve(folder: Path) -> list[tuple[float, float, float]]:
    """(images, TFLOPs, kNN in per cent) at every evaluation of a finished run."""
    if not (folder / study.DONE).exists():
        return []
    facts = _facts(folder)
    own = facts.pop(folder.name)
    batch = json.loads((folder / "config.json").read_text())["batch_size"]
    seen = sum(fact["steps"] for name, fact in facts.items() if name != "proxy") * batch
    before = sum(fact["flops"] for fact in facts.values())
    points = []
    for line in read_metrics(folder / "metrics.jsonl"):
        for key, value in line.items():
            if key.startswith("knn/") and key.endswith("/mean_per_class"):
                flops = before + line["step"] / own["steps"] * own["flops"]
                points.append((seen + line["step"] * batch, flops / 1e12, 100 * value))
    return points


def _png(picture) -> bytes:
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png")
    return buffer.getvalue()
