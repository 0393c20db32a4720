"""Linear probe: the optimum that scikit-learn finds, a sweep that chooses, and fits that survive a kill."""

import dataclasses

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from eupe_jax.evals import linear_probe
from eupe_jax.evals.features import load_arrays
from tests.evals.image_sets import write_shards
from tests.evals.test_features import tiny_encoder
from tests.evals.test_knn import NoClassToken, clusters

SMALL = linear_probe.Settings(resize=36, crop=32, batch_size=8, penalties=(0.1, 0.01), iterations=25)


@pytest.fixture
def problem():
    return clusters(5, 203, 120, 10, 7)


@pytest.mark.parametrize("penalty, block", [(0.1, 1000), (0.003, 64)])
def test_a_single_penalty_finds_sklearns_optimum(problem, penalty, block):
    train, labels, test, _ = problem
    settings = linear_probe.Settings(penalties=(penalty,), block=block, tolerance=1e-5)
    probe, sweep = linear_probe.fit(train, labels, 7, settings)
    mean, scale = train.mean(0), train.std(0)
    reference = LogisticRegression(C=1 / (penalty * len(train)), tol=1e-8, max_iter=5000).fit(
        (train - mean) / scale, labels
    )
    ours, theirs = probe(test), reference.decision_function((test - mean) / scale)
    ours, theirs = (x - x.mean(1, keepdims=True) for x in (ours, theirs))
    np.testing.assert_allclose(ours, theirs, atol=2e-3 * np.abs(theirs).max())
    assert sweep == [] and probe.penalty == penalty


def test_the_sweep_takes_what_does_best_on_images_held_out(problem):
    train, labels, test, test_labels = problem
    settings = linear_probe.Settings(penalties=(1e-4, 30.0, 0.03))
    probe, sweep = linear_probe.fit(train, labels, 7, settings)
    assert [row["penalty"] for row in sweep] == [30.0, 0.03, 1e-4]
    assert probe.penalty == max(sweep, key=lambda row: row["heldout_top1"])["penalty"] != 30.0
    top1 = float((probe(test).argmax(1) == test_labels).mean())
    strong, _ = linear_probe.fit(train, labels, 7, dataclasses.replace(settings, penalties=(30.0,)))
    assert top1 > float((strong(test).argmax(1) == test_labels).mean())


def test_held_out_images_take_no_part_in_the_sweep(problem):
    """Features that hold the label for training rows only: a sweep that peeked would call them perfect."""
    train, labels, _, _ = problem
    settings = linear_probe.Settings(penalties=(0.1, 0.01))
    held = linear_probe._held_out(labels, settings)
    counts = [np.bincount(labels, minlength=7), np.bincount(labels[held], minlength=7)]
    np.testing.assert_array_equal(counts[1], (0.2 * counts[0]).astype(int))
    leak = np.eye(7, 10, dtype=np.float32)[np.where(held, (labels + 1) % 7, labels)]
    _, sweep = linear_probe.fit(leak, labels, 7, settings)
    assert all(row["heldout_top1"] == 0.0 for row in sweep)


def test_the_same_settings_give_the_same_probe(problem):
    train, labels, _, _ = problem
    first, second = (linear_probe.fit(train, labels, 7, linear_probe.Settings(penalties=(0.1, 0.01))) for _ in range(2))
    np.testing.assert_array_equal(first[0].kernel, second[0].kernel)
    assert first[1] == second[1]
    held = [linear_probe._held_out(labels, linear_probe.Settings(seed=s)) for s in (0, 1)]
    assert (held[0] != held[1]).any()


def test_a_killed_sweep_goes_on(problem, tmp_path, monkeypatch):
    train, labels, _, _ = problem
    settings = linear_probe.Settings(penalties=(0.3, 0.1, 0.01))
    whole, sweep = linear_probe.fit(train, labels, 7, settings)
    solve, calls = linear_probe._Solver.__call__, []

    def dies_at_third(self, *args):
        calls.append(args[1])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return solve(self, *args)

    monkeypatch.setattr(linear_probe._Solver, "__call__", dies_at_third)
    with pytest.raises(KeyboardInterrupt):
        linear_probe.fit(train, labels, 7, settings, workdir=tmp_path)
    resumed, again = linear_probe.fit(train, labels, 7, settings, workdir=tmp_path)
    assert calls == [0.3, 0.1, 0.01, 0.01, whole.penalty]
    np.testing.assert_array_equal(resumed.kernel, whole.kernel)
    assert again == sweep
    linear_probe.fit(train, labels, 7, settings, workdir=tmp_path)
    assert len(calls) == 5
    linear_probe.fit(train * 2, labels, 7, settings, workdir=tmp_path)  # other features: nothing is taken over
    assert len(calls) == 9
    assert all(load_arrays(path, "another") is None for path in tmp_path.rglob("*.safetensors"))


def test_constant_features_do_no_harm(problem):
    train, labels, test, _ = problem
    settings, logits = linear_probe.Settings(penalties=(0.1,)), []
    for constant in (0.0, 3.0):
        for x in (train, test):
            x[:, -1] = constant
        logits.append(linear_probe.fit(train, labels, 7, settings)[0](test))
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-3)


def test_whole_evaluation(tmp_path):
    encoder, data = tiny_encoder(), linear_probe.load(write_shards(tmp_path / "set", 48, 18), SMALL)
    result = linear_probe.run(encoder, data, SMALL, workdir=tmp_path / "work")
    assert result.metrics["top1"] > 0.6 and result.metrics["train_top1"] >= result.metrics["top1"] - 0.2
    assert result.metrics.keys() == {"top1", "mean_per_class", "train_top1"}
    assert {row["penalty"] for row in result.tables["by_penalty"]} == {0.1, 0.01}
    assert len(result.tables["by_class"]) == 3 and result.images["mistakes"].dtype == np.uint8
    again = linear_probe.run(encoder, data, SMALL, workdir=tmp_path / "work")
    assert again.metrics == result.metrics and again.tables == result.tables

    both = linear_probe.run(encoder, data, dataclasses.replace(SMALL, token="cls+patch_mean", penalties=(0.1,)))
    assert both.metrics.keys() == result.metrics.keys() and "by_penalty" not in both.tables
    with pytest.raises(ValueError, match="set token='patch_mean'"):
        linear_probe.run(NoClassToken(), data, SMALL)


def test_what_makes_no_sense_is_refused():
    for changes, message in (
        ({"penalties": ()}, "penalties"),
        ({"penalties": (0.0,)}, "penalties"),
        ({"holdout": 1.0}, "holdout"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_probe.Settings(**changes)
    with pytest.raises(ValueError, match="4 training images are too few"):
        linear_probe.fit(np.eye(4, dtype=np.float32), np.arange(4), 4, linear_probe.Settings())
