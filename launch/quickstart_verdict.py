"""What the quickstart may say about learning: computed from the controls, and never more than they allow."""

import math
from collections.abc import Iterable, Mapping

CLEAR_MARGIN = 0.05  # of cosine; a convention for this report, not a significance level
ONE_RUN = "One run with one seed is no evidence about the recipe: it shows that every part works, not what is best."
NONE = "–"  # for a value that is missing

ROWS = {
    "student": "Student",
    "proxy": "Proxy",
    "untrained": "Untrained student",
    "shuffled": "Shuffled targets",
    "position_map": "Position map",
}
CONTROLS = ("untrained", "shuffled", "position_map")


def cosine(value: float | None) -> str:
    return NONE if value is None or not math.isfinite(value) else f"{value:.3f}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def total(seconds: Mapping[str, float]) -> float:
    """The entry "total", or else the sum of the parts."""
    return seconds.get("total", sum(seconds.values()))


def listed(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def title_of(summary: Mapping, expert: str) -> str:
    return summary.get("experts", {}).get(expert, {}).get("title", expert)


def best_control(scores: Mapping[str, float]) -> str:
    """The control to beat. One that is not a number could have been the best: it wins, and nothing can be said."""
    return max(scores, key=lambda row: math.inf if math.isnan(scores[row]) else scores[row])


def margins_of(agreement: Mapping) -> dict:
    """The student's patch cosine less that of the best control: what summary["margins"] holds."""
    margins = {}
    for heldout, rows in agreement.items():
        for expert, scores in rows.get("student", {}).items():
            controls = {row: rows[row][expert]["patches"] for row in CONTROLS if expert in rows.get(row, {})}
            if controls and "patches" in scores:
                best = best_control(controls)
                entry = {"student": scores["patches"], "best_control": best, "best": controls[best]}
                entry["margin"] = entry["student"] - entry["best"]
                margins.setdefault(heldout, {})[expert] = entry
    return margins


def judge(margin: float) -> str:
    """One word: "learned" from CLEAR_MARGIN on, "slight" above zero, "none", or "unknown" where it is no number."""
    if not math.isfinite(margin):
        return "unknown"
    margin = round(margin, 6)  # 0.30 - 0.25 is a margin of 0.05
    return "learned" if margin >= CLEAR_MARGIN else "slight" if margin > 0 else "none"


def _comparison(entry: Mapping) -> tuple[str, str]:
    """(judgement, sentence) of one expert on one held-out set."""
    margin = entry["student"] - entry["best"]
    judged = judge(margin)
    control = f"the best control ({ROWS.get(entry['best_control'], entry['best_control']).lower()}, "
    control += f"{cosine(entry['best'])})"
    start = f"patch cosine {cosine(entry['student'])}, "
    sentence = {
        "learned": f"{margin:.3f} above {control}: it learned features that it was shown.",
        "slight": f"slightly above {control}, by {margin:.3f}: too little to call it learning.",
        "none": f"not above {control}: " + (f"{-margin:.3f} below it." if round(margin, 3) else "level with it."),
        "unknown": f"against {control}: not a number, so nothing can be said.",
    }
    return judged, start + sentence[judged]


def verdict(summary: Mapping) -> dict:
    """{"tone", "sentence", "details": [{"expert", "heldout", "judged", "text"}], "caveats": [str]} from the margins."""
    agreement = summary.get("agreement") or {}
    # The scores come first: they show a control that is missing or not a number.
    margins = margins_of(agreement) or summary.get("margins") or {}
    sets = summary.get("images", {}).get("heldout", {})
    details, values = [], []
    for heldout, experts in margins.items():
        for expert, entry in experts.items():
            judged, text = _comparison(entry)
            values.append(entry["student"] - entry["best"])
            details.append({"expert": title_of(summary, expert), "heldout": heldout, "judged": judged, "text": text})
    count = {key: sum(d["judged"] == key for d in details) for key in ("learned", "slight", "none", "unknown")}
    n = len(details)
    if not n:
        tone, sentence = "unknown", "Nothing was compared with a control, so nothing can be said about learning."
    elif count["learned"] == n:
        spread = f"{min(values):.3f}" if n == 1 else f"{min(values):.3f} to {max(values):.3f}"
        tone = "learned"
        sentence = (
            f"On held-out images the student has learned patch features that it was shown: {spread} of cosine above "
        )
        sentence += "the best control" + (" in its only comparison." if n == 1 else f" in all {n} comparisons.")
    elif count["unknown"] == n:
        tone, sentence = "unknown", "The held-out scores are not numbers, so nothing can be said about learning."
    elif count["none"] + count["unknown"] == n:
        tone, sentence = "none", "On held-out images the student is not above the best control in any comparison: "
        sentence += "this run shows no learning that carries over to other images."
    else:
        tone = "slight"
        parts = {
            "learned": f"above the best control by {CLEAR_MARGIN} or more in {count['learned']}",
            "slight": f"slightly above it in {count['slight']}",
            "none": f"not above it in {count['none']}",
            "unknown": f"without a number in {count['unknown']}",
        }
        said = listed(text for key, text in parts.items() if count[key])
        if not count["learned"]:
            said = said.replace("above it", "above the best control", 1)
        sentence = f"On held-out images, of {n} comparison{'s' if n > 1 else ''}, the student is {said}."
    caveats = [ONE_RUN]
    for heldout, rows in agreement.items():
        if absent := [ROWS[row].lower() for row in CONTROLS if not rows.get(row)]:
            caveats.append(f"On {heldout}, these controls are missing: {listed(absent)}. Margins there mean less.")
    few = [f"{name} ({s['count']})" for name, s in sets.items() if s.get("count", 1000) < 100 and name in margins]
    if few:
        caveats.append(f"Few held-out images: {listed(few)}. Other photographs would move these numbers.")
    return {"tone": tone, "sentence": sentence, "details": details, "caveats": caveats}


def what_ran(summary: Mapping) -> str:
    """One sentence of facts, of the parts that the summary holds: experts, models, stages, time, phone format."""
    experts = [title_of(summary, name) for name in summary.get("experts", {})]
    models = summary.get("models", {})
    stages = [s for s in summary.get("stages", {}) if s.startswith("stage")]

    def size(model: Mapping) -> str:
        return f" of {model['parameters'] / 1e6:.1f} million parameters" if "parameters" in model else ""

    text = listed(experts) + (" was" if len(experts) == 1 else " were") if experts else "The experts were"
    text += " distilled"
    if "proxy" in models:
        text += f" into a proxy{size(models['proxy'])}"
    if student := models.get("student"):
        text += ", and the proxy" if "proxy" in models else ""
        text += f" into {student.get('model', 'the student')}{size(student)}"
    if stages:
        text += f", in {len(stages)} stage" + "s" * (len(stages) > 1)
    text += "."
    if seconds := summary.get("seconds"):
        text += f" The whole run took {duration(total(seconds))}."
    if latency := summary.get("pte", {}).get("latency_ms"):
        text += f" The exported .pte takes {latency:.1f} ms an image in ExecuTorch on this machine."
    return text
