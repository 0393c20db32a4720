"""The quickstart's report: one HTML file without scripts or outside resources, for screens, phones and paper.

What it says about learning is computed in `quickstart_verdict`. Here are tables and pictures; words that never change
are in the template.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from PIL import Image

from eupe_jax.files import write_whole
from launch import quickstart_figures as figures
from launch.quickstart_verdict import (
    CLEAR_MARGIN,
    CONTROLS,
    NONE,
    ROWS,
    best_control,
    cosine,
    duration,
    judge,
    title_of,
    total,
    verdict,
    what_ran,
)

TEMPLATES = Path(__file__).parent / "templates"

KINDS = {"patches": "patch tokens", "cls": "class token"}
STAGES = {
    "stage1": "Stage 1: experts to proxy",
    "stage2": "Stage 2: proxy to student",
    "stage3": "Stage 3: student at several scales",
    "shuffled": "Control: stage 2 on shuffled targets",
}
PARITY = {"flax_vs_torch": "Flax and PyTorch", "torch_vs_pte": "PyTorch and the .pte in ExecuTorch"}
LABELS = {
    "batch_size": "batch", "images_per_second": "images/s", "learning_rate": "learning rate",
    "student_resolutions": "student px", "resolutions": "px", "latency_ms": "latency, ms", "megabytes": "size, MB",
    "share_of_flops": "share of operations in the delegate",
    "nodes_outside": "nodes outside the delegate", "resolution": "resolution, px", "cls_dim": "class width",
    "patch_dim": "patch width", "what": "what it is", "max_abs": "largest difference", "title": "expert",
}  # fmt: skip


class Cell(NamedTuple):
    text: str
    mark: str = ""  # CSS class


class Table(NamedTuple):
    head: list[str]
    rows: list[list[Cell]]


def show(value) -> str:
    """A value as a reader wants it: three figures of a float, "–" for what is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        size = abs(value)
        if value == 0 or 0.001 <= size < 10:
            return f"{value:.3g}"
        return f"{value:,.1f}" if 10 <= size < 1e6 else f"{value:.1e}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={show(v)}" for k, v in value.items()) or NONE
    if isinstance(value, (list, tuple)):
        return ", ".join(show(v) for v in value) or NONE
    return str(value)


# ---------------------------------------------------------------- tables


def _labelled(key: str) -> str:
    return LABELS.get(key, key.replace("_", " "))


def mapping_table(entries: Mapping[str, Mapping], first: str, names: Mapping[str, str] | None = None) -> Table | None:
    """One row per entry, one column per key that any entry has."""
    if not entries:
        return None
    keys = list(dict.fromkeys(key for entry in entries.values() for key in entry))
    rows = [[Cell((names or {}).get(n, n))] + [Cell(show(e.get(k))) for k in keys] for n, e in entries.items()]
    return Table([first, *map(_labelled, keys)], rows)


def pairs_table(entries: Mapping | None) -> Table | None:
    return Table([], [[Cell(_labelled(k)), Cell(show(v))] for k, v in entries.items()]) if entries else None


def _score_table(rows: Mapping[str, Mapping], columns: Mapping[tuple, str]) -> Table:
    """Rows of ROWS against columns {path into a row: heading}; the best control of every column is marked."""

    def value(row: str, path: Sequence[str]):
        found = rows.get(row, {})
        for key in path:
            found = found.get(key, {})
        return None if isinstance(found, Mapping) else found

    best = {}
    for path in columns:
        scores = {r: v for r in CONTROLS if (v := value(r, path)) is not None and math.isfinite(v)}
        best[path] = max(scores, key=scores.get) if scores else None
    present = [row for row in ROWS if rows.get(row)]
    cells = [
        [Cell(ROWS[row]), *(Cell(cosine(value(row, p)), "best" if best[p] == row else "") for p in columns)]
        for row in present
    ]
    return Table(["", *columns.values()], cells)


def _heldout_note(summary: Mapping, name: str) -> str:
    entry = summary.get("images", {}).get("heldout", {}).get(name, {})
    count = f"{entry['count']:,} images" if "count" in entry else ""
    return ": ".join(part for part in (count, entry.get("what", "")) if part)


def _agreement(summary: Mapping) -> list[dict]:
    sections = []
    for heldout, rows in (summary.get("agreement") or {}).items():
        experts = list(dict.fromkeys(e for row in rows.values() for e in row))
        has = lambda e, kind, rows=rows: any(kind in row.get(e, {}) for row in rows.values())  # noqa: E731
        columns = {(e, k): f"{title_of(summary, e)}, {KINDS[k]}" for e in experts for k in KINDS if has(e, k)}
        charts = []
        for kind, words in KINDS.items():
            groups = {
                title_of(summary, e): {
                    row: s[e][kind] for row in ROWS if kind in (s := rows.get(row, {})).get(e, {})
                }
                for e in experts if has(e, kind)
            }  # fmt: skip
            if groups:
                charts.append({
                    "picture": figures.bars(groups, ROWS, CONTROLS),
                    "title": words.capitalize(),
                    "alt": f"Bar chart of the cosines in the table, {words}, {heldout}",
                })  # fmt: skip
        scales = (summary.get("student_by_resolution") or {}).get(heldout, {})
        at = [[Cell(f"{px} px"), *(Cell(cosine(s.get(e, {}).get(k))) for e, k in columns)] for px, s in scales.items()]
        sections.append({
            "name": heldout,
            "note": _heldout_note(summary, heldout),
            "table": _score_table(rows, columns),
            "charts": charts,
            "scales": Table(["the student at", *columns.values()], at) if at else None,
        })  # fmt: skip
    return sections


