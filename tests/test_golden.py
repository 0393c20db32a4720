"""Every fixture of the golden folder, and our own, through the check of its kind.

The folder is named by EUPE_GOLDEN_DIR (default ../shared/golden beside the repository). Files are recognised by
content, so fixtures of other sizes and seeds run through the same checks.
"""

import os
from pathlib import Path

import pytest

from tests.golden_kinds import dispatch

ROOT = Path(__file__).resolve().parent.parent
GOLDEN_DIR = Path(os.environ.get("EUPE_GOLDEN_DIR", ROOT.parent / "shared" / "golden"))
OWN_DIR = ROOT / "tests" / "fixtures"
NOT_FIXTURES = {"README.md"}


def fixture_files(folder: Path) -> list[Path]:
    """The files of a folder that have to be fixtures."""
    return sorted(p for p in folder.iterdir() if p.is_file() and p.name not in NOT_FIXTURES)


def run_check(path: Path) -> None:
    """Checks one file; skips a kind that nothing checks yet; fails on an unknown kind."""
    kind = dispatch.classify(path)
    check = dispatch.handlers().get(kind)
    if check is None:
        pytest.skip(f"not built yet: {kind}")
    check(path)


def _golden_params():
    if not GOLDEN_DIR.is_dir():
        reason = f"no folder {GOLDEN_DIR}; set EUPE_GOLDEN_DIR"
        return [pytest.param(None, id="missing", marks=pytest.mark.skip(reason=reason))]
    return [pytest.param(path, id=path.name) for path in fixture_files(GOLDEN_DIR)]


@pytest.mark.golden
@pytest.mark.parametrize("path", _golden_params())
def test_golden(path):
    run_check(path)


@pytest.mark.parametrize("path", [pytest.param(p, id=p.name) for p in sorted(OWN_DIR.glob("*.npz"))])
def test_own_fixture(path):
    run_check(path)


def test_file_of_unknown_kind_fails(tmp_path):
    import numpy as np

    for content in ({"x": np.zeros(3)}, {"x": np.zeros(3), "meta": np.array('{"kind": "teapot"}')}):
        np.savez(tmp_path / "unknown.npz", **content)
        with pytest.raises(dispatch.UnknownKindError, match="unknown.npz"):
            run_check(tmp_path / "unknown.npz")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(dispatch.UnknownKindError, match="notes.txt"):
        run_check(tmp_path / "notes.txt")
