"""Every source gives the same records, whatever they lie in."""

import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from source_files import (
    make_images,
    write_array_records,
    write_folder,
    write_parquet,
    write_saved,
    write_tars,
)

from eupe_jax.data.sources import KINDS, RecordError, open_source, source_options
from eupe_jax.data.sources.record_codec import pack_record, unpack_record


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def packed(images):
    return [pack_record(name, data) for name, data in images.items()]


CONTAINERS = {
    "folder": ("images", lambda p, images: write_folder(p, images), {}),
    "tars in a folder": ("images", lambda p, images: write_tars(p, images), {}),
    "tar shards": ("tar", lambda p, images: write_tars(p, images), {}),
    "parquet": ("parquet", lambda p, images: write_parquet(p, images), {}),
    "parquet, no cache": ("parquet", lambda p, images: write_parquet(p, images), {"cache_mib": 0}),
    "parquet, binary": ("parquet", lambda p, images: write_parquet(p, images, binary=True), {}),
    "save_to_disk": ("parquet", lambda p, images: write_saved(p, images), {}),
    "packed": ("array_record", lambda p, images: write_array_records(p, packed(images)), {}),
    "packed, compressed": (
        "array_record",
        lambda p, images: write_array_records(p, packed(images), options="group_size:2"),
        {},
    ),
    "raw records": ("array_record", lambda p, images: write_array_records(p, list(images.values())), {}),
}


@pytest.fixture(params=CONTAINERS)
def container(request, tmp_path):
    return CONTAINERS[request.param], tmp_path / "data"


def test_every_container_gives_the_same_records(container):
    (kind, write, options), folder = container
    images = make_images()
    write(folder, images)
    source = open_source(kind, str(folder), **options)
    expected = list(images.values())
    assert [source[i].data for i in range(len(source))] == expected
    assert source[np.int64(-1)] == source[len(source) - 1]
    for outside in (len(source), -len(source) - 1):
        with pytest.raises(IndexError):
            source[outside]
    names = [source[i].name for i in range(len(source))]
    assert len(set(names)) == len(names)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.digest == source.digest and copy[3] == source[3]
    order = np.random.default_rng(1).integers(0, len(source), 150)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: copy[int(i)].data, order)) == [expected[i] for i in order]


def test_digests_follow_content_and_not_the_place(container, tmp_path):
    (kind, write, options), folder = container
    write(folder, make_images())
    write(tmp_path / "copy", make_images())
    write(tmp_path / "longer", make_images(count=10))
    digests = [open_source(kind, str(p), **options).digest for p in (folder, tmp_path / "copy", tmp_path / "longer")]
    assert digests[0] == digests[1] != digests[2]


def test_open_descriptors_are_bounded(tmp_path):
    images = make_images(count=250)
    write_tars(tmp_path / "tars", images, parts=250)
    write_array_records(tmp_path / "records", packed(images), parts=250)
    for kind, folder in (("tar", "tars"), ("array_record", "records")):
        before = len(os.listdir("/proc/self/fd"))
        source = open_source(kind, str(tmp_path / folder))
        assert [source[i].data for i in range(250)] == list(images.values())
        assert 64 <= len(os.listdir("/proc/self/fd")) - before <= 64 + 128 + 5  # shards, mapped tables
        del source
        assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_kinds_and_options_by_name(tmp_path):
    folder = str(write_folder(tmp_path / "images", make_images()))
    assert {"images", "tfds", "photos", "synthetic", "array_record", "tar", "parquet"} == set(KINDS)
    assert source_options("parquet") == ("column", "split", "cache_mib", "index_dir")
    for arguments, options, message in [
        (("magic", folder), {}, "data.sources.a.kind is 'magic': use one of 'array_record'"),
        (("tar", ""), {}, "data.sources.a.path is empty"),
        (("images", folder), {"colour": 1}, "data.sources.a.options.colour is not an option of kind 'images'"),
        (("synthetic",), {}, "data.sources.a.options.size is missing"),
        (("parquet", folder), {"cache_mib": -1}, "data.sources.a: cache_mib must not be negative"),
        (("array_record", folder), {"layout": "loose"}, "data.sources.a: layout must be"),
        (("tar", folder), {}, "data.sources.a: .*no tar shards found"),
        (("parquet", f"{folder}/gone"), {}, "data.sources.a: .*gone: no such file or folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_source(*arguments, field="data.sources.a", **options)
    assert len(open_source("synthetic", size=24, count=5)) == 5


@pytest.mark.parametrize("name", ["a.jpg", "ümlaut/日本.png", "not\udcffutf8", ""])
def test_codec_round_trip_and_damage(name):
    data = bytes(range(256)) * 3
    record = pack_record(name, data)
    assert unpack_record(record) == (data, name) and record == pack_record(name, data)
    for cut in range(len(record)):
        with pytest.raises(RecordError, match="^shard\\[3\\]: "):
            unpack_record(record[:cut], "shard[3]")
    generator = np.random.default_rng(0)
    for bit in generator.integers(0, 8 * len(record), 300):
        flipped = bytearray(record)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RecordError):
            unpack_record(bytes(flipped))
    with pytest.raises(RecordError, match="that says it has"):
        unpack_record(record + b"x")
