import contextlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import common
from eupe_jax.data.host import HostConfig, TooManyBroken
from eupe_jax.data.loader import Loader, parts_of_batch
from eupe_jax.data.processes import how_it_ended
from eupe_jax.data.sources import ArraySource, Record
from eupe_jax.training.pipeline import make_loader

CONFIG = HostConfig(size=16)
MIX = {"a": 3.0, "b": 1.0}


class Virtual:
    """`length` records, each a grey picture made when it is asked for."""

    def __init__(self, length):
        self._length, self.digest = length, f"virtual{length}"

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        return Record(np.full((16, 16, 3), index % 256, np.uint8), f"virtual[{index}]")


def take(loader, steps, start=0, positions=None):
    batches = loader.batches(start, positions)
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


def share(batch_size, host, hosts):
    """Positions of one of several hosts, where they lie one after another."""
    return np.split(np.arange(batch_size), hosts)[host]


def loader(sources, **arguments):
    return Loader(sources, CONFIG, **{"batch_size": 8, "seed": 11, "threads": 2, **arguments})


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


def test_the_order_stays_from_version_to_version():
    """A run resumes with a newer version of this code: what it has seen must be what this code says it has seen."""
    sources = {"a": Virtual(1000), "b": Virtual(33)}
    ids = [loader(sources, weights=MIX, batch_size=4, seed=5).record_ids(s).tolist() for s in (0, 7, 123_456)]
    assert ids == [[503, 21, 613, 688], [90, 435, 282, 139], [571, 223, 874, 912]]
    mixed = loader(sources, weights=MIX, batch_size=4, seed=5, mixing="record")
    ids = [mixed.record_ids(s).tolist() for s in (0, 7, 123_456)]
    assert ids == [[503, 21, 613, 1006], [441, 1030, 611, 940], [282, 523, 857, 1003]]


def global_batches(parts):
    """Batches of all hosts, joined."""
    return [{k: np.concatenate([p[k] for p in step]) for k in step[0]} for step in zip(*parts, strict=True)]


@pytest.mark.parametrize("mixing", ["batch", "record"])
@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_any_number_of_hosts_makes_the_same_global_batch(two_sources, hosts, mixing):
    settings = {"weights": {"big": 0.7, "small": 0.3}, "mixing": mixing}
    whole = take(loader(two_sources, **settings), 5, start=2)
    parts = [take(loader(two_sources, **settings), 5, 2, share(8, i, hosts)) for i in range(hosts)]
    assert_same(whole, global_batches(parts))


def test_positions_may_lie_anywhere(two_sources):
    """On a torus the devices of a host are no neighbours in the batch."""
    mixed = loader(two_sources, weights={"big": 0.7, "small": 0.3}, mixing="record")
    here = np.array([0, 1, 6, 3])
    for whole, part in zip(take(mixed, 3), take(mixed, 3, positions=here), strict=True):
        np.testing.assert_array_equal(part["index"], whole["index"][here])
        np.testing.assert_array_equal(part["image"], whole["image"][here])
    for wrong in ([], [8], [-1]):
        with pytest.raises(ValueError, match="positions must be some of the 8"):
            mixed.batches(positions=wrong)


class Files:
    """Encoded images in memory."""

    def __init__(self, data):
        self._data, self.digest = data, "files"

    def __len__(self):
        return len(self._data)

    def __getitem__(self, index):
        return Record(self._data[index], f"file{index}")


def host_part(sources, mixing, steps, start, host, hosts):
    """What one host of several makes, in a process of its own."""
    return take(loader(sources, weights=MIX, mixing=mixing), steps, start, share(8, host, hosts))


def test_processes_make_the_same_global_batches_and_resume_on_another_number_of_hosts(photos, numbered):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for mixing in ("batch", "record"):
            make = partial(host_part, {"a": photos, "b": numbered}, mixing)
            two, four, later = (
                global_batches(pool.starmap(make, [(steps, start, i, hosts) for i in range(hosts)], chunksize=1))
                for steps, start, hosts in ((6, 0, 2), (6, 0, 4), (3, 3, 4))
            )
            one = make(6, 0, 0, 1)
            assert_same(one, two)
            assert_same(one, four)
            assert_same(one[3:], later)


