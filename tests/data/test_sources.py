import os
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from source_files import prepare_tfds

from eupe_jax.data.host import BrokenRecord, HostConfig, decode
from eupe_jax.data.loader import Loader
from eupe_jax.data.sources import ArrayRecordSource, ArraySource, ImageFolder, Tfds, open_source


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (10, 12, 3), np.uint8)


@pytest.fixture
def folder(tmp_path, encode, picture):
    for name in ["b/2.png", "a/1.PNG", "a/deep/0.png", ".hidden.png", "notes.txt", "b/._2.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encode(picture))
    with tarfile.open(tmp_path / "c.tar", "w") as tar:
        for name in ["x.png", "x.cls", "y.png"]:
            (tmp_path / "member").write_bytes(encode(picture[::-1]) if name == "y.png" else encode(picture))
            tar.add(tmp_path / "member", name)
    (tmp_path / "member").unlink()
    return tmp_path


def test_folder_is_sorted_recursive_and_reads_tars(folder, picture):
    source = ImageFolder(folder)
    names = [os.path.relpath(source[i].name, folder) for i in range(len(source))]
    assert names == ["a/1.PNG", "a/deep/0.png", "b/2.png", "c.tar:x.png", "c.tar:y.png"]
    for i in range(4):
        np.testing.assert_array_equal(decode(source[i]), picture)
    np.testing.assert_array_equal(decode(source[4]), picture[::-1])


def test_one_tar_is_a_folder(folder, picture):
    source = ImageFolder(folder / "c.tar")
    assert source[1].name == f"{folder}/c.tar:y.png"
    np.testing.assert_array_equal(decode(source[1]), picture[::-1])


def test_sources_pickle_and_digests_follow_content(folder, photos, encode, picture):
    source = ImageFolder(folder)
    copy = pickle.loads(pickle.dumps(source))
    assert copy[3] == source[3] and copy.digest == source.digest == ImageFolder(folder).digest
    (folder / "z.png").write_bytes(encode(picture))
    assert ImageFolder(folder).digest != source.digest
    assert pickle.loads(pickle.dumps(photos)).digest == photos.digest
    arrays = ArraySource([picture])
    assert arrays.digest == ArraySource(picture[None]).digest != ArraySource([picture[::-1]]).digest


def test_a_link_back_up_ends(folder):
    (folder / "b" / "loop").symlink_to(folder)
    assert len(ImageFolder(folder)) == 5


def test_links_to_nowhere(folder):
    (folder / "notes.lnk").symlink_to(folder / "gone")
    assert len(ImageFolder(folder)) == 5
    (folder / "b" / "3.png").symlink_to(folder / "gone")
    with pytest.raises(OSError, match="b/3.png: no such file"):
        ImageFolder(folder)


def test_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such image folder: .*gone"):
        ImageFolder(tmp_path / "gone")
    with pytest.raises(ValueError, match="no images found.*jpg"):
        ImageFolder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such image folder: memory://nowhere"):
        ImageFolder("memory://nowhere")
    (tmp_path / "bad.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match="bad.tar.*uncompressed tar"):
        ImageFolder(tmp_path)


def test_array_source_checks_and_names(picture):
    assert ArraySource([picture], ["one"])[0].name == "one"
    assert ArraySource([picture])[0].name == "array[0]"
    with pytest.raises(ValueError, match="2 names for 1"):
        ArraySource([picture], ["a", "b"])
    with pytest.raises(ValueError, match="image 0 must be uint8"):
        ArraySource([picture.astype(np.float32)])
    with pytest.raises(ValueError, match="no images"):
        ArraySource([])


def test_packaged_photos_are_colour_photographs(photos):
    assert len(photos) == 8 and "chelsea" in photos.names
    for i in range(len(photos)):
        image = decode(photos[i])
        assert min(image.shape[:2]) >= 300 and np.ptp(image.astype(int), axis=-1).mean() > 5


@pytest.fixture(scope="module")
def tfds():
    return pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is not installed")


def test_tfds_split_without_tensorflow(tfds, tmp_path, picture, encode):
    images = [{"image": encode(np.full_like(picture, 40 * i + 10))} for i in range(3)]
    prepare_tfds(tmp_path, "tiny", "1.0.0", {"image": tfds.features.Image()}, {"train": images})
    source = Tfds("tiny", "train", data_dir=str(tmp_path))
    source = pickle.loads(pickle.dumps(source))
    assert len(source) == 3 and isinstance(source[0].data, bytes) and source[2].name == "tiny/train[2]"
    assert sorted(int(decode(source[i]).mean()) for i in range(3)) == [10, 50, 90]
    # The same files as plain ArrayRecord, of tf.train.Example.
    records = ArrayRecordSource(tmp_path / "tiny" / "1.0.0", key="image", index_dir=str(tmp_path / "index"))
    assert [records[i].data for i in range(3)] == [source[i].data for i in range(3)]
    for arguments, options, message in [
        (("tiny", "train"), {"image_key": "picture"}, r"no feature 'picture', only \['image'\]"),
        (("tiny", "trian"), {}, r"tfds 'tiny' split 'trian' in .* it has the splits \['train'\]"),
        (("no_such_set",), {}, "'no_such_set' .* knows none of that name, and .* holds none"),
        (("imagenet2012",), {}, "nothing is prepared in .*imagenet2012/5.1.0; prepare it once with file_format='arr"),
    ]:
        with pytest.raises(ValueError, match=message) as e:
            Tfds(*arguments, data_dir=str(tmp_path), **options)
        assert len(str(e.value).splitlines()) == 1
    assert "tensorflow" not in sys.modules


def test_imagenet2012_by_its_name(tfds, tmp_path, picture, encode):
    features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(num_classes=1000),
        "file_name": tfds.features.Text(),
    }
    splits = {
        split: [
            {"image": encode(np.full_like(picture, 20 * i), "JPEG"), "label": i, "file_name": f"{i}.JPEG"}
            for i in range(count)
        ]
        for split, count in (("train", 6), ("validation", 2))
    }
    prepare_tfds(tmp_path, "imagenet2012", "5.1.0", features, splits)
    source = open_source("tfds", "imagenet2012", data_dir=str(tmp_path))
    assert sorted(int(decode(source[i]).mean()) for i in range(6)) == [0, 20, 40, 60, 80, 100]
    assert len(open_source("tfds", "imagenet2012:validation", data_dir=str(tmp_path))) == 2
    assert len(open_source("tfds", "imagenet2012:train[:50%]", data_dir=str(tmp_path))) == 3
    with pytest.raises(ValueError, match=r"^source: .*it has the splits \['train', 'validation'\]"):
        open_source("tfds", "imagenet2012:val", data_dir=str(tmp_path))


@pytest.fixture
def real_data():
    path = Path(os.environ.get("EUPE_DATA_DIR", Path(__file__).parents[3] / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no image data in {path}; set EUPE_DATA_DIR")
    return path


def test_a_folder_with_odd_files_among_real_photos(real_data):
    source = ImageFolder(real_data / "photos")
    names = [os.path.basename(source.name(i)) for i in range(len(source))]
    broken = set()
    for i, name in enumerate(names):
        try:
            image = decode(source[i])
        except BrokenRecord:
            broken.add(name)
        else:
            assert image.ndim == 3 and image.shape[2] == 3
            assert image.min() < 250 or name == "gray16.png"  # nothing clipped to white
    assert broken == {"truncated.jpg", "zero_bytes.jpg", "html_page.jpg"}
    loader = Loader(source, HostConfig(size=64), batch_size=35, seed=0, threads=2)
    batches = loader.batches()
    shown = {names[i] for _ in range(2) for i in next(batches)["index"]}
    batches.close()
    assert not shown & broken and {"cmyk.jpg", "gray16.png", "png_renamed.jpg"} <= shown


def test_web_dataset_shards_are_read_in_place(real_data):
    source = ImageFolder(real_data / "caltech101")
    assert len(source) == 3030 + 1101
    assert len(ImageFolder(real_data / "tiny_imagenet_unlabelled")) == 12_000
    for i in (0, 2000, len(source) - 1):
        assert min(decode(source[i]).shape[:2]) >= 80
