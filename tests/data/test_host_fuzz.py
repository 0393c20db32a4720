"""Damaged files of every format: an image or a counted, named reason; never a crash, a hang or a leak."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from eupe_jax.data.decode import REASONS


def run_fuzz(count: int, seed: int, seconds: float) -> dict:
    command = [sys.executable, "-W", "always", "-m", "tests.data.fuzz_images", f"--count={count}", f"--seed={seed}"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr  # Pillow has much to say about such files
    return json.loads(done.stdout)


def check_report(report: dict, count: int):
    fared = report["fared"]
    assert set(report["whole"].values()) == {"fine"}
    assert sum(fared.values()) == count and set(fared) <= {"fine", *REASONS}
    assert len(fared) >= 4  # the damages differ in what they do
    assert report["passes_agree"]
    assert report["reader"] == report["tally"]
    assert report["reader_reads"] == count + sum(report["tally"].values())
    assert report["slowest"][0] < 10
    assert report["resident_mb"][-1] < report["resident_mb"][0] + 30


def test_sixty_damaged_files():
    check_report(run_fuzz(60, seed=0, seconds=120), 60)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_six_hundred_damaged_files(seed):
    report = run_fuzz(600, seed, seconds=600)
    print(json.dumps(report))
    check_report(report, 600)