@pytest.mark.parametrize("mixing", ["batch", "record"])
def test_large_batches_are_made_in_parts(numbered, mixing):
    """Whatever the number of threads and hosts."""
    settings = {"weights": MIX, "mixing": mixing, "batch_size": 150}
    large = loader({"a": Virtual(1000), "b": numbered}, **settings, threads=3)
    first, second = take(large, 2, start=1)
    assert first["image"].shape == (150, 16, 16, 3)
    np.testing.assert_array_equal(first["index"], large.record_ids(1))
    np.testing.assert_array_equal(second["index"], large.record_ids(2))
    other = loader({"a": Virtual(1000), "b": numbered}, **settings)
    assert_same([first, second], global_batches([take(other, 2, 1, share(150, i, 3)) for i in range(3)]))


class Together(Virtual):
    """Gives the first records only when `readers` threads want one at the same time."""

    def __init__(self, length, readers):
        super().__init__(length)
        self._all_here, self._barrier = threading.Event(), threading.Barrier(readers, timeout=30)

    def __getitem__(self, index):
        if not self._all_here.is_set():
            self._barrier.wait()
            self._all_here.set()
        return super().__getitem__(index)


def test_all_threads_make_the_first_batch_after_a_resume():
    together = loader(Together(16, readers=4), batch_size=16, threads=4)
    (batch,) = take(together, 1, start=5)  # with fewer at work it waits in vain
    np.testing.assert_array_equal(batch["index"], together.record_ids(5))


