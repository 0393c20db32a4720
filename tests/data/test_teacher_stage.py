import itertools
import threading
import time

import numpy as np
import pytest

from eupe_jax.data import teacher_stage
from eupe_jax.data.augment import AugmentConfig, host_augment
from eupe_jax.data.host import HostConfig
from eupe_jax.data.loader import Loader
from eupe_jax.data.teacher_stage import with_host_teachers
from eupe_jax.distill.teacher_spec import TeacherSpec

CONFIG = HostConfig(size=32)


class CellMeans:
    """A teacher simple enough to check by hand: means of 8x8 cells, and of the whole picture as class token."""

    def __init__(self, name="cells", fail_after=None):
        self.spec = TeacherSpec(name, 3, 3, 8, 32, (0.0,) * 3, (1.0,) * 3, f"means of {name}")
        self.calls, self._fail_after = 0, fail_after

    def __call__(self, images):
        self.calls += 1
        if self._fail_after is not None and self.calls > self._fail_after:
            raise RuntimeError("the teacher fell over")
        x = images.astype(np.float32) / 255
        return {"cls": x.mean((1, 2)), "patches": x.reshape(-1, 4, 8, 4, 8, 3).mean((2, 4))}


@pytest.fixture(name="cells")
def cells_fixture():
    return CellMeans()


@pytest.fixture
def loader(photos):
    return Loader(photos, CONFIG, batch_size=4, seed=1, threads=1)


def test_teachers_see_the_pixels_that_are_shipped(loader, cells):
    augment = host_augment(AugmentConfig(), 1)
    with with_host_teachers(loader.batches(3), {"cells": cells}, augment, start_step=3) as stage:
        got = list(itertools.islice(stage, 3))
    plain = list(itertools.islice(loader.batches(3), 3))
    for step, (batch, raw) in enumerate(zip(got, plain, strict=True), 3):
        np.testing.assert_array_equal(batch["index"], raw["index"])
        np.testing.assert_array_equal(batch["image"], augment(step, raw["image"]))
        assert not np.array_equal(batch["image"], raw["image"])
        want = CellMeans()(batch["image"])
        for kind in ("cls", "patches"):
            np.testing.assert_array_equal(batch["features"]["cells"][kind], want[kind])


def test_features_that_a_batch_brings_stay(cells):
    batch = {"image": np.zeros((2, 32, 32, 3), np.uint8), "features": {"cached": {"patches": np.ones((2, 1, 1, 3))}}}
    with with_host_teachers([batch], {"cells": cells}) as stage:
        features = next(stage)["features"]
    assert set(features) == {"cached", "cells"}
    np.testing.assert_array_equal(features["cached"]["patches"], batch["features"]["cached"]["patches"])


def test_another_host_augments_its_own_positions(photos, loader, cells):
    augment = host_augment(AugmentConfig(), 1)
    with with_host_teachers(loader.batches(), {"cells": cells}, augment) as stage:
        whole = next(stage)["image"]
    here = np.array([1, 3])
    second = loader.batches(positions=here)
    with with_host_teachers(second, {"cells": CellMeans()}, augment, positions=here) as stage:
        np.testing.assert_array_equal(next(stage)["image"], whole[here])


def test_it_works_ahead_and_no_further_than_asked(loader, cells):
    with with_host_teachers(loader.batches(), {"cells": cells}, ahead=2) as stage:
        next(stage)
        deadline = time.time() + 10
        while cells.calls < 4 and time.time() < deadline:  # one taken, two queued, one in hand
            time.sleep(0.02)
        time.sleep(0.3)
        assert cells.calls == 4


def test_an_error_reaches_the_consumer_after_the_good_batches(loader):
    stage = with_host_teachers(loader.batches(), {"cells": CellMeans(fail_after=2)})
    next(stage), next(stage)
    with pytest.raises(ValueError, match="host teacher 'cells' failed: RuntimeError: the teacher fell over"):
        next(stage)
    with pytest.raises(StopIteration):
        next(stage)


def test_a_stuck_teacher_does_not_keep_the_run_from_ending(loader, cells, monkeypatch, caplog):
    free = threading.Event()

    class Stuck(CellMeans):
        def __call__(self, images):
            free.wait()
            return super().__call__(images)

    monkeypatch.setattr(teacher_stage, "_PATIENCE", 0.2)
    stage = with_host_teachers(loader.batches(), {"cells": Stuck()})
    stage.close()
    assert "stuck" in caplog.text
    free.set()


def test_a_teacher_that_breaks_its_spec_is_named(loader):
    teacher = CellMeans("liar")
    teacher.spec = TeacherSpec("liar", None, 5, 8, 32, (0.0,) * 3, (1.0,) * 3, "x")
    with with_host_teachers(loader.batches(), {"liar": teacher}) as stage, pytest.raises(ValueError, match="'liar'"):
        next(stage)


def _threads():
    return [t for t in threading.enumerate() if t.name == "host-teachers"]


def test_closing_or_dropping_it_stops_its_thread_and_the_batches(loader, cells):
    class Batches:
        closed = False

        def __init__(self):
            self._batches = loader.batches()

        def __iter__(self):
            return self

        def __next__(self):
            return next(self._batches)

        def close(self):
            self.closed = True
            self._batches.close()

    closed, dropped = Batches(), Batches()
    stage = with_host_teachers(closed, {"cells": cells})
    next(stage)
    stage.close()
    stage.close()
    assert closed.closed and not _threads()
    stage = with_host_teachers(dropped, {"cells": cells})
    next(stage)
    del stage
    deadline = time.time() + 10
    while _threads() and time.time() < deadline:
        time.sleep(0.02)
    assert dropped.closed and not _threads()


def test_finite_batches_end(cells):
    batches = [{"image": np.zeros((2, 32, 32, 3), np.uint8), "index": np.arange(2)}] * 3
    assert len(list(with_host_teachers(batches, {"cells": cells}))) == 3


def test_the_real_experts_beside_a_loader(photos):
    from eupe_jax.distill.host_teachers import load_host_teacher

    module = "eupe_jax.distill.host_teachers"
    try:
        teachers = {
            "image": load_host_teacher(f"{module}:EfficientNetLite0", resolution=64),
            "text": load_host_teacher(f"{module}:PPOCRv4Detector", resolution=64),
        }
    except ImportError as e:
        pytest.skip(str(e))
    loader = Loader(photos, HostConfig(size=64), batch_size=4, seed=1, threads=1)
    with with_host_teachers(loader.batches(), teachers) as stage:
        features = next(stage)["features"]
    shapes = {name: {kind: x.shape for kind, x in kinds.items()} for name, kinds in features.items()}
    assert shapes == {
        "image": {"cls": (4, 1280), "patches": (4, 4, 4, 112)},
        "text": {"patches": (4, 4, 4, 96)},
    }
