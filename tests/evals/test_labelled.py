"""Labelled sets: both layouts give what was written, and what is broken is named."""

import shutil

import numpy as np
import pytest

from eupe_jax.data.host import decode
from eupe_jax.evals import labelled
from eupe_jax.evals.interface import DataError
from tests.evals.image_sets import CLASSES, jpeg, picture, samples, write_folders, write_shards, write_tar


def test_shards_give_the_images_and_labels_written(tmp_path):
    train, test = labelled.load_train_test(write_shards(tmp_path, 13, 6))
    assert train.classes == test.classes == CLASSES
    assert (train.split, test.split, len(train), len(test)) == ("train", "test", 13, 6)
    assert train.labels.tolist() == [i % 3 for i in range(13)] and train.labels.dtype == np.int32
    for i in (0, 7, 12):
        assert train[i].data == jpeg(picture(i % 3, i))
        assert decode(train[i]).shape == (36, 40, 3)
    assert train[7].name == f"{tmp_path}/train-000001.tar:picture_0007.jpg"


def test_class_may_be_given_by_number(tmp_path):
    write_shards(tmp_path)
    write_tar(tmp_path / "test-000000.tar", [("a.jpg", jpeg(picture(0, 0))), ("a.cls", b"2\n")])
    assert labelled.load_test(tmp_path).labels.tolist() == [2]


def test_image_folder_numbers_sorted_classes(tmp_path):
    train, val = labelled.load_train_test(write_folders(tmp_path))
    assert train.classes == val.classes == tuple(sorted(CLASSES))
    assert (val.split, len(train), len(val)) == ("val", 9, 3)
    for i in range(9):
        assert f"/{train.classes[train.labels[i]]}/" in train[i].name


def test_the_split_to_test_on_can_be_named(tmp_path):
    """ImageNet unpacked has a folder test/ without classes beside val/."""
    write_folders(tmp_path)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.jpg").write_bytes(IMAGE)
    assert labelled.load_train_test(tmp_path).test.split == "val"
    with pytest.raises(DataError, match="test"):
        labelled.load_train_test(tmp_path, "test")


def test_class_list_decides_the_labels_of_an_image_folder(tmp_path):
    write_folders(tmp_path)
    (tmp_path / "classes.txt").write_text("unused\n" + "\n".join(CLASSES))
    train = labelled.load_split(tmp_path, "train")
    assert train.classes == ("unused", *CLASSES)
    assert sorted(set(train.labels.tolist())) == [1, 2, 3]


def test_a_tar_file_stands_for_a_class_folder(tmp_path):
    plain = labelled.load_split(write_folders(tmp_path / "plain"), "train")
    folder = tmp_path / "packed" / "train"
    folder.mkdir(parents=True)
    for name in CLASSES:
        files = sorted((tmp_path / "plain" / "train" / name).iterdir())
        write_tar(folder / f"{name}.tar", [(f.name, f.read_bytes()) for f in files])
    packed = labelled.load_split(tmp_path / "packed", "train")
    assert packed.classes == plain.classes and packed.labels.tolist() == plain.labels.tolist()
    assert [packed[i].data for i in range(9)] == [plain[i].data for i in range(9)]


def test_digest_follows_images_labels_and_classes(tmp_path):
    digests = {labelled.load_split(write_shards(tmp_path / "same"), "train").digest}
    assert digests == {labelled.load_split(write_shards(tmp_path / "copy"), "train").digest}
    changed = [samples(6), samples(6), samples(6)]
    changed[0][0] = ("picture_0000.jpg", jpeg(picture(0, 5)))
    changed[1][1] = ("picture_0000.cls", b"plain")
    changed[2][0], changed[2][1] = ("renamed.jpg", changed[2][0][1]), ("renamed.cls", changed[2][1][1])
    for i, members in enumerate(changed):
        write_tar(write_shards(tmp_path / str(i)) / "train-000000.tar", members)
        digests.add(labelled.load_split(tmp_path / str(i), "train").digest)
    (write_shards(tmp_path / "classes") / "classes.txt").write_text("\n".join((*CLASSES, "more")))
    digests.add(labelled.load_split(tmp_path / "classes", "train").digest)
    assert len(digests) == 5


def _cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def _members(path, *members):
    write_tar(path, members)


