"""What the measures of compatibility mean: a summary in plain words, and the figure.

The thresholds are judgements, not laws: no trained student stands behind them. Each is named here and said in the
summary, so that a reader can draw the line elsewhere.
"""

import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

ADDS_LITTLE = 0.8  # R2 at and above which one teacher is called contained in another
HARD = 0.3  # R2 at and below which a teacher is called hard to predict
UNEQUAL = 10.0  # largest by median standard deviation, within a teacher and between teachers
BY_PLACE = 0.25  # share of variance that the place alone explains
FEW_DIRECTIONS = 0.05  # participation ratio by width
WORDS = {"cls": "class tokens", "patches": "patch tokens"}

Rows = Sequence[Mapping]
R2 = dict[tuple[str, str, str], float]  # (kind, from, to)


def summary(pairs: Rows, rows: Rows, images: int, folds: int) -> list[str]:
    """Lines of plain words from the tables of `compatibility.run`."""
    names = list(dict.fromkeys(row["teacher"] for row in rows))
    r2 = directed(pairs)
    lines = [line for name in names for line in _place_of(name, r2, rows)]
    lines += _distances(pairs)
    lines += _scales(rows)
    return lines + _limits(rows, images, folds)


def directed(pairs: Rows) -> R2:
    """{(token kind, from, to): R2}."""
    found = {}
    for row in pairs:
        found[row["tokens"], row["one"], row["other"]] = row["r2_one_to_other"]
        found[row["tokens"], row["other"], row["one"]] = row["r2_other_to_one"]
    return found


def _place_of(name: str, r2: R2, rows: Rows) -> list[str]:
    """What a teacher brings beside the others."""
    own = {row["tokens"]: row for row in rows if row["teacher"] == name}
    sources = [a for a in dict.fromkeys(a for _, a, b in r2 if b == name) if all((k, a, name) in r2 for k in own)]
    holders = {a: {k: r2[k, a, name] for k in own} for a in sources}
    holders = {a: found for a, found in holders.items() if min(found.values()) >= ADDS_LITTLE}
    if holders:
        best = max(holders, key=lambda a: min(holders[a].values()))
        return [f"{name} adds little that {best} does not hold: {best} predicts {_figures(holders[best])} linearly."]
    together = {kind: row["r2_from_all_others"] for kind, row in own.items()}
    if None not in together.values() and min(together.values()) >= ADDS_LITTLE:
        return [f"{name} adds little that the others together do not hold: they predict {_figures(together)} linearly."]
    lines = []
    for kind in own:
        found = {a: value for (k, a, b), value in r2.items() if (k, b) == (kind, name)}
        if not found:
            lines.append(f"{name} is alone in having {WORDS[kind]}: nothing to compare them with.")
            continue
        best = max(found, key=found.get)
        if found[best] <= HARD:
            lines.append(
                f"The {WORDS[kind]} of {name} are hard to predict from any other teacher (best R2 {found[best]:.2f}, "
                f"from {best}): they bring something of their own, knowledge or noise; expect them to compete for the "
                "student's capacity."
            )
        elif found[best] >= ADDS_LITTLE:
            lines.append(
                f"The {WORDS[kind]} of {name} are all but contained in those of {best} (R2 {found[best]:.2f})."
            )
        else:
            lines.append(f"The {WORDS[kind]} of {name} are partly in {best} (R2 {found[best]:.2f}), partly their own.")
    return lines


def _figures(found: Mapping[str, float]) -> str:
    return " and ".join(f"{value:.2f} of the variance of its {WORDS[kind]}" for kind, value in found.items())


def _distances(pairs: Rows) -> list[str]:
    lines = []
    for kind in dict.fromkeys(row["tokens"] for row in pairs):
        ordered = sorted((row for row in pairs if row["tokens"] == kind), key=lambda row: row["cka"])
        ends = [("closest", ordered[-1]), ("farthest apart", ordered[0])] if len(ordered) > 1 else []
        ends = ends or [("the only pair", ordered[0])]
        words = ", ".join(f"{end} {row['one']} and {row['other']} ({row['cka']:.2f})" for end, row in ends)
        lines.append(f"By CKA of {WORDS[kind]}: {words}.")
    return lines


def _scales(rows: Rows) -> list[str]:
    lines = []
    for row in rows:
        what = f"the {WORDS[row['tokens']]} of {row['teacher']}"
        if row["dead"]:
            lines.append(
                f"{row['dead']} of {row['width']} coordinates of {what} vary less than the floor of the statistics: "
                "training hardly sees them, or the teacher's scale is too small."
            )
        if row["std_ratio"] >= UNEQUAL:
            lines.append(
                f"One coordinate of {what} varies {row['std_ratio']:.0f} times as much as the median one: without "
                "statistics a few coordinates would rule its loss."
            )
        if row["participation"] <= FEW_DIRECTIONS * row["width"]:
            lines.append(
                f"Even normalised, the variance of {what} lies in about {row['participation']:.0f} directions of "
                f"{row['width']}."
            )
        if row["place_share"] >= BY_PLACE:
            lines.append(
                f"{row['place_share']:.0%} of the variance of {what} is the place alone, whatever the image: a student "
                "gets it without looking. CKA and R2 here are without it."
            )
    for kind in dict.fromkeys(row["tokens"] for row in rows):
        own = sorted((row for row in rows if row["tokens"] == kind), key=lambda row: row["std_median"])
        if own[-1]["std_median"] >= UNEQUAL * own[0]["std_median"]:
            ratio = own[-1]["std_median"] / max(own[0]["std_median"], np.finfo(np.float32).tiny)
            lines.append(
                f"The {WORDS[kind]} of {own[-1]['teacher']} are {ratio:.3g} times the size of those of "
                f"{own[0]['teacher']} (median standard deviation): an unnormalised smooth-L1 would not see the latter."
            )
    return lines


