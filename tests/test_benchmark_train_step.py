"""The benchmark of the training step compares steps that are the same, and writes the figures it promises."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from benchmarks import train_step as benchmark  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture
def one_thread():
    """Threads that wait for each other by spinning cost more than a tiny step."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_recipe():
    return benchmark.recipe("eupe_vitt16", 4, 32, 16, **TINY)


def test_the_same_step_in_both_and_another_one_is_noticed(one_thread):
    config = tiny_recipe()
    steps = benchmark.contenders(config, compile=False)
    steps["clipped"] = benchmark.TorchStep(config, steps["jax"], steps["torch_eager"].images, compile=False)
    steps["clipped"].clip_norm = 1e-9
    # jax and torch_eager come first: they agreed on all three steps, so on what the optimiser did in two of them
    with pytest.raises(ValueError, match=r"^losses of clipped \[.*\] and of jax \[.*\] differ by more than 0\.0001$"):
        benchmark.check(steps)
    times = benchmark.measure({name: steps[name] for name in ("jax", "torch_eager")}, rounds=2)
    assert [len(t["wall"]) for t in times.values()] == [2, 2]
    figures = benchmark.summarise(times, batch=4)
    quotient = figures["jax_images_per_s"] / figures["torch_eager_images_per_s"]
    assert figures["ratio"] == pytest.approx(quotient, rel=0.01)


def test_losses_of_three_steps_are_compared():
    def steps(last):
        return {name: iter(losses).__next__ for name, losses in (("jax", [3.0, 2.0, 1.0]), ("torch", [3.0, 2.0, last]))}

    assert benchmark.check(steps(1.00005))["torch"] == [3.0, 2.0, 1.00005]
    with pytest.raises(ValueError, match="losses of torch"):
        benchmark.check(steps(1.0002))


def test_the_ratio_is_to_the_faster_one():
    seconds = {"jax": [2.0, 1.0, 9.0], "torch_eager": [4.0, 4.0, 4.0], "torch_compile": [3.0, 3.0, 1.0]}
    times = {name: {"wall": s, "cpu": [2 * x for x in s]} for name, s in seconds.items()}
    figures = benchmark.summarise(times, batch=8)
    assert figures["jax_images_per_s"] == 4 and figures["torch_eager_images_per_s"] == 2
    assert figures["torch_compile_images_per_s"] == 2.667 and figures["ratio"] == figures["ratio_cpu_time"] == 1.5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rounds=0"], "--rounds must be positive, got 0"),
        (["--students", "eupe_vit"], "no encoder is called"),
        (["--students", "eupe_convnext_tiny"], "of the family 'convnext'"),
    ],
)
def test_wrong_flags_are_one_line(flags, message, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_step", *flags, f"--json={tmp_path}/new/figures.json"])
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        benchmark.main()
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_a_run_writes_its_figures(tmp_path):
    file = tmp_path / "new" / "figures.json"
    flags = ["--students=eupe_vitt16", "--batch=2", "--side=32", "--rounds=1", f"--json={file}"]
    command = [sys.executable, ROOT / "benchmarks" / "train_step.py", *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    figures = json.loads(file.read_text())
    for name in ("jax_images_per_s", "torch_eager_images_per_s", "torch_compile_images_per_s", "ratio"):
        assert figures[name] == figures["students"]["eupe_vitt16"][name] > 0
    assert (figures["student"], figures["platform"]) == ("eupe_vitt16", "cpu")
    assert len(figures["students"]["eupe_vitt16"]["losses"]["torch_compile"]) == 3
