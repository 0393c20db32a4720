import itertools
import threading
import time

import numpy as np
import pytest

from eupe_jax.data.host import HostConfig, TooManyBroken
from eupe_jax.data.loader import Loader
from eupe_jax.data.sources import ArraySource

CONFIG = HostConfig(size=16)


def take(loader, steps, start=0):
    batches = loader.batches(start)
    try:
        return list(itertools.islice(batches, steps))
    finally:
        batches.close()


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x["index"], y["index"])
        np.testing.assert_array_equal(x["image"], y["image"])


@pytest.fixture(scope="module")
def two_sources(numbered):
    noise = np.random.default_rng(0).integers(0, 256, (25, 24, 24, 3), np.uint8)
    return {"big": numbered, "small": ArraySource(noise)}


def loader(sources, **settings):
    return Loader(sources, CONFIG, **{"batch_size": 8, "seed": 11, "threads": 2, **settings})


def test_batches_hold_what_they_say(numbered):
    batches = take(loader(numbered), 10)
    for batch in batches:
        assert batch["image"].shape == (8, 16, 16, 3) and batch["image"].dtype == np.uint8
        assert batch["index"].shape == (8,) and batch["index"].dtype == np.int64
        colours = np.stack([numbered[i].data[0, 0] for i in batch["index"]])
        np.testing.assert_array_equal(batch["image"][:, 3, 3], colours)
    seen = np.concatenate([b["index"] for b in batches]).reshape(2, 40)
    np.testing.assert_array_equal(np.sort(seen), np.tile(np.arange(40), (2, 1)))  # two epochs, each without repeats
    assert not np.array_equal(seen[0], seen[1])


@pytest.mark.parametrize("hosts", [2, 4])
def test_any_number_of_hosts_makes_the_same_global_batch(two_sources, hosts):
    weights = {"big": 0.7, "small": 0.3}
    whole = take(loader(two_sources, weights=weights), 5, start=2)
    parts = [
        take(loader(two_sources, weights=weights, process_index=i, process_count=hosts), 5, start=2)
        for i in range(hosts)
    ]
    joined = [{k: np.concatenate([p[k] for p in step]) for k in step[0]} for step in zip(*parts, strict=True)]
    assert_same(whole, joined)


@pytest.mark.parametrize("start", [1, 6, 13])
def test_it_resumes_at_any_step(two_sources, start):
    weights = {"big": 0.5, "small": 0.5}
    uninterrupted = take(loader(two_sources, weights=weights), start + 3)
    assert_same(uninterrupted[start:], take(loader(two_sources, weights=weights, threads=5), 3, start=start))


def test_steps_are_homogeneous_and_no_source_repeats_within_its_epoch(two_sources):
    mixed = loader(two_sources, weights={"big": 0.6, "small": 0.4})
    ids = [mixed.record_ids(step) for step in range(40)]
    small = [x - 40 for x in ids if x.min() >= 40]
    big = [x for x in ids if x.max() < 40]
    assert len(small) + len(big) == 40 and 5 < len(small) < 30
    for draws, n in [(small, 25), (big, 40)]:
        order = np.concatenate(draws)
        for epoch in range(len(order) // n):
            assert len(np.unique(order[epoch * n : (epoch + 1) * n])) == n


def test_seeds_change_order_and_crops(photos):
    a, b = (take(Loader(photos, CONFIG, batch_size=4, seed=s, threads=2), 3) for s in (0, 1))
    assert any(not np.array_equal(x["index"], y["index"]) for x, y in zip(a, b, strict=True))
    # The same photo in two epochs is cropped twice.
    first = {int(i): x for batch in a[:2] for i, x in zip(batch["index"], batch["image"], strict=True)}
    again = dict(zip(map(int, a[2]["index"]), a[2]["image"], strict=True))
    assert all(not np.array_equal(first[i], again[i]) for i in again)


def test_worker_processes_give_the_same_batches(numbered):
    assert_same(take(loader(numbered), 5, start=3), take(loader(numbered, workers=2), 5, start=3))


def test_far_steps_cost_no_memory_or_time(two_sources):
    began = time.time()
    (batch,) = take(loader(two_sources, weights={"big": 0.9, "small": 0.1}), 1, start=1_000_000)
    assert len(np.unique(batch["index"])) == 8 and time.time() - began < 10


def test_broken_data_stops_the_consumer():
    broken = ArraySource([np.zeros((4, 5, 3), np.uint8)] * 4, ["a.jpg", "b.jpg", "c.jpg", "d.jpg"])
    batches = Loader(broken, HostConfig(size=4, mode="none"), batch_size=2, seed=0, threads=1).batches()
    with pytest.raises(TooManyBroken, match=r"(?s)\.jpg: .*5x4 and mode 'none'"):
        next(batches)
    batches.close()


def test_closing_stops_the_threads(numbered):
    before = threading.active_count()
    take(loader(numbered), 2)
    deadline = time.time() + 10
    while threading.active_count() > before and time.time() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"batch_size": 6, "process_count": 4}, "multiple of the 4 processes"),
        ({"process_index": 2, "process_count": 2}, "process_index 2"),
        ({"weights": {"other": 1.0}}, r"\['other'\] but the sources are \['data'\]"),
    ],
)
def test_settings_that_do_not_fit(numbered, settings, message):
    with pytest.raises(ValueError, match=message):
        loader(numbered, **settings)
