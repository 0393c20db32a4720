"""The benchmarks of the data pipeline run, write the figures they promise, and refuse what makes no sense."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(name, *flags):
    """A run of its own, as a user starts it."""
    command = [sys.executable, BENCHMARKS / f"{name}.py", *map(str, flags)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    ("name", "flag"),
    [("loader", "--batches=0"), ("loader", "--rounds=0"), ("loader", "--size=-1"), ("data_pipeline", "--rounds=0")],
)
def test_figures_of_nothing_are_refused(name, flag, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    monkeypatch.setattr(sys, "argv", [name, flag, f"--json={tmp_path}/new/figures.json"])
    with pytest.raises(SystemExit, match=f"^error: {flag.split('=')[0]} must be positive, got {flag.split('=')[1]}$"):
        benchmark.main()
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_loader_benchmark_writes_its_figures(tmp_path):
    result = run("loader", "--batches=120", "--rounds=1", f"--json={tmp_path}/new/figures.json")
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "new" / "figures.json").read_text())
    assert figures["bars_met"] and figures["records"] > 1.7e9
    assert len(figures["startup_seconds"]) == 4 and all(0 < s < 5 for s in figures["startup_seconds"].values())
    assert [m["workers"] for m in figures["memory"]] == [0, 2]


@pytest.mark.slow
def test_the_pipeline_benchmark_writes_its_figures(tmp_path):
    (tmp_path / "images").mkdir()
    y, x = np.mgrid[:375, :500]
    for i in range(4):
        pixels = np.stack([x // 2 + i, y // 2, 128 + 90 * np.sin(x * y / 900)], -1).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.jpg")
    figures = tmp_path / "new" / "figures.json"
    result = run("data_pipeline", "--images", tmp_path / "images", "--rounds=1", "--batch=1", "--json", figures)
    assert result.returncode == 0, result.stderr
    found = json.loads(figures.read_text())
    assert found["ratio_full"] > 1 and found["ratio_equal_work"] > 0 and found["device_augment_fraction"] > 0
    assert found["sets"]["images"]["files"] == 4
