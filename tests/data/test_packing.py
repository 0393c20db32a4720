"""Packing any source into ArrayRecord shards: what comes back, what is refused, what a stop or damage leaves."""

import io
import json
import resource
import shutil

import numpy as np
import pytest
from PIL import Image, ImageCms

from eupe_jax.data import packing
from eupe_jax.data.decode import decode
from eupe_jax.data.pack_shard import BrokenImages, ImageOptions
from eupe_jax.data.sources import ArrayRecordSource, ArraySource, ImageFolder
from eupe_jax.data.sources.base import RecordError

BROKEN = {"empty.jpg": "empty", "page.jpg": "unidentified"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, encode):
    """23 images of 5 kinds and sizes up to 90 pixels, and two files that are none."""
    path = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for i in range(23):
        x = noise.integers(0, 256, (20 + 3 * i, 90 - 2 * i, 3), dtype=np.uint8)
        kind, suffix = (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"))[i % 3]
        file = path / f"part{i % 2}" / f"{i:02d}.{suffix}"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(encode(x, kind))
    (path / "empty.jpg").write_bytes(b"")
    (path / "page.jpg").write_bytes(b"<html>no picture</html>")
    return path


def pack(source, out, path="", **settings):
    arguments = {"kind": "images", "path": str(path), "shards": 4, "progress": False, "on_broken": "drop"} | settings
    return packing.pack(source, out, **arguments)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_packed_comes_back_byte_for_byte(folder, tmp_path):
    source = ImageFolder(folder)
    manifest = pack(source, tmp_path / "out", folder, on_broken="keep")
    back = ArrayRecordSource(tmp_path / "out")
    assert len(back) == len(source) == manifest["records"] == 25
    for i in range(25):
        assert back[i].data == source[i].data
        assert back[i].name == source[i].name.removeprefix(f"{folder}/")
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["encoded_anew"] == 0 and len(manifest["shards"]) == 4
    assert manifest["bytes"] == sum(len(v) for k, v in contents(tmp_path / "out").items() if k != "manifest.json")
    assert set(contents(tmp_path / "out")) == {"manifest.json", *(s["file"] for s in manifest["shards"])}
    assert packing.verify(tmp_path / "out", progress=False) == []


def test_bytes_depend_on_images_and_options_alone(folder, tmp_path):
    pack(ImageFolder(folder), tmp_path / "one", folder, images=ImageOptions(max_side=40))
    elsewhere = shutil.copytree(folder, tmp_path / "moved")
    pack(ImageFolder(elsewhere), tmp_path / "two", elsewhere, images=ImageOptions(max_side=40), workers=2)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    plans = [json.loads(x.pop("manifest.json")) for x in (one, two)]
    assert one == two and plans[0]["source"].pop("path") != plans[1]["source"].pop("path") and plans[0] == plans[1]


def test_broken_images_are_kept_left_out_or_end_it(folder, tmp_path):
    source = ImageFolder(folder)
    kept = pack(source, tmp_path / "keep", folder, on_broken="keep")
    dropped = pack(source, tmp_path / "drop", folder, on_broken="drop")
    for manifest in (kept, dropped):
        listed = [b for s in manifest["shards"] for b in s["broken"]]
        assert {b["name"]: b["kind"] for b in listed} == BROKEN
        assert all(source[b["index"]].name.endswith(b["name"]) and b["reason"] for b in listed)
        assert manifest["broken"] == {"policy": manifest["broken"]["policy"], "empty": 1, "unidentified": 1}
    assert kept["records"] == 25 and dropped["records"] == 23
    assert packing.verify(tmp_path / "keep", progress=False) == packing.verify(tmp_path / "drop", progress=False) == []

    with pytest.raises(BrokenImages, match=r"(?s)allows \(1\).*empty.jpg \(.*page.jpg \(not an image"):
        pack(source, tmp_path / "stop", folder, on_broken="stop", max_broken_fraction=0.07)
    assert not (tmp_path / "stop" / "manifest.json").exists()
    # Finished shards were right; one more allowed, or the other policy, goes on with them.
    stopped = pack(source, tmp_path / "stop", folder, on_broken="stop", max_broken_fraction=0.08)
    assert stopped["shards"] == dropped["shards"]


class Flaky:
    """A source whose records in `bad` cannot be read; counts what is asked for."""

    def __init__(self, source, bad=(), error=None):
        self._source, self.bad, self.digest, self.asked = source, bad, source.digest, []
        self._error = error or RecordError("lost.jpg", "checksum does not match")

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        self.asked.append(index)
        if index in self.bad:
            raise self._error
        return self._source[index]


def test_records_that_cannot_be_read(numbered, tmp_path):
    flaky = Flaky(numbered, bad=(7,))
    manifest = pack(flaky, tmp_path / "out")
    (broken,) = (b for s in manifest["shards"] for b in s["broken"])
    assert broken == {"index": 7, "name": "lost.jpg", "kind": "unreadable", "reason": "checksum does not match"}
    with pytest.raises(ValueError, match="lost.jpg.*cannot be kept"):
        pack(flaky, tmp_path / "kept", on_broken="keep")


def test_an_outage_ends_it_and_what_is_finished_is_not_done_again(numbered, tmp_path):
    whole = pack(numbered, tmp_path / "whole")
    flaky = Flaky(numbered, bad=(25,), error=ConnectionError("the bucket is gone"))
    with pytest.raises(ConnectionError):
        pack(flaky, tmp_path / "out")
    there = {p.name: p.stat() for p in (tmp_path / "out").glob("*.array_record")}
    assert len(there) == 2 and not list((tmp_path / "out").rglob("*.partial"))
    flaky.bad, flaky.asked = (), []
    assert pack(flaky, tmp_path / "out") == whole and min(flaky.asked) == 20
    for name, before in there.items():
        assert (tmp_path / "out" / name).stat().st_ino == before.st_ino
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    flaky.asked = []
    assert pack(flaky, tmp_path / "out") == whole and not flaky.asked, "a finished pack is left alone"


@pytest.mark.parametrize(("side", "bound"), [("longest", 70), ("shortest", 45)])
def test_larger_images_are_shrunk_and_others_stay(folder, tmp_path, side, bound):
    source = ImageFolder(folder)
    pack(source, tmp_path / "out", folder, images=ImageOptions(max_side=bound, side=side), on_broken="keep")
    back = ArrayRecordSource(tmp_path / "out")
    shrunk = 0
    for i in range(25):
        if any(source[i].name.endswith(name) for name in BROKEN):
            continue
        before = decode(source[i])
        bounded = (max if side == "longest" else min)(before.shape[:2])
        if bounded <= bound:
            assert back[i].data == source[i].data
            continue
        shrunk += 1
        image = Image.open(io.BytesIO(back[i].data))
        assert (max if side == "longest" else min)(image.size) == bound and image.format == "JPEG"
        height, width = (round(n * bound / bounded) for n in before.shape[:2])
        assert image.size == (width, height)
    assert 5 < shrunk < 23


def test_a_shrunk_image_is_upright_and_close_to_pillows_and_bare(photos, encode, tmp_path):
    upright = Image.fromarray(decode(photos[1]))
    sideways = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned back by 90 degrees
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(encode(sideways, "JPEG", quality=97, exif=exif, icc_profile=profile))
    pack(ImageFolder(tmp_path / "in"), tmp_path / "out", images=ImageOptions(max_side=100, quality=95), shards=1)
    stored = Image.open(io.BytesIO(ArrayRecordSource(tmp_path / "out")[0].data))
    assert not stored.getexif() and "icc_profile" not in stored.info
    reference = upright.resize(stored.size, Image.Resampling.LANCZOS)
    assert max(stored.size) == 100
    difference = np.abs(np.asarray(stored, np.float32) - np.asarray(reference, np.float32))
    assert difference.mean() < 4  # of 255: JPEG twice, and decoding at half the size


def test_arrays_are_stored_without_loss(numbered, tmp_path):
    manifest = pack(numbered, tmp_path / "out")
    back = ArrayRecordSource(tmp_path / "out")
    assert manifest["encoded_anew"] == 40
    for i in (0, 13, 39):
        np.testing.assert_array_equal(decode(back[i]), numbered[i].data)


def test_every_pixel_is_checked_if_wanted(encode, tmp_path):
    whole = encode(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), "JPEG")
    (tmp_path / "in").mkdir()
    for name, data in (("a.jpg", whole), ("b.jpg", whole[: len(whole) // 2])):
        (tmp_path / "in" / name).write_bytes(data)
    source = ImageFolder(tmp_path / "in")
    header = pack(source, tmp_path / "header", shards=1)
    pixels = pack(source, tmp_path / "decode", shards=1, images=ImageOptions(check="decode"))
    assert header["records"] == 2 and pixels["records"] == 1 and pixels["broken"]["truncated"] == 1


def test_another_pack_is_refused(numbered, folder, tmp_path):
    pack(numbered, tmp_path / "out")
    before = contents(tmp_path / "out")
    for source, settings, words in (
        (numbered, {"shards": 5}, r"shard_count=4 \(now 5\)"),
        (numbered, {"images": ImageOptions(max_side=7)}, r"images.max_side=0 \(now 7\)"),
        (ImageFolder(folder), {}, r"source.records=40 \(now 25\).*source.digest"),
    ):
        with pytest.raises(ValueError, match=f"(?s)another pack.*{words}"):
            pack(source, tmp_path / "out", **settings)
    assert contents(tmp_path / "out") == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="not empty"):
        pack(numbered, tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_two_at_once_are_refused(numbered, tmp_path):
    class Again(Flaky):
        def __getitem__(self, index):
            if index == 30:
                with pytest.raises(OSError, match="another process is packing"):
                    pack(numbered, tmp_path / "out")
            return super().__getitem__(index)

    assert pack(Again(numbered), tmp_path / "out")["records"] == 40


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shards": 0}, "between 1 and the 40 records"),
        ({"shards": 41}, "got 41"),
        ({"name": "a/b"}, "'a/b'"),
        ({"on_broken": "ignore"}, "'ignore'"),
        ({"max_broken_fraction": 2}, "got 2"),
        ({"workers": 0}, "got 0"),
    ],
)
def test_settings_that_do_not_fit(numbered, tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        pack(numbered, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="quality"):
        ImageOptions(quality=0)


def test_damage_is_named_and_repaired(numbered, tmp_path):
    out = tmp_path / "out"
    pack(numbered, out)
    before = contents(out)
    files = sorted(name for name in before if name != "manifest.json")
    flipped, cut, gone = (out / name for name in files[:3])
    data = bytearray(flipped.read_bytes())
    data[data.index(b"IDAT") + 8] ^= 1  # inside the first record
    flipped.write_bytes(data)
    cut.write_bytes(before[files[1]][:-70_000])
    gone.unlink()
    (out / "other.array_record").write_bytes(b"")
    found = packing.verify(out, progress=False)
    assert [line for line in found if flipped.name in line][0].endswith("sha256 differs from the manifest's")
    assert any(line.startswith(f"{flipped.name}[0]: ") for line in found)
    assert not any(line.startswith(f"{flipped.name}[1]") for line in found)
    assert any(line.startswith(f"{cut.name}: {cut.stat().st_size} bytes") for line in found)
    assert f"{gone.name}: missing" in found and "other.array_record: not in the manifest" in found
    for path in (flipped, cut, out / "other.array_record"):
        path.unlink()
    pack(numbered, out)
    assert contents(out) == before and packing.verify(out, progress=False) == []


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    noise = ArraySource(np.random.default_rng(0).integers(0, 256, (12, 200, 200, 3), np.uint8))
    whole = pack(noise, tmp_path / "whole", shards=3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(OSError, match="cannot be written: .*too large"):
            pack(noise, tmp_path / "out", shards=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("out/*.array_record")) and not list(tmp_path.glob("out/.pack/*.partial"))
    assert pack(noise, tmp_path / "out", shards=3) == whole


def test_nothing_to_verify(tmp_path, numbered):
    with pytest.raises(FileNotFoundError, match="no pack"):
        packing.verify(tmp_path)
    with pytest.raises(ConnectionError):
        pack(Flaky(numbered, bad=(25,), error=ConnectionError()), tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="unfinished"):
        packing.verify(tmp_path / "out")
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="not of a pack"):
        packing.verify(tmp_path)


def test_shards_may_be_empty(encode, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(encode(np.zeros((8, 8, 3), np.uint8), "JPEG") if i != 1 else b"")
    manifest = pack(ImageFolder(tmp_path / "in"), tmp_path / "out", shards=3)
    assert [s["records"] for s in manifest["shards"]] == [1, 0, 1]
    assert packing.verify(tmp_path / "out", progress=False) == [] and len(ArrayRecordSource(tmp_path / "out")) == 2
