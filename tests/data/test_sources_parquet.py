"""Hugging Face datasets on disk."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from source_files import make_images, write_parquet, write_saved

from eupe_jax.data.sources import Parquet, RecordError
from eupe_jax.data.sources import parquet as parquet_module


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def data(source):
    return [source[i].data for i in range(len(source))]


def write_columns(path, **columns):
    pyarrow.parquet.write_table(pa.table(columns), path)
    return path


def structs(values):
    return pa.array(values, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def test_columns(tmp_path):
    images = list(make_images(4).values())
    path = write_columns(
        tmp_path / "a.parquet", picture=pa.array(images, pa.large_binary()), text=pa.array(list("abcd"))
    )
    assert data(Parquet(path, column="picture")) == images
    assert Parquet(path, column="picture")[2].name == f"{path}[2]"
    with pytest.raises(ValueError, match=r"a.parquet: no column 'image', only \['picture', 'text'\]"):
        Parquet(path)
    with pytest.raises(ValueError, match="column 'text' is string, not image bytes"):
        Parquet(path, column="text")


def test_paths_in_a_data_file_are_not_followed(tmp_path):
    images = list(make_images(3).values())
    (tmp_path / "secret.png").write_bytes(images[0])
    outside = [{"bytes": None, "path": str(tmp_path / "secret.png")}] * 3
    path = write_columns(tmp_path / "paths.parquet", image=structs(outside))
    with pytest.raises(ValueError, match="paths.parquet: column 'image' holds paths and no image bytes.*not followed"):
        Parquet(path)
    path = write_columns(tmp_path / "some.parquet", image=structs([{"bytes": images[1], "path": "x"}, *outside[:1]]))
    source = Parquet(path)
    assert source[0].data == images[1] and source[0].name == f"{path}[0]:x"
    with pytest.raises(RecordError, match=r"some.parquet\[1\]:.*it has no image bytes"):
        source[1]


def test_saved_data_sets(tmp_path):
    images = make_images()
    write_saved(tmp_path / "x" / "train", images)
    write_saved(tmp_path / "x" / "test", make_images(3))
    (tmp_path / "x" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert data(Parquet(tmp_path / "x", split="train")) == list(images.values())
    assert len(Parquet(tmp_path / "x", split="test")) == 3
    with pytest.raises(ValueError, match=r"holds the splits \['test', 'train'\]: name one"):
        Parquet(tmp_path / "x")
    state = tmp_path / "x" / "test" / "state.json"
    for content, message in [
        ('{"_data_files": [{"filename": "../train/data-00000-of-00002.arrow"}]}', "which is not a file of its folder"),
        ('{"_data_files": [{"filename": "data-00009-of-00009.arrow"}]}', "data-00009-of-00009.arrow: no such file"),
        ('{"_data_files": [], "_indices_data_files": [{"filename": "i"}]}', "a selection by indices"),
        ('{"_data_files"', "state.json is damaged"),
        ("[]", "state.json is damaged"),
    ]:
        state.write_text(content)
        with pytest.raises((ValueError, OSError), match=message):
            Parquet(tmp_path / "x", split="test")
    shard = tmp_path / "x" / "train" / "data-00001-of-00002.arrow"
    shard.write_bytes(shard.read_bytes()[:300])
    with pytest.raises((ValueError, OSError), match="data-00001-of-00002.arrow"):
        Parquet(tmp_path / "x", split="train")


def test_splits(tmp_path):
    write_parquet(tmp_path / "x", make_images())
    (tmp_path / "x" / "test-00000-of-00001.parquet").write_bytes(
        (tmp_path / "x" / "train-00000-of-00002.parquet").read_bytes()
    )
    with pytest.raises(ValueError, match="several splits, 'test', 'train'"):
        Parquet(tmp_path / "x")
    assert data(Parquet(tmp_path / "x", split="train")) == list(make_images().values())
    for split in ("train", "validation"):
        write_parquet(tmp_path / "y" / split, make_images(3), parts=1)
        (tmp_path / "y" / split / "train-00000-of-00001.parquet").rename(tmp_path / "y" / split / "0000.parquet")
    with pytest.raises(ValueError, match="several splits, 'train', 'validation'"):
        Parquet(tmp_path / "y")
    assert len(Parquet(tmp_path / "y", split="validation")) == 3


def test_a_row_group_is_loaded_once_for_all_threads_and_the_cache_is_bounded(tmp_path, monkeypatch):
    images = make_images(24)
    write_parquet(tmp_path / "x", images, parts=1, row_group_size=4)
    loaded, lock, real = [], threading.Lock(), parquet_module._load_group

    def noted(file, group, column):
        with lock:
            loaded.append(group)
        return real(file, group, column)

    source = Parquet(tmp_path / "x")
    monkeypatch.setattr(parquet_module, "_load_group", noted)
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(24), 8))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: source[int(i)].data, order)) == [list(images.values())[i] for i in order]
    assert sorted(loaded) == list(range(6))
    small = Parquet(tmp_path / "x", cache_mib=0)  # only the last one
    loaded.clear()
    for i in (0, 1, 2, 5, 6, 0):
        small[i]
    assert loaded == [0, 1, 0]


def test_cut_off_and_damaged_files(tmp_path):
    images = make_images()
    write_parquet(tmp_path / "x", images, parts=1, write_page_checksum=True, compression="none")
    path = tmp_path / "x" / "train-00000-of-00001.parquet"
    whole = path.read_bytes()
    for length in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="train-00000-of-00001.parquet: not a whole parquet or Arrow file"):
            Parquet(tmp_path / "x")
    # A flipped bit inside an image is seen where the file has checksums of its pages.
    damaged = bytearray(whole)
    damaged[whole.index(images["0005.jpg"]) + 50] ^= 4
    path.write_bytes(damaged)
    source = Parquet(tmp_path / "x")
    assert source[0].data == images["0000.png"]
    with pytest.raises(RecordError, match=r"train-00000-of-00001.parquet\[5\]: cannot be read: .*CRC"):
        source[5]
