"""The costs in docs/tutorial_pod.md are those of docs/plans/index.json, and their sums."""

import json
import re

from tests.docs.pages import ROOT, tables

PAGE = (ROOT / "docs" / "tutorial_pod.md").read_text()
PLANS = ROOT / "docs" / "plans"


def test_costs():
    index = json.loads((PLANS / "index.json").read_text())
    # What the columns of an index entry are called stands in the table that is made of them.
    ((header, _),) = [t for t in tables((PLANS / "README.md").read_text()) if t[0][0] == "recipe"]
    ((columns, rows),) = [t for t in tables(PAGE) if t[0][:2] == ["stage", "pod"]]
    assert columns == ["stage", "pod", "step", "days", "chip-hours", "report"]
    days, hours, seen = 0.0, 0, 0
    for stage, pod, step, row_days, row_hours, report in rows:
        if stage == "sum":
            assert (row_days, row_hours) == (f"{days:.1f}", f"{hours:,}"), f"the sum for {pod}"
            days, hours = 0.0, 0
            continue
        plan = dict(zip(header, index[re.search(r"\(plans/(.*)\)", report)[1]], strict=True))
        assert (pod, step, row_days, row_hours) == (plan["pod"], plan["step"], plan["days"], plan["chip-hours"]), stage
        assert plan["recipe"].startswith(f"[{stage.strip('`')}]")
        assert plan["problems"] == "none"
        days, hours, seen = days + float(row_days), hours + int(row_hours.replace(",", "")), seen + 1
    assert seen and not hours, "the last rows have no sum"


def test_no_other_costs_are_typed():
    text = "\n".join(line for line in PAGE.splitlines() if not line.startswith("|"))
    assert not re.search(r"\d[\d,.]* ?(chip-hours|TPU-hours|days|\$|USD)", text)
