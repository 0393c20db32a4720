"""launch/precompute.py as a user types it: verified, and trained from without the teacher."""

import shutil

import pytest

from eupe_jax.training import checkpoints
from eupe_jax.training.metrics import read_metrics
from tests.launch.test_commands import assert_one_line, run

RECIPE = "--config=configs/stage2_vitt.py:runlocal"


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path):
    out = tmp_path / "cache"
    result = run("launch/precompute.py", RECIPE, f"--out={out}", "--teachers=expert")
    assert_one_line(result, "no teachers ['expert']", "['proxy']")
    assert not out.exists()


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
