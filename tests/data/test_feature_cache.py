import dataclasses
import itertools

import numpy as np
import pytest
from test_teacher_stage import CONFIG, CellMeans

from eupe_jax.data.augment import AugmentConfig, host_augment
from eupe_jax.data.feature_cache import FeatureCache, build_feature_cache

AUGMENT = AugmentConfig(jitter_p=0.0, blur_p=0.0)


def build(folder, photos, teacher=None, **settings):
    settings = {"seed": 2, "views": 3, "piece": 3, "threads": 1, "progress": False, **settings}
    facts = dataclasses.asdict(AUGMENT)
    teachers = {"cells": teacher or CellMeans()}
    return build_feature_cache(
        folder, photos, CONFIG, teachers, host_augment(AUGMENT, 2), augment_facts=facts, **settings
    )


@pytest.fixture(scope="module")
def cache(photos, tmp_path_factory):
    return build(tmp_path_factory.mktemp("cache"), photos)


def test_entries_are_the_teachers_features_of_their_pixels(cache, photos):
    batch = cache.entries(np.arange(24))
    want = CellMeans()(batch["image"])
    for kind in ("cls", "patches"):
        got = batch["features"]["cells"][kind]
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want[kind], rtol=2**-10, atol=1e-6)  # float16 rounding
    np.testing.assert_array_equal(batch["index"], np.tile(np.arange(8), 3))
    views = batch["image"].reshape(3, 8, 32, 32, 3)
    assert not any(np.array_equal(views[a, i], views[b, i]) for i in range(8) for a, b in [(0, 1), (1, 2), (0, 2)])
    assert cache.teachers["cells"] == CellMeans().spec


def test_epochs_show_every_record_and_in_time_every_view(cache):
    entries = np.concatenate([cache.entries_of_step(step, 4, seed=5) for step in range(6)]).reshape(3, 8)
    np.testing.assert_array_equal(np.sort(entries % 8), np.tile(np.arange(8), (3, 1)))
    assert len(np.unique(entries)) == 24
    assert len(np.unique(entries[0] // 8)) > 1  # an epoch mixes views


def test_batches_do_not_depend_on_hosts_or_on_where_one_begins(cache):
    settings = {"batch_size": 4, "seed": 5}
    whole = list(itertools.islice(cache.batches(**settings), 5))
    parts = [list(itertools.islice(cache.batches(2, **settings, process_index=i, process_count=2), 3)) for i in (0, 1)]
    for batch, a, b in zip(whole[2:], *parts, strict=True):
        np.testing.assert_array_equal(batch["image"], np.concatenate([a["image"], b["image"]]))
        np.testing.assert_array_equal(batch["index"], np.concatenate([a["index"], b["index"]]))
        joined = np.concatenate([x["features"]["cells"]["patches"] for x in (a, b)])
        np.testing.assert_array_equal(batch["features"]["cells"]["patches"], joined)
    with pytest.raises(ValueError, match="batch_size 5"):
        cache.batches(batch_size=5, seed=0, process_count=2)


def test_an_interrupted_build_goes_on_where_it_stopped(cache, photos, tmp_path):
    with pytest.raises(RuntimeError, match="fell over"):
        build(tmp_path, photos, CellMeans(fail_after=4))
    with pytest.raises(ValueError, match="unfinished feature cache, 11 of 24"):
        FeatureCache(tmp_path)
    teacher = CellMeans()
    resumed = build(tmp_path, photos, teacher)
    assert teacher.calls == 5  # of nine pieces
    for key, value in cache.entries(np.arange(24)).items():
        if key != "features":
            np.testing.assert_array_equal(resumed.entries(np.arange(24))[key], value)
    a, b = (c.entries(np.arange(24))["features"]["cells"] for c in (cache, resumed))
    np.testing.assert_array_equal(a["patches"], b["patches"])
    assert resumed.fingerprint == cache.fingerprint
    teacher = CellMeans()
    build(tmp_path, photos, teacher)
    assert teacher.calls == 0  # a finished one is only opened


def test_a_cache_of_something_else_is_refused(cache, photos, tmp_path):
    build(tmp_path, photos, records=2, views=1)
    with pytest.raises(ValueError, match="another seed"):
        build(tmp_path, photos, records=2, views=1, seed=3)
    other = CellMeans()
    other.spec = dataclasses.replace(other.spec, fingerprint="other weights")
    with pytest.raises(ValueError, match="another teachers"):
        build(tmp_path, photos, other, records=2, views=1)
    assert FeatureCache(tmp_path).fingerprint != cache.fingerprint


def test_what_is_missing_or_does_not_fit_is_said(photos, tmp_path):
    with pytest.raises(FileNotFoundError, match="manifest.json is missing"):
        FeatureCache(tmp_path)

    class Huge(CellMeans):
        def __call__(self, images):
            return {k: v * 1e6 for k, v in super().__call__(images).items()}

    with pytest.raises(ValueError, match="cells.*too large for float16"):
        build(tmp_path, photos, Huge())
    with pytest.raises(FileNotFoundError):  # nothing unusable was declared done
        FeatureCache(tmp_path)
