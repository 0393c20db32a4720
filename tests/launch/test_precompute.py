"""launch/precompute.py as a user types it: killed and run again, verified, and trained from without the teacher."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from eupe_jax.training import checkpoints
from eupe_jax.training.metrics import read_metrics
from tests.launch.test_commands import ROOT, assert_one_line, run

RECIPE = "--config=configs/stage2_vitt.py:runlocal"


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path):
    out = tmp_path / "cache"
    result = run("launch/precompute.py", RECIPE, f"--out={out}", "--teachers=expert")
    assert_one_line(result, "no teachers ['expert']", "['proxy']")
    assert not out.exists()


def command(out, *flags):
    return ["launch/precompute.py", RECIPE, f"--out={out}", "--views=6", "--shards=12", "--precision=int8", *flags]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_killed_at_ten_random_moments_the_bytes_are_the_same(tmp_path):
    assert run(*command(tmp_path / "whole", "--verify")).returncode == 0
    seed = int(os.environ.get("EUPE_KILL_SEED", time.time_ns() % 2**32))
    print("EUPE_KILL_SEED", seed)
    # As `run` has it: other compiler flags would round otherwise.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    moments, out, kills = random.Random(seed), tmp_path / "killed", 0
    while kills < 10:
        process = subprocess.Popen(
            [sys.executable, *map(str, command(out))], cwd=ROOT, env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        done = _shards(out)
        while _shards(out) == done and process.poll() is None:  # it starts with compiling
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.15))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        if _shards(out) == 12 and kills < 10:  # finished before it could be killed as often: once more from the start
            assert contents(out) == contents(tmp_path / "whole")
            shutil.rmtree(out)
    assert run(*command(out, "--verify")).returncode == 0
    assert contents(out) == contents(tmp_path / "whole")

    shard = min(out.glob("*.array_record"))  # damage, too, is undone by the same command
    whole = shard.read_bytes()
    shard.write_bytes(whole[:70_000] + bytes([whole[70_000] ^ 1]) + whole[70_001:])
    assert run(*command(out, "--verify")).returncode == 0
    assert contents(out) == contents(tmp_path / "whole")


def _shards(out):
    for name in ("manifest.json", "progress.json"):
        try:
            return len(json.loads((out / name).read_text())["shards"])
        except FileNotFoundError:
            continue
    return 0


@pytest.mark.slow
def test_a_student_of_a_cached_teacher_needs_no_checkpoint_and_keeps_the_chain(tmp_path):
    def succeed(*words):
        result = run(*words)
        assert result.returncode == 0, result.stderr

    first, statistics, cache = (tmp_path / name for name in ("first", "statistics", "cache"))
    succeed("launch/measure_statistics.py", RECIPE, f"--out={statistics}")
    succeed("launch/train.py", RECIPE, f"--config.statistics={statistics}", f"--workdir={first}")
    teacher = ["--config.teachers.proxy.model=eupe_vitt16", f"--config.teachers.proxy.checkpoint={first}"]
    succeed("launch/precompute.py", RECIPE, *teacher, f"--out={cache}", "--views=2", "--verify")

    chain = checkpoints.restore_item(checkpoints.step_directory(first), "vitt.adapters")
    shutil.rmtree(first)
    own = tmp_path / "own_statistics"
    assert_one_line(run("launch/measure_statistics.py", RECIPE, *teacher, f"--out={own}"), "no checkpoint")
    cached = [*teacher, f"--config.data.feature_cache={cache}"]
    succeed("launch/measure_statistics.py", RECIPE, *cached, f"--out={own}")
    succeed("launch/train.py", RECIPE, *cached, f"--config.statistics={own}", f"--workdir={tmp_path}/second")
    assert [line["step"] for line in read_metrics(tmp_path / "second" / "metrics.jsonl")] == list(range(1, 7))
    step = checkpoints.step_directory(tmp_path / "second")
    assert checkpoints.read_manifest(step)["chain"]["proxy"]["adapters"]
    kept = checkpoints.restore_item(step, "chain")["proxy"]["adapters"]
    assert {k: sorted(v) for k, v in kept.items()} == {k: sorted(v) for k, v in chain.items()}
    for name, adapter in chain.items():
        assert (kept[name]["fc1"]["kernel"] == adapter["fc1"]["kernel"]).all()

    (shard, *_) = cache.glob("*.array_record")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:70_000] + b"\0" + whole[70_001:])
    result = run("launch/precompute.py", f"--out={cache}", "--verify")
    assert_one_line(result, "damaged")
    assert f"{shard}: record " in result.stdout
