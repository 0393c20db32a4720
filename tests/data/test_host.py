import logging
import pickle

import numpy as np
import pytest
from PIL import Image

from configs import common
from eupe_jax.data.host import (
    BrokenRecord,
    HostConfig,
    RecordReader,
    TooManyBroken,
    decode,
    make_image,
    random_crop_box,
    random_generator,
)
from eupe_jax.data.sources import ArraySource, Record
from eupe_jax.training import pipeline


def record(data, name="some/file.jpg"):
    return Record(data, name)


@pytest.fixture(scope="module")
def ramp_HxWx3():
    """60 x 90 picture whose red grows with x and green with y."""
    y, x = np.mgrid[:60, :90]
    return np.stack([x * 2, y * 4, np.full_like(x, 40)], -1).astype(np.uint8)


def test_modes_become_rgb(ramp_HxWx3, encode):
    grey = ramp_HxWx3[..., 0]
    np.testing.assert_array_equal(decode(record(encode(ramp_HxWx3))), ramp_HxWx3)
    np.testing.assert_array_equal(decode(record(encode(grey))), np.repeat(grey[..., None], 3, -1))
    palette = Image.fromarray(np.repeat(grey[..., None] // 32 * 32, 3, -1)).convert("P")
    np.testing.assert_array_equal(decode(record(encode(palette))), np.asarray(palette.convert("RGB")))
    cmyk = decode(record(encode(Image.fromarray(ramp_HxWx3).convert("CMYK"), "JPEG", quality=95)))
    assert np.abs(cmyk.astype(int) - ramp_HxWx3).mean() < 4
    np.testing.assert_array_equal(decode(record(ramp_HxWx3)), ramp_HxWx3)
    np.testing.assert_array_equal(decode(record(grey))[..., 1], grey)


def test_sixteen_bits_are_scaled_and_not_clipped(ramp_HxWx3, encode):
    grey = ramp_HxWx3[..., 0]
    deep = encode(Image.fromarray(grey.astype(np.uint16) * 257))
    np.testing.assert_array_equal(decode(record(deep))[..., 2], grey)


def test_transparency_is_laid_on_white(ramp_HxWx3, encode):
    alpha = np.full((60, 90, 1), 255, np.uint8)
    alpha[:30] = 0
    got = decode(record(encode(np.concatenate([ramp_HxWx3, alpha], -1))))
    assert (got[:30] == 255).all()
    np.testing.assert_array_equal(got[30:], ramp_HxWx3[30:])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(ramp_HxWx3, encode, orientation):
    turn = {
        1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, -1), 7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: np.rot90(x),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = record(encode(ramp_HxWx3, exif=exif))
    np.testing.assert_array_equal(decode(stored), turn(ramp_HxWx3))
    # A crop is taken in the upright picture too.
    config = HostConfig(size=16, mode="resize")
    upright = record(encode(np.ascontiguousarray(turn(ramp_HxWx3))))
    a, b = (make_image(r, config, random_generator(0, 0, 0)) for r in (stored, upright))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "data,reason",
    [
        (b"", "empty"),
        (b"<html>not an image</html>", "Pillow can identify"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "."),
        (np.zeros((4, 4, 3), np.float32), "must be uint8 .* not float32"),
    ],
)
def test_broken_records_are_named(data, reason):
    with pytest.raises(BrokenRecord, match=f"some/file.jpg: .*{reason}"):
        decode(record(data))


def test_truncated_and_oversized_files_are_broken(ramp_HxWx3, encode):
    whole = encode(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), "JPEG")
    with pytest.raises(BrokenRecord, match="some/file.jpg: OSError: .*truncated"):
        decode(record(whole[: len(whole) // 2]))
    with pytest.raises(BrokenRecord, match="64x64 pixels are more than max_pixels=4000"):
        decode(record(whole), max_pixels=4000)
    with pytest.raises(BrokenRecord, match="90x60 and mode 'none' takes 32x32"):
        make_image(record(encode(ramp_HxWx3)), HostConfig(size=32, mode="none"), random_generator(0, 0, 0))


def test_none_keeps_every_byte(encode):
    x = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    np.testing.assert_array_equal(make_image(record(encode(x)), HostConfig(32, "none"), random_generator(0, 0, 0)), x)


def test_crop_is_what_pillow_makes_of_the_box(photos):
    config = HostConfig(size=96)
    photo = photos[photos.names.index("chelsea")]
    got = make_image(photo, config, random_generator(7, 3, 5))
    whole = Image.fromarray(decode(photo))
    box = random_crop_box(*whole.size, config.scale, config.ratio, random_generator(7, 3, 5))
    part = whole.crop(tuple(map(int, box)))
    bicubic = Image.Resampling.BICUBIC
    rows_first = part.resize((part.width, 96), bicubic).resize((96, 96), bicubic)
    assert np.abs(got.astype(int) - np.asarray(rows_first)).max() <= 1
    assert np.abs(got.astype(int) - np.asarray(part.resize((96, 96), bicubic))).mean() < 0.4


def test_a_jpeg_decoded_small_looks_the_same(photos, encode):
    big = Image.fromarray(decode(photos[photos.names.index("coffee")])).resize((1200, 800))
    lossless, jpeg = record(encode(big)), record(encode(big, "JPEG", quality=95))
    config = HostConfig(size=96)
    for position in range(6):
        a, b = (make_image(r, config, random_generator(0, 0, position)).astype(float) for r in (lossless, jpeg))
        assert np.abs(a - b).mean() < 2.5, position  # the box moved by half a pixel would show more at the edges
        shifted = np.abs(a[1:] - b[:-1]).mean()
        assert np.abs(a - b).mean() < shifted


def test_crop_boxes_have_the_asked_area_and_ratio():
    boxes = [random_crop_box(400, 300, (0.32, 1.0), (3 / 4, 4 / 3), random_generator(0, 0, i)) for i in range(600)]
    left, top, right, bottom = np.array(boxes).T
    w, h = right - left, bottom - top
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= 400 and bottom.max() <= 300
    area = w * h / (400 * 300)
    assert 0.31 < area.min() < 0.36 and 0.9 < area.max() <= 1
    assert 0.74 < (w / h).min() < 0.80 and 1.25 < (w / h).max() < 1.35
    assert np.mean(left == 0) < 0.2  # offsets move
    # A strip that no allowed crop fits: the largest central one.
    assert random_crop_box(1000, 20, (0.9, 1.0), (3 / 4, 4 / 3), random_generator(0, 0, 0)) == (486, 0, 513, 20)


def test_places_have_their_own_streams():
    draws = {(s, t, p): random_generator(s, t, p).random() for s in range(3) for t in range(3) for p in range(3)}
    assert len(set(draws.values())) == 27
    assert random_generator(1, 2, 0).random() == draws[1, 2, 0]


class Corrupt:
    """Every third record is no image."""

    digest = "corrupt"

    def __init__(self, good):
        self._good = good

    def __len__(self):
        return len(self._good)

    def __getitem__(self, index):
        if index % 3 == 0:
            return Record(b"junk", f"junk{index}")
        return self._good[index]


def test_broken_records_are_replaced_alike_everywhere(numbered, caplog):
    config = HostConfig(size=16, max_broken_fraction=1.0)
    readers = [RecordReader(config, seed=3), pickle.loads(pickle.dumps(RecordReader(config, seed=3)))]
    source = Corrupt(numbered)
    with caplog.at_level(logging.WARNING):
        a = [readers[0](source, i, 0, i) for i in range(40)]
    named = [m for m in caplog.messages if "junk0:" in m]
    assert len(named) == 1 and "junk0" in readers[0].broken
    b = [readers[1](source, i, 0, i) for i in reversed(range(40))][::-1]
    for i, ((x, got), (y, again)) in enumerate(zip(a, b, strict=True)):
        assert got == again and got % 3 and (got == i or i % 3 == 0)
        np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(x[0, 0], numbered[got].data[0, 0])  # the index tells what is really shown
    assert len({got for i, (_, got) in enumerate(a) if i % 3 == 0}) > 3


def test_too_many_broken_stops_with_a_list(numbered):
    def read(fraction, indices):
        reader = RecordReader(HostConfig(size=16, max_broken_fraction=fraction), seed=0)
        for position, i in enumerate(indices):
            reader(Corrupt(numbered), i, 0, position)
        return reader

    message = r"21 of \d+ .*\(data: 21 unidentified\).*max_broken_fraction=0.02 "
    with pytest.raises(TooManyBroken, match=message) as caught:
        read(0.02, range(0, 90, 3))
    (listed,) = pickle.loads(pickle.dumps(caught.value)).__notes__  # as it comes from a worker process
    assert "  junk3: " in listed.splitlines()[2] and "\n  junk6: " in listed
    with pytest.raises(TooManyBroken, match="junk0"):
        read(0.0, [0])
    # The default of a run allows some in the beginning: a fraction of few readings says nothing.
    reader = read(common.base().data.max_broken_fraction, [1, 3, *[2] * 60, 6, 9])
    assert 3 <= reader.counts.total() <= 20 and reader.reads < 100


def test_a_long_list_is_cut():
    error = TooManyBroken("many", {f"junk{i}": "no picture" for i in range(70)})
    assert error.__notes__[0].splitlines()[-2:] == ["  junk49: no picture", "  and 20 more"]


def test_nothing_but_broken_records_stops_at_once():
    source = Corrupt(ArraySource([np.zeros((4, 4, 3), np.uint8)]))
    with pytest.raises(TooManyBroken, match="in a row"):
        RecordReader(HostConfig(size=4, max_broken_fraction=1.0), seed=0)(source, 0, 0, 0)


def test_a_file_that_went_away_is_named(tmp_path, encode, ramp_HxWx3):
    from eupe_jax.data.sources import ImageFolder

    for name in ("here.png", "there.png"):
        (tmp_path / name).write_bytes(encode(ramp_HxWx3))
    source = ImageFolder(tmp_path)
    (tmp_path / "here.png").unlink()
    reader = RecordReader(HostConfig(size=4, max_broken_fraction=1.0), seed=0)
    assert reader(source, 0, 0, 0)[1] == 1
    assert reader.broken == {str(tmp_path / "here.png"): "cannot be read: no such file"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_size", 0),
        ("mode", "centre"),
        ("crop_scale", (0.5, 0.2)),
        ("crop_ratio", (0.0, 1.0)),
        ("max_pixels", 0),
        ("max_broken_fraction", 2.0),
    ],
)
def test_config_errors_name_the_field(field, value):
    data = common.base().data
    assert field in data
    data[field] = value
    with pytest.raises(ValueError, match=f"^data.{field} must be"):
        pipeline.host_config(data)
