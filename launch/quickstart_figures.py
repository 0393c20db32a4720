"""Charts of the quickstart's report as SVG data URIs, each drawn twice: for light and for dark screens."""

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure

PALETTES = {
    "light": {"text": "#3b4252", "grid": "#e3e6ec", "student": "#2f6fde", "proxy": "#7fb0f5", "control": "#c3c8d2",
              "best": "#e08a1e", "lines": ("#2f6fde", "#d9480f", "#2b8a3e", "#9c36b5")},
    "dark": {"text": "#c9d1dc", "grid": "#333a45", "student": "#5b94f5", "proxy": "#34598f", "control": "#59616e",
             "best": "#e9a13b", "lines": ("#6ea3f7", "#f08c56", "#63c179", "#cc8be0")},
}  # fmt: skip
PARTS = {"cls_cosine": ("class 1 − cosine", "-"), "patch_cosine": ("patch 1 − cosine", "--"),
         "patch_smooth_l1": ("patch smooth-L1", ":")}  # fmt: skip


def _draw(draw: Callable[[Figure, Mapping], None], size: tuple[float, float]) -> dict[str, str]:
    """{"light": data URI, "dark": data URI}; the same numbers always give the same bytes."""
    pictures = {}
    for theme, colours in PALETTES.items():
        style = {
            "font.size": 9, "text.color": colours["text"], "axes.labelcolor": colours["text"],
            "axes.edgecolor": colours["grid"], "xtick.color": colours["text"], "ytick.color": colours["text"],
            "grid.color": colours["grid"], "axes.spines.top": False, "axes.spines.right": False,
            "axes.axisbelow": True, "text.parse_math": False, "svg.hashsalt": "eupe_jax",
        }  # fmt: skip
        with matplotlib.rc_context(style):
            figure = Figure(figsize=size, layout="constrained")
            draw(figure, colours)
            file = io.BytesIO()
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        pictures[theme] = "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()
    return pictures


def bars(
    groups: Mapping[str, Mapping[str, float]], labels: Mapping[str, str], controls: Sequence[str]
) -> dict[str, str]:
    """Horizontal bars of {group: {row: value}}, one panel a group; the best control is drawn across the models."""
    rows = sum(len(group) for group in groups.values())
    every = [v for group in groups.values() for v in group.values() if math.isfinite(v)] or [0.0]
    low, high = min(0.0, *every), max(0.1, *every)

    def draw(figure: Figure, colours: Mapping) -> None:
        heights = [len(group) for group in groups.values()]
        axes = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for ax, (title, group) in zip(axes, groups.items(), strict=True):
            finite = {row: value for row, value in group.items() if math.isfinite(value)}
            best = max((row for row in finite if row in controls), key=finite.get, default=None)
            for y, (row, value) in enumerate(group.items()):
                if row not in finite:
                    ax.text(0, y, " no number", va="center", fontsize=8)
                    continue
                colour = colours["best"] if row == best else colours.get(row, colours["control"])
                ax.barh(y, value, color=colour, height=0.72)
                end = max(value, 0.0)
                if best and row not in controls and 0 <= finite[best] - end < 0.16 * (high - low):
                    end = finite[best]  # beside the dashed line, not under it
                ax.text(end + 0.012 * (high - low), y, f"{value:.3f}", va="center", fontsize=8)
            if best:
                models = sum(row not in controls for row in group)  # the line crosses these bars, not other labels
                ax.vlines(
                    finite[best], -0.5, models - 0.5, colors=colours["best"], linestyles=(0, (3, 2)), linewidth=1.2
                )
            ax.axvline(0, color=colours["text"], linewidth=0.6)
            names = [labels[row] + (" (best control)" if row == best else "") for row in group]
            ax.set_yticks(range(len(group)), names)
            ax.invert_yaxis()
            ax.tick_params(axis="y", length=0)
            ax.spines["left"].set_visible(False)
            ax.grid(axis="x", linewidth=0.6)
            ax.set_title(title, fontsize=9, fontweight="bold", loc="left")
        axes[-1].set_xlim(low - 0.03 * (high - low), high + 0.18 * (high - low))
        axes[-1].set_xlabel("mean cosine with the expert")

    return _draw(draw, (4.6, 0.24 * rows + 0.36 * len(groups) + 0.45))


def _curve(lines: Sequence[Mapping], key: str) -> tuple[list, list]:
    """Steps and values of the lines that have the key and a finite number (evaluations log lines of their own)."""
    points = [(line["step"], line[key]) for line in lines if math.isfinite(line.get(key, math.nan))]
    return [x for x, _ in points], [y for _, y in points]


def loss_curves(lines: Sequence[Mapping]) -> dict[str, str] | None:
    """Total loss of every student, and one curve per teacher and part; None where there is nothing to plot."""
    keys = list(dict.fromkeys(key for line in lines for key in line))
    totals = [k for k in keys if k.count("/") == 1 and k.endswith("/loss")]  # not those of single resolution pairs
    parts = [k for k in keys if k.count("/") == 2 and k.rsplit("/", 1)[1] in PARTS]
    if not any(_curve(lines, key)[0] for key in totals + parts):
        return None
    several = len({k.split("/")[0] for k in totals + parts}) > 1
    teachers = list(dict.fromkeys(k.split("/")[1] for k in parts))
    marker = "o" if len(lines) <= 12 else None

    def draw(figure: Figure, colours: Mapping) -> None:
        ax = figure.subplots()
        for key in totals:
            student = key.removesuffix("/loss")
            label = f"{student}: total" if several else "total loss"
            ax.plot(*_curve(lines, key), color=colours["text"], linewidth=2.2, label=label, marker=marker, markersize=4)
        for key in parts:
            student, teacher, part = key.split("/")
            words, dash = PARTS[part]
            label = f"{student}: {teacher}, {words}" if several else f"{teacher}, {words}"
            colour = colours["lines"][teachers.index(teacher) % len(colours["lines"])]
            ax.plot(*_curve(lines, key), color=colour, linestyle=dash, linewidth=1.5, label=label, marker=marker,
                    markersize=3)  # fmt: skip
        ax.set_xlabel("step")
        ax.set_ylim(bottom=0)
        ax.grid(linewidth=0.6)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)

    return _draw(draw, (4.6, 2.9 + 0.17 * math.ceil(len(totals + parts) / 2)))
