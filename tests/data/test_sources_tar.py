"""Tar shards: which members count, and what is kept of them."""

import logging
import os
import tarfile

import numpy as np
import pytest
from source_files import make_images, write_tar, write_tars

from eupe_jax.data.sources import Changed, ImageFolder, TarShards
from eupe_jax.data.sources.storage import expand_braces
from eupe_jax.data.sources.tar_index import tar_images


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def data(source):
    return [source[i].data for i in range(len(source))]


def test_patterns(tmp_path):
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{train,val}-{0..1}") == ["train-0", "train-1", "val-0", "val-1"]
    images = make_images()
    folder = write_tars(tmp_path / "x", images)
    everything = data(TarShards(folder))
    for path in (
        f"{folder}/train-{{000000..000002}}.tar",
        f"{folder}/*.tar",
        [folder / f"train-00000{i}.tar" for i in range(3)],
    ):
        assert data(TarShards(path)) == everything == list(images.values())
    assert data(TarShards(folder / "train-000002.tar")) == everything[-len(TarShards(folder / "train-000002.tar")) :]
    with pytest.raises(FileNotFoundError, match="train-000003.tar: no such file"):
        TarShards(f"{folder}/train-{{000000..000003}}.tar")


def test_one_image_for_every_key(tmp_path):
    images = list(make_images(4).values())
    members = {
        "a/0.jpg": images[0], "a/0.json": b"{}", "a/0.cls": b"1", "b/0.png": images[1], "b/0.v2.txt": b"",
        "b/1.small.jpg": images[2], "b/1.txt": b"", "b/2.txt": b"no image", "b/._3.jpg": images[3],
    }  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    source = TarShards(path)
    assert data(source) == images[:3] and source[1].name == f"{path}:b/0.png"
    several = write_tar(tmp_path / "b.tar", {"0.jpg": images[0], "0.seg.png": images[1], "1.jpg": images[2]})
    with pytest.raises(ValueError, match=r"b.tar: one sample has several images, 0.jpg and 0.seg.png.*member="):
        TarShards(several)
    assert data(TarShards(several, member="jpg")) == [images[0], images[2]]
    assert data(TarShards(several, member="seg.png")) == [images[1]]
    with pytest.raises(ValueError, match="no images in 1 tar shards as KEY.webp"):
        TarShards(several, member="webp")


def test_members_are_never_paths(tmp_path):
    image = make_images(1)["0000.png"]
    (tmp_path / "secret.png").write_bytes(b"outside")
    path = tmp_path / "in" / "a.tar"
    write_tar(path, {"../secret.png": image, f"{tmp_path}/secret.png": image})
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "../secret.png"
        tar.addfile(link)
    assert data(TarShards(path)) == [image, image]


def test_the_index_is_made_once_and_again_when_a_shard_changes(tmp_path, caplog, monkeypatch):
    images = make_images()
    folder = write_tars(tmp_path / "x", images)
    first = TarShards(folder)
    built = []

    def noted(file):
        built.append(os.path.basename(file.path))
        return tar_images(file)

    monkeypatch.setattr("eupe_jax.data.sources.tar_shards.tar_images", noted)
    again = TarShards(folder)
    assert not built and data(again) == list(images.values()) and again.digest == first.digest
    # Another size, then the same size at another time.
    write_tar(folder / "train-000001.tar", {"new.jpg": images["0001.jpg"]})
    changed = TarShards(folder)
    assert built == ["train-000001.tar"] and images["0001.jpg"] in data(changed) and len(changed) < len(images)
    assert changed.digest != first.digest
    write_tar(folder / "train-000001.tar", {"wen.jpg": images["0001.jpg"]})
    os.utime(folder / "train-000001.tar", ns=(1, 1))
    assert any(r.name.endswith("wen.jpg") for r in map(TarShards(folder).__getitem__, range(len(changed))))
    assert built == ["train-000001.tar"] * 2
    # The source that was open before says so instead of reading other bytes.
    with pytest.raises(Changed, match="train-000001.tar.*changed since the source was opened"):
        data(first)


def test_a_damaged_index_is_made_again(tmp_path, caplog):
    images = make_images()
    folder = write_tars(tmp_path / "x", images, parts=1)
    source = TarShards(folder)
    (index,) = (tmp_path / "cache" / "eupe_jax" / "tar_index").glob("*.idx")
    whole = index.read_bytes()
    generator = np.random.default_rng(0)
    broken = [b"", whole[:100], whole[:-1], whole + b"\0", b"{}\n" + whole, b"\xff" * 200]
    for bit in generator.integers(0, 8 * len(whole), 40):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        broken.append(bytes(flipped))
    warned = 0
    for content in broken:
        index.write_bytes(content)
        caplog.clear()
        again = TarShards(folder)
        assert data(again) == list(images.values()) and again.digest == source.digest
        warned += any("is damaged" in r.message and r.levelno == logging.WARNING for r in caplog.records)
        assert index.read_bytes() == whole
    assert warned == len(broken)


def test_an_index_that_cannot_be_kept_is_a_warning(tmp_path, caplog):
    images = make_images()
    folder = write_tars(tmp_path / "x", images)
    (tmp_path / "file").write_text("not a folder")
    source = TarShards(folder, index_dir=str(tmp_path / "file"))
    assert data(source) == list(images.values())
    assert any("cannot be kept" in r.message for r in caplog.records)


def test_cut_off_and_damaged_shards(tmp_path):
    images = make_images()
    path = write_tars(tmp_path / "x", images, parts=1) / "train-000000.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        headers = [m.offset for m in tar]
        end = tar.offset
    for kind in (TarShards, ImageFolder):
        for length in (1, 511, 513, headers[5] + 700, headers[7], headers[7] + 3, end - 1, end):
            path.write_bytes(whole[:length])
            with pytest.raises(ValueError, match=r"train-000000.tar: .*(cut off .*at byte|near byte|uncompressed tar)"):
                kind(path)
        damaged = bytearray(whole)
        damaged[headers[6] + 150] ^= 0xFF  # in the header's checksum
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"train-000000.tar: the tar file is damaged at byte {headers[6]}"):
            kind(path)
        path.write_bytes(b"\0" * 10240)
        with pytest.raises(ValueError, match="no images"):
            kind(path)
        path.write_bytes(b"")
        with pytest.raises(ValueError, match="train-000000.tar"):
            kind(path)


def test_a_folder_keeps_an_index_where_asked(tmp_path):
    images = make_images()
    folder = write_tars(tmp_path / "x", images)
    assert data(ImageFolder(folder, index_dir=str(tmp_path / "kept"))) == list(images.values())
    assert len(list((tmp_path / "kept").glob("*.idx"))) == 3
    assert data(ImageFolder(folder, index_dir=str(tmp_path / "kept"))) == list(images.values())
    assert not (tmp_path / "cache").exists()
