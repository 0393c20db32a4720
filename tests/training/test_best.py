"""The checkpoints that evaluations found best are kept, whatever else goes."""

import json

import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from eupe_jax.training import best
from eupe_jax.training.checkpoints import Checkpoints

SETTINGS = {"save_every": 1, "keep": 1, "keep_every": 0, "keep_best": 2}
SETTINGS |= {"best_metric": "knn/s/top1", "best_mode": "max"}


def settings(**changed):
    return ConfigDict(SETTINGS | changed)


def save(saver, step, value=None):
    student = {"params": {"backbone": {"x": jnp.full(8, step)}, "adapters": {"x": jnp.ones(2)}}, "buffers": {}}
    state = {"students": {"s": student | {"optimizer": {"x": jnp.ones(2)}}}}
    saver.save(step, state, {"t": {"mean": jnp.ones(2)}}, {}, {"students": {}})
    saver.wait()
    if value is not None:
        saver.note(step, {"knn/s/top1": value, "depth/s/rmse": -value})


def kept(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.parametrize(("mode", "expected"), [("max", [3, 4, 8]), ("min", [1, 2, 8])])
def test_the_best_are_kept_and_known_after_a_resume(tmp_path, mode, expected):
    values = {1: 0.5, 2: 0.6, 3: 0.9, 4: 0.7, 5: float("nan"), 6: 0.7 if mode == "min" else 0.65}
    for steps in ((1, 2, 3), (4, 5, 6), (7, 8)):  # three processes
        saver = Checkpoints(tmp_path, settings(best_mode=mode))
        for step in steps:
            save(saver, step, values.get(step))
        saver.close()
    assert kept(tmp_path) == expected


def test_an_evaluation_that_is_run_again_counts_once_and_ties_go_to_the_newer(tmp_path):
    saver = Checkpoints(tmp_path, settings(keep_best=1))
    for step in (1, 2, 3, 4):
        save(saver, step, 0.5 if step < 3 else 0.1)
        saver.note(step, {"knn/s/top1": 0.5 if step < 3 else 0.1})
    saver.close()
    assert kept(tmp_path) == [2, 4]


def test_what_best_metric_must_be(tmp_path):
    saver = Checkpoints(tmp_path, settings(best_metric="knn/s/top5"))
    saver.note(1, {"depth/s/rmse": 1.0})  # not that evaluation's turn
    with pytest.raises(ValueError, match="'knn/s/top5', which the evaluation does not give: use one of knn/s/top1$"):
        saver.note(1, {"knn/s/top1": 0.5, "depth/s/rmse": 1.0})
    saver.close()
    (tmp_path / "best.json").write_text(json.dumps({"knn/s/top1": [1]}))
    with pytest.raises(ValueError, match="best.json is damaged .*: remove it"):
        Checkpoints(tmp_path, settings())


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"keep": 0}, "checkpoint.keep must be at least 1, got 0"),
        ({"keep_best": -1}, "checkpoint.keep_best must be at least 0"),
        ({"best_mode": "most"}, "checkpoint.best_mode is 'most': use one of max, min"),
        ({"best_metric": "depth/s/rmse"}, "best_metric is 'depth/s/rmse': .* one of knn"),
        ({"best_metric": "knn"}, "best_metric is 'knn'"),
    ],
)
def test_settings_are_checked_before_training(changed, problem):
    best.check_settings(settings(), ["knn"])
    with pytest.raises(ValueError, match=problem):
        best.check_settings(settings(**changed), ["knn"])


def test_what_is_best_needs_evaluations():
    with pytest.raises(ValueError, match="keep_best needs evaluations inside training"):
        best.check_settings(settings(), [])
    best.check_settings(settings(keep_best=0, best_metric=""), [])
