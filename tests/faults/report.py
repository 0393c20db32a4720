"""What the fault suite counted: records of its tests -> runs/faults/summary.json -> the table in docs/reliability.md.

python -m tests.faults.report    # the table again, from the summary that is there
"""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUMMARY = ROOT / "runs" / "faults" / "summary.json"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- table of faults: begin -->", "<!-- table of faults: end -->"

INJECTED = "injected"
GOOD = ("detected", "recovered")  # of those injected
BAD = ("lost", "accepted")  # lost for good; accepted silently
WORST = "worst_"  # counts named so are maxima, all others are sums


@dataclass(frozen=True)
class Bar:
    """What a kind of fault must show: so many injected, in so many places, each worst figure at most so large."""

    injected: int = 1
    places: int = 1
    worst: float | None = None

    def __str__(self) -> str:
        parts = [f">= {self.injected} injected"] if self.injected > 1 else []
        parts += [f">= {self.places} places"] if self.places > 1 else []
        parts += ["all detected or recovered, 0 lost, 0 accepted"]
        parts += [f"difference <= {self.worst:g}"] if self.worst is not None else []
        return ", ".join(parts)

    def unmet(self, kind: str, places: Mapping[str, Mapping[str, float]]) -> list[str]:
        """In words, what is missing."""
        found = []
        injected = sum(counts.get(INJECTED, 0) for counts in places.values())
        if injected < self.injected:
            found.append(f"{kind}: {injected:g} injected, not {self.injected}")
        if len(places) < self.places:
            found.append(f"{kind}: in {len(places)} places, not {self.places}")
        for place, counts in places.items():
            if (good := sum(counts.get(name, 0) for name in GOOD)) != counts.get(INJECTED, 0):
                found.append(f"{kind}, {place}: {good:g} of {counts.get(INJECTED, 0):g} detected or recovered")
            found += [f"{kind}, {place}: {counts[bad]:g} {bad}" for bad in BAD if counts.get(bad)]
            for name, value in counts.items():
                if name.startswith(WORST) and self.worst is not None and not value <= self.worst:
                    found.append(f"{kind}, {place}: {name} {value:g} > {self.worst:g}")
        return found


# All kinds there are: one that is not recorded, as where its test was skipped, is not met.
BARS = {
    "kill -9": Bar(injected=40, places=5),
    "corrupted checkpoint": Bar(injected=100),
    "SIGTERM": Bar(injected=6, places=6),
    "other number of devices": Bar(injected=3, worst=1e-5),
    "other number of processes": Bar(injected=2, worst=1e-5),
    "not a number": Bar(injected=20, places=10),
    "silent divergence": Bar(injected=2),
    "lost process": Bar(injected=5, places=4),
    "frozen process": Bar(injected=3, places=3),
    "dead data worker": Bar(injected=3),
    "stuck data worker": Bar(),
    "dead host teacher": Bar(),
    "feature cache breaks under a run": Bar(injected=2, places=2),
    "damaged shard of features": Bar(),
    "full disk": Bar(injected=5, places=4),
    "read-only folder": Bar(),
    "permission lost": Bar(injected=2, places=2),
    "clock jumps": Bar(injected=2, places=2),
    "compiled program cut short": Bar(),
}


def append(folder: Path, kind: str, phase: str, counts: Mapping[str, float]) -> None:
    """Appends to the records of this process.

    Raises:
      ValueError: counts that the table does not show.
    """
    wrong = [name for name in counts if name not in (INJECTED, *GOOD, *BAD) and not name.startswith(WORST)]
    if wrong or INJECTED not in counts:
        raise ValueError(f"{kind}: counts are {INJECTED}, {', '.join(GOOD + BAD)} and {WORST}*, got {sorted(counts)}")
    with open(folder / f"{os.getpid()}.jsonl", "a") as file:
        file.write(json.dumps({"kind": kind, "phase": phase, "counts": dict(counts)}) + "\n")


def collect(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """{kind: {phase: counts}} of all records in a folder."""
    faults: dict[str, dict[str, dict[str, float]]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for entry in map(json.loads, path.read_text().splitlines()):
            held = faults.setdefault(entry["kind"], {}).setdefault(entry["phase"], {})
            for name, value in entry["counts"].items():
                held[name] = max(held.get(name, value), value) if name.startswith(WORST) else held.get(name, 0) + value
    return faults


def unmet(faults: Mapping) -> list[str]:
    """The bars that are not met, in words."""
    missing = [f"{kind}: not injected at all" for kind in BARS if kind not in faults]
    return missing + [words for kind in faults for words in BARS.get(kind, Bar()).unmet(kind, faults[kind])]


def table(summary: Mapping) -> str:
    """Markdown."""
    faults = summary["faults"]
    kinds = [kind for kind in BARS if kind in faults] + sorted(faults.keys() - BARS.keys())
    lines = [
        "| fault | where | injected | detected or recovered | lost or accepted silently | largest difference | bar |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for kind in kinds:
        for phase, counts in sorted(faults[kind].items()):
            good, bad = (sum(counts.get(name, 0) for name in names) for names in (GOOD, BAD))
            worst = [value for name, value in counts.items() if name.startswith(WORST)]
            shown = f"{max(worst):.2g}" if worst else ""
            bar = str(BARS.get(kind, Bar()))
            lines.append(f"| {kind} | {phase} | {counts[INJECTED]:g} | {good:g} | {bad:g} | {shown} | {bar} |")
    verdict = "all tests passed" if summary["passed"] else "**NOT all tests passed**"
    lines += ["", f"{summary['date']}, commit {summary['commit'] or 'unknown'}, `{summary['command']}`: "
              f"{summary['seconds'] / 60:.0f} minutes, {verdict}."]  # fmt: skip
    return "\n".join(lines)


def write_table(summary: Mapping, page: Path = PAGE) -> None:
    """Puts the table between the two marks of the page.

    Raises:
      ValueError: the page has no such marks.
    """
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has no lines {BEGIN!r} and {END!r}: put them where the table belongs")
    page.write_text(f"{before}{BEGIN}\n{table(summary)}\n{END}{after}")


if __name__ == "__main__":
    if not SUMMARY.exists():
        sys.exit(f"error: {SUMMARY} is not there: run `make faults` first")
    write_table(json.loads(SUMMARY.read_text()))