@pytest.mark.parametrize(
    ("images", "side", "threads", "workers"), [(4096, 512, 16, 0), (128, 256, 16, 0), (32, 256, 16, 0), (64, 512, 8, 4)]
)
def test_what_is_made_ahead_is_bounded(images, side, threads, workers):
    image = 3 * side**2
    parts, ahead = parts_of_batch(images, image, threads, workers)
    part, makers = -(-images // parts) * image, threads * max(workers, 1)
    assert part <= 32 << 20 and part * makers <= images * image + makers * 4 * image
    made = ahead * max(workers, 1) * part
    assert images * image <= made <= max(600e6, 1.1 * images * image + makers * part)


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


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    batch_size=st.integers(1, 24),
    mixing=st.sampled_from(["batch", "record"]),
    seed=st.integers(0, 2**32),
)
def test_no_record_comes_twice_in_an_epoch(lengths, batch_size, mixing, seed):
    """Epochs end inside batches, and batches hold several epochs of a small source: still each is a permutation."""
    sources = {"a": Virtual(lengths[0]), "b": Virtual(lengths[1])}
    mixed = loader(sources, weights=MIX, batch_size=batch_size, mixing=mixing, seed=seed)
    ids = np.concatenate([mixed.record_ids(step) for step in range(2 + 200 // batch_size)])
    for seen, n in ((ids[ids < lengths[0]], lengths[0]), (ids[ids >= lengths[0]] - lengths[0], lengths[1])):
        for first in range(0, len(seen), n):
            epoch = seen[first : first + n]
            assert len(np.unique(epoch)) == len(epoch)


def test_no_record_comes_twice_in_an_epoch_of_what_is_read(two_sources):
    """The same, of the batches that come out; every picture of `big` tells its number."""
    mixed = loader(two_sources, weights={"big": 0.6, "small": 0.4}, mixing="record")
    batches = take(mixed, 14)
    ids = np.concatenate([b["index"] for b in batches])
    pictures = np.concatenate([b["image"] for b in batches])[ids < 40]
    big, small = ids[ids < 40], ids[ids >= 40] - 40
    assert len(big) > 60 and len(small) > 40
    assert len(np.unique(big[:40])) == 40 and len(np.unique(small[:25])) == 25
    colours = [two_sources["big"][i].data[0, 0] for i in big]
    np.testing.assert_array_equal(pictures[:, 3, 3], colours)


@pytest.mark.parametrize("mixing", ["batch", "record"])
def test_a_source_that_runs_out_is_refused_at_once(mixing):
    sources = {"a": Virtual(1000), "b": Virtual(50)}
    run = {"weights": MIX, "mixing": mixing, "total_steps": 100}
    drawn = sum(np.count_nonzero(loader(sources, **run).record_ids(step) >= 1000) for step in range(100))
    needed = -(-drawn // 50)
    assert needed > 1
    loader(sources, **run, repeats={"b": needed})
    with pytest.raises(ValueError, match=f"(?s)data.sources.b runs out: 100 steps draw {drawn} .* repeat to {needed} "):
        loader(sources, **run, repeats={"b": needed - 1})
    for repeats, steps, words in (({"b": 1}, None, "total_steps"), ({"c": 1}, 9, "'c'"), ({"a": -1}, 9, "at least 1")):
        with pytest.raises(ValueError, match=words):
            loader(sources, weights=MIX, repeats=repeats, total_steps=steps)


def test_a_config_says_how_sources_mix():
    config = common.base()
    config.total_steps, config.batch_size, config.data.image_size, config.data.mixing = 30, 8, 16, "record"
    config.data.sources.a = common.source("synthetic", "", weight=3, size=16)
    config.data.sources.b = common.source("synthetic", "", weight=1, repeat=2, size=16, count=30)
    mixed = make_loader(config)
    assert all(np.count_nonzero(mixed.record_ids(step) >= 64) == 2 for step in range(30))
    config.total_steps = 31
    with pytest.raises(ValueError, match="data.sources.b runs out: 31 steps draw 62 records"):
        make_loader(config)
    config.data.mixing = "steps"
    with pytest.raises(ValueError, match="data.mixing .*'steps'"):
        make_loader(config)


def test_a_corpus_of_full_size_starts_at_once():
    began = time.process_time()
    corpus = loader({"lvd": Virtual(1_700_000_000), "imagenet": Virtual(1_281_167)}, batch_size=64, threads=2)
    (batch,) = take(corpus, 1, start=390_000)
    assert time.process_time() - began < 5 and batch["image"].shape == (64, 16, 16, 3)


@pytest.mark.slow
def test_a_dead_worker_is_an_error_and_no_hang(numbered):
    batches = loader(numbered, workers=2).batches()
    next(batches)
    victims = multiprocessing.active_children()
    assert len(victims) == 2
    for victim in victims:  # a notice to all processes of the job ends none: the run still needs them
        os.kill(victim.pid, signal.SIGTERM)
    next(batches)
    time.sleep(0.5)
    assert all(victim.is_alive() for victim in victims)
    os.kill(victims[-1].pid, signal.SIGKILL)
    began, said = time.time(), rf"data worker \(process {victims[-1].pid}, one of .*workers=2\) was killed by SIGKILL"
    with pytest.raises(ChildProcessError, match=said):
        while time.time() - began < 60:
            next(batches)
    batches.close()


LOOSE = """
import os, sys, numpy as np
from eupe_jax.data.host import HostConfig
from eupe_jax.data.loader import Loader
from eupe_jax.data.sources import ArraySource

if __name__ == "__main__":
    source = ArraySource(np.zeros((8, 16, 16, 3), np.uint8))
    batches = Loader(source, HostConfig(size=16), batch_size=4, seed=0, threads=1, workers=2).batches()
    next(batches)
    os.kill(os.getpid(), 9)
"""


class Failing(Virtual):
    """Every record raises such an error."""

    def __init__(self, kind, *words):
        super().__init__(8)
        self._kind, self._words = kind, words

    def __getitem__(self, index):
        raise self._kind(*self._words)


class Untellable(OSError):
    """An error that no other process can be told as it is: made again from its arguments, it lacks one."""

    def __init__(self, code, reason):
        super().__init__(f"{reason} ({code})")


@pytest.mark.parametrize(
    ("source", "kind", "said"),
    [
        (Failing(Untellable, 7, "gone"), OSError, "Untellable: gone"),
        (Failing(SystemExit, 0), ValueError, "SystemExit: 0"),
        (Failing(MemoryError, "no room"), ValueError, "MemoryError: no room"),
    ],
)
def test_whatever_a_thread_raises_is_told_with_its_record(source, kind, said):
    batches = loader(source).batches(5)
    with pytest.raises(kind, match=rf"record \d of data, for step 5 cannot be read: {said}") as told:
        next(batches)
    assert type(told.value) is kind
    batches.close()


@pytest.mark.slow
@pytest.mark.parametrize("source", [Failing(Untellable, 7, "gone"), Failing(SystemExit, 0)])
def test_an_error_in_a_worker_is_told_and_no_hang(source):
    began, batches = time.time(), loader(source, workers=1).batches()
    with pytest.raises((OSError, ValueError), match="cannot be read: (Untellable: gone|SystemExit: 0)"):
        next(batches)
    batches.close()
    assert time.time() - began < 60


def test_how_a_process_ended_is_said_in_words():
    assert how_it_ended(3) == "ended with exit status 3"
    assert how_it_ended(-9).startswith("was killed by SIGKILL: ") and "memory" in how_it_ended(-9)
    assert "/dev/shm" in how_it_ended(-signal.SIGBUS)
    assert how_it_ended(-15) == "was killed by SIGTERM" and how_it_ended(-200) == "was killed by signal 200"


@pytest.mark.slow
def test_workers_end_with_a_killed_run(tmp_path):
    (tmp_path / "run.py").write_text(LOOSE)
    process = subprocess.Popen([sys.executable, tmp_path / "run.py"], start_new_session=True)
    assert process.wait(timeout=120) == -signal.SIGKILL
    deadline = time.time() + 30
    while session_is_alive(process.pid):
        assert time.time() < deadline
        time.sleep(0.05)


def session_is_alive(session):
    """Whether any process of a session is left."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(int(pid)) == session:
                return True
    return False


def test_seeds_change_order_and_crops(photos):
    a, b = (take(Loader(photos, CONFIG, batch_size=4, seed=s, threads=2), 3) for s in (0, 1))
    assert any(not np.array_equal(x["index"], y["index"]) for x, y in zip(a, b, strict=True))
    # The same photo in two epochs is cropped twice.
    first = {int(i): x for batch in a[:2] for i, x in zip(batch["index"], batch["image"], strict=True)}
    again = dict(zip(map(int, a[2]["index"]), a[2]["image"], strict=True))
    assert all(not np.array_equal(first[i], again[i]) for i in again)


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


@pytest.fixture
def odd(numbered, encode):
    """Loader over six files, three of them broken, and `numbered`."""
    fine = encode(np.zeros((20, 20, 3), np.uint8), "JPEG")
    sources = {"files": Files([fine, b"", fine, fine[:-9], b"<html>", fine]), "numbered": numbered}
    config = HostConfig(size=16, max_broken_fraction=1.0)
    return partial(Loader, sources, config, weights=dict.fromkeys(sources, 1), mixing="record", batch_size=8, seed=3)


def test_broken_records_are_counted_by_source_and_kind(odd):
    """Of the batches handed out, not of those made ahead."""
    counted = odd(threads=2)
    asked = np.concatenate([counted.record_ids(step) for step in range(6)])
    batches = take(counted, 6)
    assert all(set(batch) == {"image", "index", "broken"} for batch in batches)
    assert sum(batch["broken"] for batch in batches).sum() == counted.counts.total()
    shown = np.concatenate([batch["index"] for batch in batches])
    replaced = np.isin(asked, (1, 3, 4))
    assert np.all(shown[~replaced] == asked[~replaced]) and not np.isin(shown, (1, 3, 4)).any()
    assert set(counted.counts) == {("files", kind) for kind in ("empty", "truncated", "unidentified")}
    assert counted.counts.total() >= replaced.sum() > 6  # a stand-in may be broken as well


def test_worker_processes_give_the_same_batches_and_counts(odd):
    here, there = odd(), odd(workers=2, threads=2)
    assert_same(take(here, 5, start=3), take(there, 5, start=3))
    assert here.counts == there.counts and here.counts


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
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"weights": {"other": 1.0}}, r"\['other'\] but the sources are \['data'\]"),
    ],
)
def test_settings_that_do_not_fit(numbered, settings, message):
    with pytest.raises(ValueError, match=message):
        loader(numbered, **settings)
