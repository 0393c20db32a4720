"""What the statistics of teachers were measured on and how they are distributed, as Markdown for people.

Everything is read from the statistics themselves. This module needs no PyTorch: a training pod has none.
"""

import io
from collections.abc import Mapping
from importlib import util

import numpy as np

from eupe_jax.distill.normalization import STD_FLOOR, Statistics
from eupe_jax.planning.report import table

CARD, PICTURE = "README.md", "statistics.png"  # in a folder of statistics
BINS = 48  # at most, of a histogram
TOKENS = {"cls": "class token", "patches": "patch tokens"}


def card(statistics: Mapping[str, Statistics], picture: str | None = None) -> str:
    """The card of {teacher: statistics}. picture: name of the file that `histograms` went into."""
    parts = [
        "# Statistics of teachers",
        "Targets of distillation are (output - mean) / std, coordinate by coordinate, with these frozen statistics "
        "(EUPE §3.3). Class and patch tokens are measured apart; patch tokens are pooled over images and positions. "
        f"Where std is below {STD_FLOOR:g} it counts as {STD_FLOOR:g}.",
        "## How they are distributed",
        summary(statistics),
        "From left to right: least, median and largest over the coordinates. Near-constant: share of the coordinates "
        f"with std below {STD_FLOOR:g}. Uneven: largest std over the median one; without normalisation those "
        "coordinates would dominate the loss.",
    ]
    if picture:
        parts.append(f"![Histograms of mean and std over the coordinates]({picture})")
    parts.append("## What they were measured on")
    for name, each in statistics.items():
        p = each.provenance
        rows = [
            ["tokens measured", ", ".join(f"{count:,} ({TOKENS.get(k, k)})" for k, count in each.count.items())],
            ["images", f"{each.count['cls']:,}" if "cls" in each.count else "not recorded: there is no class token"],
            ["sides in pixels", ", ".join(map(str, p.resolution))],
            ["pixel mean and std", f"{_numbers(p.mean)} and {_numbers(p.std)}"],
            ["data", p.data or "not recorded"],
            ["teacher's fingerprint", f"`{p.teacher}`"],
        ]
        parts += [f"### {name}", table(["", ""], rows)]
    parts.append(
        "The fingerprint is of the teacher's weights, token choice and pixel normalisation. Training refuses "
        "statistics of another one; resolution and data may differ where the run declares it (`statistics_from`)."
    )
    return "\n\n".join(parts) + "\n"


def summary(statistics: Mapping[str, Statistics]) -> str:
    """A table with a row for every kind of token of every teacher."""
    rows = []
    for name, each in statistics.items():
        for kind, mean in each.mean.items():
            std = each.std[kind]
            constant, uneven = np.mean(std < STD_FLOOR), std.max() / max(float(np.median(std)), STD_FLOOR)
            rows.append(
                [name, TOKENS.get(kind, kind), f"{len(mean):,}", _three(mean), _three(std), f"{constant:.1%}",
                 f"{uneven:.3g}"]
            )  # fmt: skip
    return table(["teacher", "tokens", "coordinates", "mean", "std", "near-constant", "uneven"], rows)


def histograms(statistics: Mapping[str, Statistics]) -> bytes | None:
    """A PNG: how mean and std are distributed over the coordinates of every kind of token; None without matplotlib."""
    if util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure  # late: only pictures need it
    from matplotlib.ticker import LogFormatter

    rows = [(name, kind, each) for name, each in statistics.items() for kind in each.mean]
    figure = Figure(figsize=(8.5, 0.4 + 2.1 * len(rows)), dpi=110, layout="constrained")
    panels = figure.subplots(len(rows), 2, squeeze=False)
    for (left, right), (name, kind, each) in zip(panels, rows, strict=True):
        std = np.maximum(each.std[kind], STD_FLOOR)
        bins = int(np.clip(2 * len(std) ** 0.5, 8, BINS))
        left.hist(each.mean[kind], bins, color="#3b6ea5")
        right.hist(std, np.geomspace(std.min() / 1.01, std.max() * 1.01, bins + 1), color="#b5543c")
        right.set_xscale("log")
        right.xaxis.set_major_formatter(LogFormatter())
        right.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
        left.set_title(f"{name}, {TOKENS.get(kind, kind)}", fontsize=10, loc="left")
        left.set_ylabel("coordinates", fontsize=8)
        for panel, label in ((left, "mean"), (right, "std (logarithmic)")):
            panel.set_xlabel(label, fontsize=8)
            panel.tick_params(labelsize=8, which="both")
            panel.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _three(values: np.ndarray) -> str:
    return f"{values.min():.3g}, {np.median(values):.3g}, {values.max():.3g}"


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{v:.4g}" for v in values) + ")"