def _limits(rows: Rows, images: int, folds: int) -> list[str]:
    lines = []
    widths = [row["width"] for row in rows if row["tokens"] == "cls"]
    widest, fitted = max(widths, default=0), images * (folds - 1) // folds
    if len(widths) > 1 and fitted < 2 * widest:
        lines.append(
            f"Only {fitted} images to fit class tokens of up to {widest} coordinates: their R2 is lower than more "
            "images would give."
        )
    lines.append(
        f"Thresholds, chosen by judgement: adds little from R2 {ADDS_LITTLE}, hard to predict up to {HARD}, unequal "
        f"from a factor of {UNEQUAL:.0f}, by the place from {BY_PLACE:.0%}."
    )
    lines.append(
        "What this cannot tell: all of it is linear and of these images, while adapters are not linear and a student "
        "need not be; a teacher that is hard to predict may be noise as well as knowledge; whether a student has room "
        "for both, and which task would suffer, only training shows."
    )
    return lines


def figure(pairs: Rows, rows: Rows) -> np.ndarray:
    """A row a token kind: CKA, R2 (from row to column), scale spread, directions. uint8 RGB."""
    from matplotlib.figure import Figure  # late: only pictures need it

    kinds = list(dict.fromkeys(row["tokens"] for row in rows))
    count = max(len([row for row in rows if row["tokens"] == kind]) for kind in kinds)
    size = (4.2 + 2 * (2.2 + 0.75 * count) + 3.4, len(kinds) * (1.9 + 0.5 * count))
    panels = Figure(figsize=size, dpi=120, layout="constrained")
    grid = panels.subplots(len(kinds), 4, squeeze=False)
    for axes, kind in zip(grid, kinds, strict=True):
        own = [row for row in rows if row["tokens"] == kind]
        names, found = [row["teacher"] for row in own], [row for row in pairs if row["tokens"] == kind]
        if found:
            cka = {(r["one"], r["other"]): r["cka"] for r in found} | {(r["other"], r["one"]): r["cka"] for r in found}
            _heat(axes[0], np.array([[cka.get((a, b), 1.0) for b in names] for a in names]), names, names)
            r2 = {(a, b): value for (_, a, b), value in directed(found).items()}
            values, sources = [[r2.get((a, b), np.nan) for b in names] for a in names], list(names)
            if len(names) > 2:
                values.append([row["r2_from_all_others"] for row in own])
                sources.append("all others")
            _heat(axes[1], np.array(values), sources, names)
        else:
            for panel in axes[:2]:
                panel.text(0.5, 0.5, f"only {names[0]}\nhas {WORDS[kind]}", ha="center", va="center", fontsize=9)
                panel.set_axis_off()
        axes[0].set_title(f"{WORDS[kind]}: linear CKA", fontsize=10)
        axes[1].set_title("ridge R², row predicts column", fontsize=10)
        ratios = {row["std_ratio"]: f"{row['std_ratio']:.1f} (median {row['std_median']:.3g})" for row in own}
        _bars(axes[2], names, [row["std_ratio"] for row in own], ratios.get)
        axes[2].set_title("largest / median std of coordinates", fontsize=10)
        _bars(axes[3], names, [100 * row["participation"] / row["width"] for row in own], "{:.1f}%".format)
        axes[3].set_title("directions sharing the variance, % of width", fontsize=10)
    file = io.BytesIO()
    panels.savefig(file, format="png")
    return np.asarray(Image.open(file).convert("RGB"))


def _heat(axes, values: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> None:
    """A heat map from 0 to 1 with its values written in; what is not a number stays empty."""
    axes.imshow(np.clip(values, 0, 1), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        if np.isfinite(value):
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=9, color="w" if value > 0.55 else "k")
    axes.set_xticks(range(len(columns)), columns, fontsize=8, rotation=25, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _bars(axes, names: Sequence[str], values: Sequence[float], text: Callable[[float], str]) -> None:
    """Horizontal bars with their values beside them, the first at the top."""
    axes.barh(range(len(names)), values, color="#2f6f9f", height=0.2 * min(len(names), 3))
    for y, value in enumerate(values):
        axes.text(value, y, f" {text(value)}", va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.5 * max(values))
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right", "left"]].set_visible(False)
