"""The costs in docs/tutorial_pod.md are those of docs/plans/index.json, and their sums."""

import json
import re

from tests.docs.pages import ROOT, tables

PAGE = (ROOT / "docs" / "tutorial_pod.md").read_text()
PLANS = ROOT / "docs" / "plans"


def wanted(rows):
    """The rows as they should be: figures out of the index, for the plans that the rows link to."""
    index = json.loads((PLANS / "index.json").read_text())
    # What the columns of an index entry are called stands in the table that is made of them.
    ((header, _),) = [t for t in tables((PLANS / "README.md").read_text()) if t[0][0] == "recipe"]
    days, hours = 0.0, 0
    for stage, pod, *_, report in rows:
        if stage == "sum":
            yield ["sum", pod, "", f"{days:.1f}", f"{hours:,}", ""]
            days, hours = 0.0, 0
            continue
        plan = dict(zip(header, index[re.search(r"\(plans/(.*)\)", report)[1]], strict=True))
        assert plan["problems"] == "none", f"{report} has problems: {plan['problems']}"
        assert plan["recipe"].startswith(f"[{stage.strip('`')}]"), f"{stage} links to {report}"
        yield [stage, plan["pod"], plan["step"], plan["days"], plan["chip-hours"], report]
        days, hours = days + float(plan["days"]), hours + int(plan["chip-hours"].replace(",", ""))
    assert not hours, "the last rows have no sum"


def test_costs():
    ((columns, rows),) = [t for t in tables(PAGE) if t[0][:2] == ["stage", "pod"]]
    assert columns == ["stage", "pod", "step", "days", "chip-hours", "report"] and rows
    right = list(wanted(rows))
    table = "\n".join("| " + " | ".join(row) + " |" for row in right)
    assert rows == right, f"the plans say otherwise; put this into docs/tutorial_pod.md:\n{table}"


def test_no_other_costs_are_typed():
    text = "\n".join(line for line in PAGE.splitlines() if not line.startswith("|"))
    assert not re.search(r"\d[\d,.]* ?(chip-hours|TPU-hours|days)|[$€] ?\d", text)