def _readout(summary: Mapping) -> list[dict]:
    sections = []
    for heldout, rows in (summary.get("readout") or {}).items():
        experts = list(dict.fromkeys(e for row in rows.values() for e in row))
        table = _score_table(rows, {(e,): title_of(summary, e) for e in experts})
        said = []
        for e in experts:
            controls = {r: rows[r][e] for r in CONTROLS if e in rows.get(r, {})}
            if controls and e in rows.get("student", {}):
                best = best_control(controls)
                margin = rows["student"][e] - controls[best]
                words = {
                    "learned": f"{margin:.3f} above", "slight": f"slightly above ({margin:.3f})",
                    "none": f"not above ({margin:+.3f})", "unknown": "not comparable with",
                }[judge(margin)]  # fmt: skip
                said.append(f"{title_of(summary, e)}: the student is {words} the best control, {ROWS[best].lower()}.")
        sections.append({"name": heldout, "note": _heldout_note(summary, heldout), "table": table, "said": said})
    return sections


def _parity(summary: Mapping) -> Table | None:
    parts = summary.get("parity") or {}
    rows = []
    for name, entry in parts.items():
        similar = entry.get("cosine")
        difference = f"{entry['max_abs']:.1e}" if "max_abs" in entry else NONE
        similarity = NONE if similar is None else f"{similar:.7f}"
        rows.append([Cell(PARITY.get(name, name)), Cell(difference), Cell(similarity)])
    return Table(["between", "largest difference", "cosine"], rows) if rows else None


def _small(summary: Mapping) -> Table | None:
    rows = [[Cell(show(row.get(k))) for k in ("what", "here", "full")] for row in summary.get("small") or []]
    return Table(["what", "here", "a full run"], rows) if rows else None


def _seconds(summary: Mapping) -> list[dict]:
    seconds = summary.get("seconds") or {}
    parts = {k: v for k, v in seconds.items() if k != "total"}
    longest = max(parts.values(), default=0) or 1
    bars = [{"part": k, "text": duration(v), "percent": round(100 * v / longest, 1)} for k, v in parts.items()]
    return [*bars, {"part": "total", "text": duration(total(seconds)), "percent": 0}] if bars else []


def _models(summary: Mapping) -> Table | None:
    models = {
        name: dict(m) | ({"parameters": f"{m['parameters'] / 1e6:.1f} million"} if "parameters" in m else {})
        for name, m in (summary.get("models") or {}).items()
    }
    return mapping_table(models, "")


# ---------------------------------------------------------------- pictures


def _panel_grid(panels: Mapping[str, np.ndarray]) -> dict | None:
    """{"titles": [C], "rows": [N][C] PNG data URIs} from columns of [N, S, S, 3], bytes or floats in [0, 1]."""
    if not panels:
        return None
    columns, counts = [], {}
    for title, images in panels.items():
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"panels[{title!r}]: expected [N, S, S, 3], got {images.shape}")
        if images.dtype != np.uint8:
            images = np.round(np.clip(np.nan_to_num(images), 0, 1) * 255).astype(np.uint8)
        columns.append([_png(x) for x in images])
        counts[title] = len(images)
    if len(set(counts.values())) > 1:
        raise ValueError(f"panels: every column needs the same number of rows, got {counts}")
    return {"titles": list(panels), "rows": list(zip(*columns, strict=True))}


def _png(image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def write_report(out: Path, summary: dict, curves: Mapping[str, list[dict]], panels: Mapping[str, np.ndarray]) -> Path:
    """Writes `out`/report.html under a temporary name, then renames it.

    Args:
      summary: what summary.json holds; every part is optional, and its section is left out where it is missing.
      curves: {"stage1" | "stage2" | "stage3" | "shuffled": lines of metrics.jsonl}.
      panels: {column title: [N, S, S, 3] uint8, or floats in [0, 1]}, columns from left to right.

    Raises:
      ValueError: a panel of another shape, or columns of different length.
    """
    plots = [
        {"title": STAGES.get(stage, stage), "picture": picture}
        for stage, lines in curves.items()
        if (picture := figures.loss_curves(lines))
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["show"] = show
    html = environment.get_template("report.html.j2").render(
        what_ran=what_ran(summary),
        verdict=verdict(summary),
        clear_margin=CLEAR_MARGIN,
        agreement=_agreement(summary),
        agreement_resolution=summary.get("agreement_resolution"),
        readout=_readout(summary),
        plots=plots,
        panels=_panel_grid(panels),
        parity=_parity(summary),
        pte=pairs_table(summary.get("pte")),
        images=summary.get("images") or {},
        experts=mapping_table(summary.get("experts") or {}, "name"),
        models=_models(summary),
        stages=mapping_table(summary.get("stages") or {}, "stage", STAGES),
        small=_small(summary),
        seconds=_seconds(summary),
        commands=summary.get("commands") or [],
        versions=pairs_table(summary.get("versions")),
        machine=pairs_table(summary.get("machine")),
        has_summary=(out / "summary.json").is_file(),
    )
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "report.html", html)
    return out / "report.html"
