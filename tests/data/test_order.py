import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eupe_jax.data.mixture import Mixture
from eupe_jax.data.order import hash_words, permute, record_index


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 3000), seed=st.integers(0, 2**63))
def test_every_epoch_is_a_permutation(length, seed):
    draws = np.arange(3 * length)
    for epoch in np.split(record_index(seed, draws, length), 3):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(length))


def test_epochs_and_seeds_differ():
    a, b = np.split(record_index(0, np.arange(2000), 1000), 2)
    c = record_index(1, np.arange(1000), 1000)
    for x, y in [(a, b), (a, c)]:
        assert np.mean(x == y) < 0.01


def test_a_batch_may_straddle_epochs_and_be_asked_for_in_parts():
    whole = record_index(5, np.arange(64), 10)
    parts = [record_index(5, np.arange(i, i + 4), 10) for i in range(0, 64, 4)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_order_of_the_full_corpus_needs_no_memory():
    length = 1_700_000_000
    draws = np.concatenate([np.arange(20_000), length - 20_000 + np.arange(20_000)])
    records = record_index(0, draws, length)
    assert records.min() >= 0 and records.max() < length
    assert len(np.unique(records)) == len(draws)
    # Looks random: even coverage of tenths of the corpus, no trend, neighbours unrelated.
    counts = np.bincount(records * 10 // length, minlength=10)
    assert np.all(np.abs(counts - 4000) < 5 * np.sqrt(4000 * 0.9))
    first = records[:20_000].astype(float)
    assert abs(np.corrcoef(np.arange(20_000), first)[0, 1]) < 0.03
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.03


def test_small_permutations_are_evenly_likely():
    counts = {}
    for key in range(2400):
        p = tuple(permute(np.arange(3), 3, hash_words(key)))
        counts[p] = counts.get(p, 0) + 1
    assert len(counts) == 6 and all(abs(c - 400) < 100 for c in counts.values())


@pytest.mark.parametrize("index,length", [([0], 0), ([5], 5), ([-1], 5)])
def test_bad_indices(index, length):
    with pytest.raises(ValueError):
        permute(np.array(index), length, 0)


def test_mixture_frequencies_and_independence_of_seed():
    mixture = Mixture({"lvd": 0.9, "imagenet": 0.1, "off": 0.0}, seed=0)
    choice = mixture.choice(np.arange(50_000))
    share = np.bincount(choice, minlength=3) / 50_000
    assert abs(share[1] - 0.1) < 5 * np.sqrt(0.09 / 50_000) and share[2] == 0
    other = Mixture({"lvd": 0.9, "imagenet": 0.1, "off": 0.0}, seed=1).choice(np.arange(50_000))
    assert abs(np.mean((choice == 1) & (other == 1)) - 0.01) < 0.003


@pytest.mark.parametrize("step", [0, 1, 17, 65_535, 65_536, 140_001])
def test_draws_before_counts_earlier_steps(step):
    mixture = Mixture({"a": 3, "b": 1}, seed=4)
    choice = mixture.choice(np.arange(step + 1))
    assert mixture.draws_before(step) == (choice[-1], np.count_nonzero(choice[:-1] == choice[-1]))


@pytest.mark.parametrize("weights", [{}, {"a": -1.0}, {"a": 0.0}, {"a": float("nan")}])
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="weights"):
        Mixture(weights, 0)
