import dataclasses
import itertools
import json
import logging
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from test_teacher_stage import CONFIG, CellMeans

from eupe_jax.data.augment import AugmentConfig, augment_uint8, draws, host_augment
from eupe_jax.data.feature_builder import build_feature_cache
from eupe_jax.data.feature_cache import MANIFEST, PROGRESS, FeatureCache
from eupe_jax.data.feature_codec import decode_features, encode_features, pack_arrays, unpack_arrays
from eupe_jax.data.host import HostConfig, RecordReader, decode
from eupe_jax.data.sources import ArraySource, Record
from eupe_jax.data.teacher_stage import run_teachers

AUGMENT = AugmentConfig(jitter_p=0.0, blur_p=0.0)
SEED = 2
EVERY = np.arange(24)


def forward_with(teachers):
    def forward(view, images, first):
        key, positions = jax.random.key(SEED), first + np.arange(len(images))
        pixels, keys = map(np.asarray, augment_uint8(key, view, positions, images, AUGMENT))
        return pixels, keys, run_teachers(teachers, pixels)

    return forward


def build(folder, source, teacher=None, config=CONFIG, **settings):
    settings = {"seed": SEED, "views": 3, "piece": 3, "threads": 1, "progress": False, "shards": 3, **settings}
    teachers = {"cells": teacher or CellMeans()}
    specs = {name: teacher.spec for name, teacher in teachers.items()}
    return build_feature_cache(folder, source, config, specs, forward_with(teachers), **settings)


@pytest.fixture(scope="module")
def cache(photos, tmp_path_factory):
    return build(tmp_path_factory.mktemp("cache"), photos)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def flip_a_bit(path, place):
    whole = path.read_bytes()
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])


def test_entries_are_the_teachers_features_of_their_pixels(cache):
    batch = cache.entries(EVERY)
    want = CellMeans()(batch["image"])
    for kind in ("cls", "patches"):
        got = batch["features"]["cells"][kind]
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want[kind], rtol=2**-8)  # bfloat16 rounding
    np.testing.assert_array_equal(batch["index"], np.tile(np.arange(8), 3))
    views = batch["image"].reshape(3, 8, 32, 32, 3)
    assert not any(np.array_equal(views[a, i], views[b, i]) for i in range(8) for a, b in [(0, 1), (1, 2), (0, 2)])
    assert cache.teachers["cells"] == CellMeans().spec


def test_pixels_are_those_of_the_loader_and_the_hosts_augmentation(cache, photos):
    reader, run_augment = RecordReader(CONFIG, SEED), host_augment(AUGMENT, SEED)
    for view in range(3):
        cropped = np.stack([reader(photos, i, view, i)[0] for i in range(8)])
        got = cache.entries(view * 8 + np.arange(8))["image"]
        np.testing.assert_array_equal(got, run_augment(view, cropped))


def test_box_and_key_give_the_view_again(cache, photos):
    for entry in (0, 13, 23):
        stored = cache.read(entry)
        crop = Image.fromarray(decode(photos[entry % 8]))
        crop = crop.resize((32, 32), Image.Resampling.BICUBIC, box=tuple(stored["box"].tolist()))
        drawn = draws(jax.random.wrap_key_data(stored["key"])[None], AUGMENT)
        x = np.asarray(crop).astype(np.int64)
        x = x[:, ::-1] if drawn.flip[0] else x
        x = np.round(x @ [0.2989, 0.587, 0.114])[..., None] if drawn.grayscale[0] else x
        x = np.where(x >= 128, 255 - x, x) if drawn.solarize[0] else x
        # A JPEG may be decoded smaller before it is cropped, which moves values a little.
        assert np.abs(x - stored["image"].astype(np.int64)).mean() < 4


