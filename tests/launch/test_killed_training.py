"""launch/train.py killed at any moment and run again: parameters and metrics of a run that was never killed."""

import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from eupe_jax.training import checkpoints
from eupe_jax.training.checkpoints import Checkpoints
from eupe_jax.training.loop import train
from eupe_jax.training.measure import measure_statistics
from tests.data.test_loader import session_is_alive
from tests.launch.test_commands import ROOT
from tests.training.conftest import tiny_config

pytestmark = pytest.mark.slow
KILLS = 10
FIELDS = ("total_steps=80", "checkpoint.save_every=4", "data.workers=1", "data.threads=1")


def start(workdir, cache):
    """A run of its own session, which keeps compiled programs in `cache`."""
    flags = [f"--workdir={workdir}", f"--compilation_cache={cache}", *(f"--config.{field}" for field in FIELDS)]
    return subprocess.Popen(
        [sys.executable, "launch/train.py", "--config=configs/stage2_vitt.py:runlocal", *flags],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(workdir, cache):
    process = start(workdir, cache)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors.decode()


def arrays(workdir):
    """Everything in the last checkpoint: backbone, adapters, optimizer, statistics."""
    step = checkpoints.step_directory(workdir)
    assert step.name == "80"
    items = sorted(path.name for path in step.iterdir() if path.is_dir() and path.name != checkpoints.MANIFEST)
    assert items == ["statistics", "vitt.adapters", "vitt.backbone", "vitt.optimizer"]
    with ocp.PyTreeCheckpointer() as reader:
        trees = {item: reader.restore(step / item) for item in items}
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(trees)}


def kill_at_a_random_moment(workdir, cache, moments, startup):
    """(lines of metrics left, whether it was killed). Anywhere in the start, or while it trains."""
    metrics, saved = workdir / "metrics.jsonl", newest(workdir)
    began = time.time()
    process = start(workdir, cache)
    if moments.random() < 0.3:
        time.sleep(moments.uniform(0, startup))
    else:
        while process.poll() is None and not (written_since(metrics, began) and lines_of(metrics) > saved):
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 3))
    process.kill()
    killed = process.wait() == -signal.SIGKILL
    process.stderr.close()
    while session_is_alive(process.pid):
        time.sleep(0.05)  # its data worker
    return lines_of(metrics), killed


def newest(workdir):
    """Step of the newest checkpoint, which a run goes on from."""
    return max((int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdigit()), default=0)


def written_since(path, when):
    return path.exists() and path.stat().st_mtime > when


def lines_of(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_ten_kills_at_random_moments(tmp_path):
    whole, cache = tmp_path / "whole", tmp_path / "cache"
    finish(whole, cache)
    expected, lines = arrays(whole), (whole / "metrics.jsonl").read_text()
    assert len(lines.splitlines()) == 80
    moments, runs, kills = random.Random(0), [tmp_path / "run0"], []
    while sum(killed for _, killed in kills) < KILLS:
        kills.append(kill_at_a_random_moment(runs[-1], cache, moments, startup=10))
        if not kills[-1][1]:  # it was done before: begin another
            runs.append(tmp_path / f"run{len(runs)}")
    print("lines written, killed?:", kills)
    assert sum(0 < written < 80 for written, _ in kills) >= 3
    for run in runs:
        finish(run, cache)
        assert (run / "metrics.jsonl").read_text() == lines
        found = arrays(run)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=f"{run.name}: {name}")


def test_a_kill_right_after_a_save_loses_no_line(tmp_path, monkeypatch):
    """The step that is saved has been logged: its metrics are not in the checkpoint."""
    config = tiny_config(steps=4)
    config.statistics = str(tmp_path / "statistics")
    measure_statistics(config, config.statistics)
    train(config, tmp_path / "whole")
    save = Checkpoints.save

    def killed(self, step, *args, **kwargs):
        save(self, step, *args, **kwargs)
        self.wait()
        if step == 2:
            raise RuntimeError("killed")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(Checkpoints, "save", killed)
        train(config, tmp_path / "run")
    assert newest(tmp_path / "run") == 2
    train(config, tmp_path / "run")
    whole, resumed = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "run"))
    assert resumed == whole
