"""Which source every place draws from: frequencies, counts, independence of what came before."""

import pickle
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eupe_jax.data.mixture import MIXINGS, Mixture

WEIGHTS = {"lvd": 0.9, "imagenet": 0.1, "off": 0.0}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mixing", MIXINGS)
def test_frequencies_over_100k_steps_are_within_three_sigma(mixing, seed):
    steps, b = 100_000, 8
    drawn = Mixture(WEIGHTS, seed, b, mixing).draws_before(steps)
    assert drawn.sum() == steps * b and drawn[2] == 0
    # homogeneous batches: 100k coin tosses of a batch each; records: no worse than as many independent tosses
    tosses = steps if mixing == "batch" else steps * b
    share = drawn[1] / (steps * b)
    assert abs(share - 0.1) < 3 * np.sqrt(0.09 / tosses)


def test_seeds_are_independent():
    mixtures = [Mixture(WEIGHTS, seed, 1) for seed in (0, 1)]
    a, b = ([int(m.of_step(step)[0][0]) for step in range(10_000)] for m in mixtures)
    assert abs(np.mean(np.multiply(a, b)) - 0.01) < 0.005


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=5).filter(lambda w: sum(w) > 0),
    batch=st.integers(1, 40),
    seed=st.integers(0, 2**63),
    start=st.integers(0, 3 << 14),
    mixing=st.sampled_from(MIXINGS),
)
def test_draws_of_every_source_are_numbered_without_gaps(weights, batch, seed, start, mixing):
    mixture = Mixture(dict(enumerate(weights)), seed, batch, mixing)
    expected = mixture.draws_before(start)
    for step in range(start, start + 5):
        sources, draws = mixture.of_step(step)
        assert sources.shape == draws.shape == (batch,)
        for source, draw in zip(sources, draws, strict=True):
            assert weights[source] > 0 and draw == expected[source]
            expected[source] += 1
        if mixing == "batch":
            assert len(set(sources)) == 1
        else:
            exact = np.asarray(weights) / sum(weights) * batch
            assert np.all(np.abs(np.bincount(sources, minlength=len(weights)) - exact) < 1 + 1e-6)
    np.testing.assert_array_equal(mixture.draws_before(start + 5), expected)


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("step", [0, 1, (1 << 14) - 1, 1 << 14, 40_001])
def test_any_step_may_be_asked_for_first(mixing, step):
    walked, jumped = (Mixture({"a": 3, "b": 1, "c": 0.01}, 4, 6, mixing) for _ in range(2))
    counts = sum(np.bincount(walked.of_step(i)[0], minlength=3) for i in range(max(0, step - 50), step))
    jumped_back = jumped.draws_before(step) - jumped.draws_before(max(0, step - 50))
    np.testing.assert_array_equal(counts, jumped_back)
    again = pickle.loads(pickle.dumps(walked))
    for x, y, z in zip(walked.of_step(step), jumped.of_step(step), again.of_step(step), strict=True):
        np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(x, z)


def test_places_of_mixed_batches_are_evenly_likely():
    mixture = Mixture({"a": 0.75, "b": 0.25}, 0, 8, "record")
    hits = sum(mixture.of_step(step)[0] for step in range(3000))
    assert hits.sum() == 2 * 3000 and np.all(np.abs(hits - 750) < 4 * np.sqrt(3000 * 0.25 * 0.75))


@pytest.mark.parametrize("mixing", MIXINGS)
def test_a_million_steps_are_near(mixing):
    began = time.process_time()
    Mixture(WEIGHTS, 0, 8192, mixing).of_step(1_000_000)
    assert time.process_time() - began < 2


@pytest.mark.parametrize("weights", [{}, {"a": -1.0}, {"a": 0.0}, {"a": float("nan")}])
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="weights"):
        Mixture(weights, 0, 8)


def test_bad_mixing():
    with pytest.raises(ValueError, match="data.mixing .* 'step'"):
        Mixture(WEIGHTS, 0, 8, "step")