IMAGE = jpeg(picture(0, 0))
BROKEN_SHARDS = {
    "image without class": (
        lambda f: _members(f / "train-000001.tar", ("a.jpg", IMAGE)),
        r"train-000001.tar.*'a'.*a\.cls",
    ),
    "class without image": (
        lambda f: _members(f / "train-000001.tar", ("a.cls", b"disc")),
        r"train-000001.*'a' lacks an im",
    ),
    "unknown class": (
        lambda f: _members(f / "train-000001.tar", ("a.jpg", IMAGE), ("a.cls", b"cube")),
        r"train-000001.tar:a.jpg: its class 'cube' is not one of the 3 of .*classes.txt",
    ),
    "number out of range": (
        lambda f: _members(f / "train-000001.tar", ("a.jpg", IMAGE), ("a.cls", b"3")),
        r"a.jpg.*'3'",
    ),
    "empty image": (lambda f: _members(f / "train-000001.tar", ("a.jpg", b""), ("a.cls", b"disc")), r"a.jpg: 0 bytes"),
    "endless class": (
        lambda f: _members(f / "train-000001.tar", ("a.jpg", IMAGE), ("a.cls", IMAGE)),
        r"a.cls: \d+ bytes",
    ),
    "repeated key": (
        lambda f: _members(f / "train-000001.tar", ("a.jpg", IMAGE), ("a.png", IMAGE), ("a.cls", b"disc")),
        r"a.png: the sample 'a' has more than one",
    ),
    "truncated shard": (lambda f: _cut(f / "train-000001.tar", 900), r"train-000001.tar cannot be read"),
    "not a tar": (lambda f: (f / "train-000001.tar").write_text("hello" * 200), r"train-000001.tar cannot be read"),
    "nothing inside": (
        lambda f: [_members(f / f"train-00000{i}.tar", ("notes.txt", b"x")) for i in (0, 1)],
        r"train-000000.tar: split 'train' holds no samples",
    ),
    "missing shard": (lambda f: (f / "train-000000.tar").unlink(), r"shard 0 of 'train' is missing"),
    "no class list": (lambda f: (f / "classes.txt").unlink(), r"classes.txt cannot be read"),
    "binary class list": (lambda f: (f / "classes.txt").write_bytes(b"\xff\xfe"), r"classes.txt cannot be read"),
    "empty class list": (lambda f: (f / "classes.txt").write_text("\n"), r"classes.txt: no class names"),
    "gap in class list": (lambda f: (f / "classes.txt").write_text("disc\n\nplain\n"), r"classes.txt, line 2: empty"),
    "repeated class": (
        lambda f: (f / "classes.txt").write_text("a\nb\na\n"),
        r"classes.txt, line 3: class 'a'.*line 1",
    ),
    "both layouts": (lambda f: (f / "train").mkdir(), r"'train' twice"),
}


@pytest.mark.parametrize("case", BROKEN_SHARDS)
def test_broken_shards_are_named(tmp_path, case):
    damage, message = BROKEN_SHARDS[case]
    damage(write_shards(tmp_path))
    with pytest.raises(DataError, match=message):
        labelled.load_train_test(tmp_path)


BROKEN_FOLDERS = {
    "image outside a class": (lambda f: (f / "train" / "stray.jpg").write_bytes(IMAGE), r"stray.jpg: an image outside"),
    "empty class": (lambda f: (f / "train" / "cube").mkdir(), r"train/cube: the class folder holds no image"),
    "unknown class in val": (
        lambda f: shutil.move(f / "val" / "disc", f / "val" / "cube"),
        r"val/cube/.*'cube' is not one",
    ),
    "empty split": (lambda f: [shutil.rmtree(f / "val" / c) for c in CLASSES], r"split 'val'.*no images"),
    "no test split": (lambda f: shutil.rmtree(f / "val"), r"expected a split called val, validation, test"),
    "no training split": (lambda f: shutil.rmtree(f / "train"), r"no split 'train'"),
    "no folder": (shutil.rmtree, "no such folder"),
}


@pytest.mark.parametrize("case", BROKEN_FOLDERS)
def test_broken_image_folders_are_named(tmp_path, case):
    damage, message = BROKEN_FOLDERS[case]
    damage(write_folders(tmp_path / "set"))
    with pytest.raises(DataError, match=message):
        labelled.load_train_test(tmp_path / "set")


def test_labels_must_fit_the_images(tmp_path):
    train = labelled.load_split(write_shards(tmp_path), "train")
    with pytest.raises(ValueError, match="labels for 12 images"):
        labelled.LabelledImages("train", CLASSES, train.labels[:-1], train)
    with pytest.raises(ValueError, match="labels 0..2 for 2 classes"):
        labelled.LabelledImages("train", CLASSES[:2], train.labels, train)
