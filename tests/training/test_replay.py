"""What a replay reads and reports; tests/faults/test_nonfinite.py replays real runs."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from eupe_jax.training import replay
from tests.training.conftest import tiny_config


def test_the_config_of_a_run_is_read_as_it_was(tmp_path):
    config = tiny_config()
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict(), indent=2))
    assert replay.read_config(epath.Path(tmp_path)).to_dict() == config.to_dict()


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": '])
def test_a_folder_without_a_run_or_with_a_damaged_one_is_named(tmp_path, text):
    with pytest.raises(FileNotFoundError, match="holds no run .config.json is missing"):
        replay.replay(tmp_path, 0)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json is damaged"):
        replay.replay(tmp_path, 0)


def test_a_step_that_the_run_does_not_have_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(steps=4).to_dict()))
    with pytest.raises(ValueError, match="--step=4 is no step of .*: its steps are 0 to 3"):
        replay.replay(tmp_path, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_run_that_keeps_its_best_needs_no_evaluation_to_be_replayed(tmp_path):
    config = tiny_config(steps=4)
    config.checkpoint.keep_best, config.checkpoint.best_metric = 1, "knn/top1"
    config.compute.teacher_gelu = "exact"  # a run writes down what its chips do
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "data.json").write_text(json.dumps({"synthetic": {"records": 1}}))
    with pytest.raises(ValueError, match="holds a run on other data"):  # what is looked at next
        replay.replay(tmp_path, 0)


def test_the_report_puts_the_worst_gradients_first():
    described = {"pair": "s32_t32", "seed": 7, "records": {"photos": list(range(100, 170))}}
    norms = {"small": 0.5, "broken": float("nan"), "large": 2.0}
    found = replay.Replayed(3, 2, described, {"vit/loss": 1.25}, {"vit": norms}, "student 'vit': its loss", {})
    lines = list(replay.in_lines(found, shown=2))
    assert lines[0] == "step 3, run again from step 2: pair s32_t32, seed 7"
    assert lines[1].startswith("records of photos: 100, 101, ") and lines[1].endswith(", 163 and 6 more")
    assert lines[2:] == [
        "vit/loss: 1.25", "largest gradients of vit:", "  nan  broken", "  2  large",
        "first not finite: student 'vit': its loss",
    ]  # fmt: skip


def test_a_batch_is_saved_by_flat_names():
    batch = {"image": jnp.zeros((2, 4, 4, 3), jnp.uint8), "features": {"a": {"cls": jnp.arange(2.0)}}}
    arrays = replay.arrays_of(batch)
    assert sorted(arrays) == ["features/a/cls", "image"]
    np.testing.assert_array_equal(arrays["features/a/cls"], [0, 1])
