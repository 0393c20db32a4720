"""The table of faults says what was counted, and a bar that is not met is no success."""

import json
import re

import pytest

from tests.faults import report
from tests.faults.report import BEGIN, END


def recorded(folder, *records):
    for kind, phase, counts in records:
        report.append(folder, kind, phase, counts)
    return report.collect(folder)


def test_counts_are_summed_and_worst_figures_are_kept(tmp_path):
    (tmp_path / "another_worker.jsonl").write_text(
        json.dumps({"kind": "kill -9", "phase": "save", "counts": {"injected": 2, "recovered": 2, "lost": 0}}) + "\n"
    )
    faults = recorded(
        tmp_path,
        ("kill -9", "save", {"injected": 3, "recovered": 3, "lost": 0}),
        ("other number of devices", "8 -> 4", {"injected": 1, "worst_loss": 1e-7}),
        ("other number of devices", "8 -> 4", {"injected": 1, "worst_loss": 1e-8}),
    )
    assert faults["kill -9"] == {"save": {"injected": 5, "recovered": 5, "lost": 0}}
    assert faults["other number of devices"] == {"8 -> 4": {"injected": 2, "worst_loss": 1e-7}}


@pytest.mark.parametrize("counts", [{"injected": 1, "saved": 1}, {"recovered": 1}])
def test_counts_that_no_column_shows_are_refused(counts, tmp_path):
    with pytest.raises(ValueError, match="counts are injected, detected"):
        report.append(tmp_path, "kill -9", "save", counts)
    assert not list(tmp_path.iterdir())


def met():
    def counts(bar):
        return {"injected": bar.injected, "recovered": bar.injected, "lost": 0}

    return {kind: {f"place {i}": counts(bar) for i in range(bar.places)} for kind, bar in report.BARS.items()}


MOVED = {"injected": 3, "recovered": 3}


@pytest.mark.parametrize(
    ("kind", "phase", "counts", "words"),
    [
        ("kill -9", "place 0", {"injected": 99, "recovered": 99, "lost": 1}, "kill -9, place 0: 1 lost"),
        ("kill -9", "place 0", {"injected": 99, "recovered": 90, "detected": 8}, "98 of 99 detected or recovered"),
        ("corrupted checkpoint", "place 0", {"injected": 99, "detected": 99}, "99 injected, not 100"),
        ("corrupted checkpoint", "place 0", {"injected": 100, "detected": 100, "accepted": 1}, "1 accepted"),
        ("other number of devices", "place 0", MOVED | {"worst_loss": 2e-5}, "worst_loss 2e-05 > 1e-05"),
        ("other number of devices", "place 0", MOVED | {"worst_loss": float("nan")}, "worst_loss nan > 1e-05"),
        ("a kind without a bar of its own", "", {"injected": 1}, "0 of 1 detected or recovered"),
    ],
)
def test_bars(kind, phase, counts, words):
    faults = met()
    assert report.unmet(faults) == []
    faults.setdefault(kind, {})[phase] = counts
    (found,) = report.unmet(faults)
    assert words in found
    missing = {other: places for other, places in met().items() if other != "SIGTERM"}
    assert report.unmet(missing) == ["SIGTERM: not injected at all"]


def test_every_kind_that_is_recorded_has_a_bar_and_every_bar_a_test_that_records_it():
    text = "".join(path.read_text() for path in report.ROOT.glob("tests/faults/test_*.py"))
    kinds = set(re.findall(r'(?:record\(|KIND = )"([^"]+)"', text))
    kinds |= set(re.findall(r'signal\.SIG\w+: "([^"]+)"', text))  # kind = {signal: kind}[number]
    assert kinds == set(report.BARS)


def test_the_table_stands_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    faults = {"kill -9": {"save": {"injected": 5, "recovered": 5, "lost": 0}}}
    summary = {"faults": faults, "date": "2026-01-01", "commit": "", "command": "x", "seconds": 60, "passed": False}
    report.write_table(summary, page)
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n| fault |") and text.endswith(f"{END}\nafter\n") and "old" not in text
    assert "| kill -9 | save | 5 | 5 | 0 |" in text and "NOT all tests passed" in text
    page.write_text("no marks")
    with pytest.raises(ValueError, match="has no lines"):
        report.write_table(summary, page)
    assert page.read_text() == "no marks"


def test_the_page_shows_the_summary_that_lies_beside_it():
    if not report.SUMMARY.exists():
        pytest.skip("no summary: `make faults` writes it")
    assert report.table(json.loads(report.SUMMARY.read_text())) in report.PAGE.read_text()
