import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
