"""What makes a run's batches dies under it: one clear line within seconds, and nothing is lost."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from eupe_jax.data.feature_builder import build_feature_cache
from eupe_jax.data.host import HostConfig
from eupe_jax.data.sources import ArraySource
from eupe_jax.distill.teacher_spec import TeacherSpec
from tests.faults.commands import RECIPE, Command, assert_same_run, has_logged, logged_step

pytestmark = pytest.mark.faults
STEPS, KILLS = 40, 3
SECONDS = 60  # from the death to the end of the run: what is made ahead is trained on first

TEACHER = '''
"""A teacher that ends its thread at the call that FALL_OVER_AT names."""

import os
import sys

import numpy as np

from eupe_jax.distill.teacher_spec import TeacherSpec


class Cells:
    calls = 0

    def __init__(self, resolution):
        self.spec = TeacherSpec("cells", 3, 3, 8, resolution, (0.0,) * 3, (1.0,) * 3, "means of 8x8 cells")

    def __call__(self, images):
        self.calls += 1
        if str(self.calls) == os.environ.get("FALL_OVER_AT"):
            sys.exit(0)
        side = self.spec.resolution
        x = images[:, :side, :side].astype(np.float32) / 255
        b, n = len(x), side // 8
        return {"cls": x.mean((1, 2)), "patches": x.reshape(b, n, 8, n, 8, 3).mean((2, 4))}
'''

HOST_RECIPE = """
from configs import common, stage2_vitt


def get_config():
    config = stage2_vitt.get_config("runlocal")
    with config.unlocked():
        config.teachers = {"cells": common.host_teacher("cells_teacher:Cells", 32)}
        config.total_steps, config.checkpoint.save_every = 12, 4
    return config
"""


@pytest.fixture(name="command", scope="module")
def command_fixture(tmp_path_factory, cache):
    """command(*words, **environment): a real process, which may import what lies in `command.folder`."""
    folder = tmp_path_factory.mktemp("commands")

    def start(*words, **environment):
        return Command(words, folder / "log", cache, PYTHONPATH=str(folder), **environment)

    start.folder = folder
    return start


def train(workdir, workers=2):
    fields = {"total_steps": STEPS, "checkpoint.save_every": 8, "data.threads": 1, "data.workers": workers}
    return ("launch/train.py", RECIPE, f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in fields.items()))


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The folder of a run that nothing happens to."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    command(*train(workdir, workers=0)).succeed()
    return workdir


def data_workers(command):
    """Ids of the data workers of a run."""
    found = []
    for task in Path(f"/proc/{command.process.pid}/task").iterdir():
        with contextlib.suppress(OSError):
            for child in (task / "children").read_text().split():
                if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
                    found.append(int(child))
    return sorted(found)


def error_line(command):
    (line,) = [line for line in command.printed.splitlines() if line.startswith("error:")]
    assert "Traceback" not in command.printed
    return line


def test_killed_workers_end_the_run_with_a_clear_line_and_lose_nothing(command, whole, tmp_path, record):
    workdir, moments = tmp_path / "run", random.Random(0)
    for kill in range(KILLS):
        run, steps = command(*train(workdir)), 8 + 10 * kill
        assert run.wait_for(lambda steps=steps, run=run: has_logged(run, workdir, steps)), run.printed
        time.sleep(moments.uniform(0, 0.1))
        workers, began = data_workers(run), time.time()
        victim = moments.choice(workers)
        os.kill(victim, signal.SIGKILL)
        assert run.end(SECONDS) == 2 and len(workers) == 2, run.printed
        print(f"the run ended {time.time() - began:.1f} s after its worker")
        line = error_line(run)
        assert f"a data worker (process {victim}, one of data.workers=2) was killed by SIGKILL" in line
        assert "The same command resumes" in line
    command(*train(workdir)).succeed()
    assert_same_run(workdir, whole)
    record("dead data worker", phase="kill -9", injected=KILLS, detected=KILLS, lost=0)


def test_a_stuck_worker_is_reported_and_the_run_goes_on_with_it(command, whole, tmp_path, record):
    workdir = tmp_path / "run"
    run = command(*train(workdir, workers=1))
    assert run.wait_for(lambda: has_logged(run, workdir, 12)), run.printed
    (worker,) = data_workers(run)
    os.kill(worker, signal.SIGSTOP)
    try:
        assert run.wait_for(lambda: "so far, the median is" in run.printed, SECONDS), run.printed
    finally:
        os.kill(worker, signal.SIGCONT)
    printed = run.succeed()
    main = printed.partition("-- MainThread")[2].partition("\n-- ")[0]
    assert "in _next_part" in main, printed  # what the run waits for
    of_worker = printed.partition(f"what worker process {worker} is doing")[2]
    assert "-- MainThread" in of_worker and "-- end_with_parent" in of_worker, printed
    assert " is over, after " in printed
    assert_same_run(workdir, whole)
    record("stuck data worker", phase="SIGSTOP", injected=1, detected=1, lost=0)


def test_a_host_teacher_that_dies_is_named_and_nothing_is_lost(command, tmp_path, record):
    (command.folder / "cells_teacher.py").write_text(TEACHER)
    recipe = tmp_path / "cells.py"
    recipe.write_text(HOST_RECIPE)
    whole, workdir, statistics = tmp_path / "whole", tmp_path / "run", tmp_path / "statistics"
    command("launch/measure_statistics.py", f"--config={recipe}", f"--out={statistics}").succeed()
    words = ("launch/train.py", f"--config={recipe}", f"--config.statistics={statistics}")
    command(*words, f"--workdir={whole}").succeed()
    run = command(*words, f"--workdir={workdir}", FALL_OVER_AT="9")
    assert run.end() == 2, run.printed
    assert "host teacher 'cells' failed: SystemExit: 0" in error_line(run)
    assert 4 <= logged_step(workdir) < 12
    command(*words, f"--workdir={workdir}").succeed()
    assert_same_run(workdir, whole)
    record("dead host teacher", phase="sys.exit in its thread", injected=1, detected=1, lost=0)


def cut(shard):
    os.truncate(shard, shard.stat().st_size // 2)


def flip(shard):
    data = np.fromfile(shard, np.uint8)
    data[len(data) // 2 :: 500] ^= 1
    data.tofile(shard)


@pytest.mark.parametrize("harm", [cut, flip])
def test_a_feature_cache_that_breaks_under_a_run_is_named(harm, tmp_path, record):
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 32, 3), np.uint8)
    teachers = {"cells": TeacherSpec("cells", 3, 3, 8, 32, (0.0,) * 3, (1.0,) * 3, "means of 8x8 cells")}

    def forward(view, pixels, first):
        x = pixels.astype(np.float32)
        tokens = {"cls": x.mean((1, 2)), "patches": x.reshape(-1, 4, 8, 4, 8, 3).mean((2, 4))}
        return pixels, np.zeros((len(pixels), 2), np.uint32), {"cells": tokens}

    config = HostConfig(size=32, mode="none")
    cache = build_feature_cache(tmp_path, ArraySource(images), config, teachers, forward, seed=0, shards=1)
    (shard,) = tmp_path.glob("*.array_record")
    batches, began = cache.batches(batch_size=4, seed=0), time.time()
    assert np.array_equal(next(batches)["image"].shape, (4, 32, 32, 3))
    harm(shard)
    with pytest.raises(OSError, match=f"{shard.name}.*(record|changed|No such file)"):
        while time.time() - began < SECONDS:
            next(batches)
    batches.close()
    record("feature cache breaks under a run", phase=harm.__name__, injected=1, detected=1, accepted=0)