def test_boxes_of_stand_ins_for_broken_records(encode, tmp_path):
    # One colour a pixel row, so that a crop's rows tell where it lies; the second record is no image.
    good = encode(np.tile(np.arange(0, 200, 2, dtype=np.uint8)[:, None, None], (1, 100, 3)))

    class Source:
        digest = "rows"

        def __len__(self):
            return 3

        def __getitem__(self, index):
            return Record(good[: len(good) // 2] if index == 1 else good, f"record {index}")

    config = HostConfig(size=32, max_broken_fraction=1.0)
    cache = build(tmp_path, Source(), config=config, views=8, shards=1)
    stand_ins = 0
    for entry in range(24):
        stored = cache.read(entry)
        stand_ins += entry % 3 == 1
        assert stored["index"] != 1
        if not draws(jax.random.wrap_key_data(stored["key"])[None], AUGMENT).solarize[0]:
            _, top, _, bottom = stored["box"]
            rows = stored["image"][:, :, 0].mean(axis=1)
            middle = (top + np.arange(0.5, 32) * (bottom - top) / 32 - 0.5) * 2
            np.testing.assert_allclose(rows[4:-4], middle[4:-4], atol=1.5)
    assert stand_ins == 8


def test_epochs_show_every_record_and_in_time_every_view(cache):
    entries = np.concatenate([cache.entries_of_step(step, 4, seed=5) for step in range(6)]).reshape(3, 8)
    np.testing.assert_array_equal(np.sort(entries % 8), np.tile(np.arange(8), (3, 1)))
    assert len(np.unique(entries)) == 24
    assert len(np.unique(entries[0] // 8)) > 1  # an epoch mixes views


def test_batches_do_not_depend_on_hosts_or_on_where_one_begins(cache):
    def take(start, count, **settings):
        with cache.batches(start, batch_size=4, seed=5, **settings) as batches:
            return list(itertools.islice(batches, count))

    parts = [take(2, 3, positions=here) for here in ([0, 1], [2, 3])]
    for batch, a, b in zip(take(0, 5)[2:], *parts, strict=True):
        np.testing.assert_array_equal(batch["image"], np.concatenate([a["image"], b["image"]]))
        np.testing.assert_array_equal(batch["index"], np.concatenate([a["index"], b["index"]]))
        joined = np.concatenate([x["features"]["cells"]["patches"] for x in (a, b)])
        np.testing.assert_array_equal(batch["features"]["cells"]["patches"], joined)


def test_an_interrupted_build_goes_on_and_ends_with_the_same_bytes(cache, photos, tmp_path):
    with pytest.raises(ValueError, match="'cells' failed: RuntimeError: the teacher fell over"):
        build(tmp_path, photos, CellMeans(fail_after=4))
    with pytest.raises(ValueError, match="unfinished feature cache, 1 of 3 shards"):
        FeatureCache(tmp_path)
    assert sorted(contents(tmp_path)) == ["progress.json", "views-00000-of-00003.array_record"]
    # What a killed process leaves: half a shard under a temporary name, or a whole one that is not yet recorded.
    (tmp_path / "views-00001-of-00003.array_record.partial").write_bytes(b"half")
    (tmp_path / "views-00001-of-00003.array_record").write_bytes(b"not recorded")
    (tmp_path / ".progress.json.12345.partial").write_bytes(b"{")
    teacher = CellMeans()
    build(tmp_path, photos, teacher)
    assert teacher.calls == 6  # of nine pieces
    assert contents(tmp_path) == contents(cache.folder)
    teacher = CellMeans()
    assert build(tmp_path, photos, teacher).fingerprint == cache.fingerprint
    assert teacher.calls == 0  # a finished one is only opened


@pytest.fixture
def copied(cache, tmp_path):
    return shutil.copytree(cache.folder, tmp_path / "copied")


def second_shard(folder):
    return folder / "views-00001-of-00003.array_record"


@pytest.mark.parametrize(
    ("harm", "calls"),
    [
        (lambda folder: second_shard(folder).unlink(), 3),
        (lambda folder: second_shard(folder).write_bytes(second_shard(folder).read_bytes()[:-1]), 3),
        # Killed while it was being repaired, before or after the manifest was taken back.
        (lambda folder: (second_shard(folder).unlink(), shutil.copy(folder / MANIFEST, folder / PROGRESS)), 3),
        (lambda folder: (second_shard(folder).unlink(), (folder / MANIFEST).rename(folder / PROGRESS)), 3),
        (lambda folder: (folder / MANIFEST).rename(folder / PROGRESS), 0),
    ],
    ids=["gone", "cut off", "both lists", "unfinished", "all but renamed"],
)
def test_what_is_lost_is_built_anew(cache, photos, copied, harm, calls):
    harm(copied)
    teacher = CellMeans()
    assert build(copied, photos, teacher).fingerprint == cache.fingerprint
    assert teacher.calls == calls  # three pieces make a shard
    assert contents(copied) == contents(cache.folder)


def test_damage_is_built_anew_when_it_is_looked_for(cache, photos, copied):
    flip_a_bit(second_shard(copied), second_shard(copied).stat().st_size // 2)
    teacher = CellMeans()
    assert build(copied, photos, teacher).verify(progress=False) != []  # of the right size
    assert teacher.calls == 0
    with pytest.raises(ValueError, match="'cells' failed: RuntimeError: the teacher fell over"):
        build(copied, photos, CellMeans(fail_after=1), verify=True)
    with pytest.raises(ValueError, match="unfinished feature cache, 2 of 3 shards"):
        FeatureCache(copied)
    assert build(copied, photos, teacher).verify(progress=False) == []
    assert teacher.calls == 3
    assert contents(copied) == contents(cache.folder)


def test_stand_ins_come_from_the_records_in_use(tmp_path):
    class Growing:
        """Every other record is broken; from the fifth on all are for another use."""

        digest = "growing"

        def __len__(self):
            return 1000

        def __getitem__(self, index):
            assert index < 4
            return Record(b"no image" if index % 2 else np.zeros((40, 40, 3), np.uint8), f"record {index}")

    config = HostConfig(size=32, max_broken_fraction=1.0)
    cache = build(tmp_path, Growing(), config=config, records=4, views=4, shards=1)
    assert {int(cache.read(entry)["index"]) for entry in range(16)} == {0, 2}


def test_two_builds_in_one_folder_do_not_mix(photos, tmp_path):
    class Second(CellMeans):
        def __call__(self, images):
            with pytest.raises(OSError, match="another process is building"):
                build(tmp_path, photos, **settings)
            return super().__call__(images)

    settings = {"records": 2, "views": 1, "shards": 1}
    build(tmp_path, photos, Second(), **settings)
    assert FeatureCache(tmp_path).verify(progress=False) == []


def test_a_cache_of_something_else_is_refused(cache, photos, tmp_path):
    build(tmp_path, photos, records=2, views=1, shards=1)
    settings = {"records": 2, "views": 1, "shards": 1}
    with pytest.raises(ValueError, match="another seed"):
        build(tmp_path, photos, **settings | {"seed": 3})
    with pytest.raises(ValueError, match="another precision"):
        build(tmp_path, photos, **settings | {"precision": "int8"})
    other = CellMeans()
    other.spec = dataclasses.replace(other.spec, fingerprint="other weights")
    with pytest.raises(ValueError, match="another teachers"):
        build(tmp_path, photos, other, **settings)
    assert FeatureCache(tmp_path).fingerprint != cache.fingerprint


def test_what_is_missing_or_does_not_fit_is_said(photos, tmp_path):
    with pytest.raises(FileNotFoundError, match="manifest.json is missing"):
        FeatureCache(tmp_path)
    with pytest.raises(ValueError, match="precision is 'float8'"):
        build(tmp_path, photos, precision="float8")
    with pytest.raises(ValueError, match="no cache of 30 shards"):
        build(tmp_path, photos, shards=30)
    with pytest.raises(ValueError, match="local folder"):
        build("gs://bucket/cache", photos)

    class Endless(CellMeans):
        def __call__(self, images):
            return {k: v * np.inf for k, v in super().__call__(images).items()}

    with pytest.raises(ValueError, match="cells.*not finite"):
        build(tmp_path, photos, Endless())
    with pytest.raises(ValueError, match="0 of 3 shards"):  # nothing unusable was declared done
        FeatureCache(tmp_path)


def test_damage_is_found_and_named(cache, photos, tmp_path):
    build(tmp_path, photos)
    path = tmp_path / "views-00001-of-00003.array_record"
    whole = path.read_bytes()
    needle = cache.read(8 + 3)["image"].tobytes()[:64]  # entries 8..15 are the second shard
    flip_a_bit(path, whole.index(needle))
    damaged = FeatureCache(tmp_path)
    with pytest.raises(OSError, match="views-00001-of-00003.array_record: record 3: "):
        damaged.read(8 + 3)
    with pytest.raises(OSError, match="record 3"):
        damaged.entries(EVERY)
    damaged.entries(EVERY[EVERY != 11])
    of_file, of_record = damaged.verify(progress=False)
    assert of_file == f"{path}: its sha256 is not the manifest's"
    assert of_record.startswith(f"{path}: record 3: ")
    assert cache.verify(progress=False) == []

    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="00001-of-00003.array_record has .* bytes, not"):
        FeatureCache(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="00001-of-00003.array_record is missing"):
        FeatureCache(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    lacking = manifest | {"recipe": {k: v for k, v in manifest["recipe"].items() if k != "views"}}
    for content, words in (
        ("{", "no manifest"),
        (json.dumps(manifest | {"format": 1}), "format 1"),
        (json.dumps(manifest | {"shards": [{"file": "x"}]}), "no manifest .*'records'"),
        (json.dumps(lacking), "not as it was written .*views"),
        (json.dumps(manifest | {"shards": []}), "do not hold 24 entries"),
    ):
        (tmp_path / MANIFEST).write_text(content)
        with pytest.raises(ValueError, match=words):
            FeatureCache(tmp_path)


def test_chains_of_distilled_teachers_travel_with_the_cache(photos, tmp_path):
    arrays = {"adapters/a_cls/fc1/kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}
    chains = {"cells": {"header": {"adapters": {"eps": 1e-5}}, "arrays": arrays}}
    cache = build(tmp_path, photos, records=2, views=1, shards=1, chains=chains)
    header, got = cache.chain("cells")
    assert header == {"adapters": {"eps": 1e-5}}
    np.testing.assert_array_equal(got["adapters/a_cls/fc1/kernel"], arrays["adapters/a_cls/fc1/kernel"])
    assert cache.chain("another") is None
    path = tmp_path / "chain-cells.safetensors"
    whole = contents(tmp_path)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="chain-cells.safetensors is damaged"):
        cache.chain("cells")
    assert len(cache.verify(progress=False)) == 1
    build(tmp_path, photos, records=2, views=1, shards=1, chains=chains)
    assert contents(tmp_path) == whole


def test_rounding_stays_within_what_is_promised():
    generator = np.random.default_rng(0)
    x = generator.standard_normal((3, 5, 5, 7)).astype(np.float32) * np.geomspace(1e-6, 1e4, 7, dtype=np.float32)
    x[0, :, :, 2] = 0  # a channel that is zero everywhere
    tokens = {"cls": x[:, 0, 0], "patches": x}
    for precision, bound in (("bf16", np.abs(x) * 2**-8), ("int8", np.abs(x).max((1, 2), keepdims=True) / 253.9)):
        stored = encode_features("t", tokens, precision)
        got = {kind: np.empty_like(value) for kind, value in tokens.items()}
        for j in range(3):
            record = pack_arrays("entry", {key: value[j] for key, value in stored.items()})
            for kind, out in got.items():
                decode_features(f"t.{kind}", unpack_arrays(record), out[j])
        assert np.all(np.abs(got["patches"] - x) <= bound)
        np.testing.assert_allclose(got["cls"], tokens["cls"], rtol=2**-8)
    assert stored["t.patches"].dtype == np.int8 and stored["t.patches.scale"].shape == (3, 7)


def test_records_are_checked_and_hold_plain_arrays_only():
    record = pack_arrays("r", {"x": np.arange(3), "s": np.array(2.0, np.float32)})
    got = unpack_arrays(record)
    np.testing.assert_array_equal(got["x"], np.arange(3))
    assert got["s"].shape == () and got["s"] == 2
    for place in range(len(record)):
        damaged = record[:place] + bytes([record[place] ^ 16]) + record[place + 1 :]
        with pytest.raises((OSError, ValueError), match="here"):
            unpack_arrays(damaged, "here")
    with pytest.raises(ValueError, match="object"):
        pack_arrays("r", {"x": np.array([None])})


def test_broken_records_are_logged_by_name(photos, tmp_path, caplog, encode):
    images = ArraySource([np.zeros((40, 40, 3), np.uint8)] * 4)

    class OneBroken:
        digest = "one"

        def __len__(self):
            return 4

        def __getitem__(self, index):
            return Record(b"no image", "record two") if index == 2 else images[index]

    with caplog.at_level(logging.WARNING):
        cache = build(tmp_path, OneBroken(), views=1, shards=1, config=HostConfig(size=32, max_broken_fraction=0.5))
    assert "record two" in caplog.text
    assert cache.read(2)["index"] != 2
