"""What the tests of faults share: counts for the table of docs/reliability.md.

Faults are counted in every session. The summary and the table are written by a session of the whole suite alone
(`make faults`), so that they never mix what different states of the code did.
"""

import atexit
import contextlib
import datetime
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.faults import report

FOLDER = "EUPE_FAULTS_RECORDS"  # environment variable: the folder that all workers of a session append to
HERE = Path(__file__).resolve().parent
BEGAN, COUNTED = pytest.StashKey[float](), pytest.StashKey[dict]()


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="eupe_jax_faults_")
        config.stash[BEGAN] = time.time()


def folder() -> Path:
    """Where the workers of a session append to; of this worker alone where the session began above this folder, and
    its controller never read this file."""
    if FOLDER not in os.environ:
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="eupe_jax_faults_")
        atexit.register(shutil.rmtree, os.environ[FOLDER], ignore_errors=True)
    return Path(os.environ[FOLDER])


@pytest.fixture
def record():
    """`record("kill -9", phase="save", injected=5, recovered=5, lost=0)`: counts a fault, once it is asserted.

    Counts are `injected`, `detected` or `recovered`, `lost` or `accepted` (silently), summed over all tests of a
    session, and figures `worst_NAME`, of which the largest is kept.
    """

    def append(kind: str, phase: str = "", **counts: float) -> None:
        report.append(folder(), kind, phase, counts)

    return append


@pytest.fixture(scope="session")
def cache():
    """Folder of compiled programs, of all tests and workers of the session: nothing is compiled twice."""
    compiled = folder() / "compiled"
    compiled.mkdir(exist_ok=True)
    return compiled


def is_whole(config) -> bool:
    """Whether this session runs the fault suite, all of it."""
    named = {Path(os.path.abspath(config.invocation_params.dir / arg.split("::")[0])) for arg in config.args}
    chosen = config.option.markexpr == "faults" and not (config.option.keyword or config.option.collectonly)
    return chosen and named == {HERE} and not any("::" in arg for arg in config.args)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    config = session.config
    if hasattr(config, "workerinput"):
        return
    faults = report.collect(folder())
    shutil.rmtree(folder())
    config.stash[COUNTED] = faults
    if not is_whole(config):
        return
    missing = report.unmet(faults)
    if missing and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    summary = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "seconds": round(time.time() - config.stash[BEGAN]),
        "command": "make faults",
        "faults": faults,
        "unmet": missing,
        "passed": exitstatus == pytest.ExitCode.OK and not missing,
    }
    report.SUMMARY.parent.mkdir(parents=True, exist_ok=True)
    report.SUMMARY.write_text(json.dumps(summary, indent=1) + "\n")
    report.write_table(summary)


def pytest_terminal_summary(terminalreporter, config):
    faults = config.stash.get(COUNTED, {})
    if not faults:
        return
    terminalreporter.section("faults")
    for kind, places in faults.items():
        for place, counts in places.items():
            shown = ", ".join(f"{name} {value:g}" for name, value in counts.items())
            terminalreporter.write_line(f"{kind}, {place}: {shown}")
    if is_whole(config):
        for words in report.unmet(faults):
            terminalreporter.write_line(f"NOT MET: {words}", red=True)


def commit() -> str:
    """The commit that was tested, marked where files differ from it; "" outside a checkout."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(report.ROOT), "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return ""
