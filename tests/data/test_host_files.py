"""Odd but whole files, files that lie, and the folder of real ones."""

import io
import itertools
import logging
import os
import pickle
import struct
import threading
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eupe_jax.data import decode as decode_module
from eupe_jax.data import host as host_module
from eupe_jax.data.crop import crop_and_resize
from eupe_jax.data.host import (
    BrokenRecord,
    HostConfig,
    RecordReader,
    TooManyBroken,
    decode,
    make_image,
    random_generator,
)
from eupe_jax.data.sources import ImageFolder, Record, RecordError


def record(data):
    return Record(data, "odd")


@pytest.fixture(scope="module")
def picture():
    """70 x 110, smooth with some texture; every channel another one."""
    y, x = np.mgrid[:70, :110]
    waves = [128 + 100 * np.sin(x / 17 + y / 29 + i) + 20 * np.cos(x * (i + 2) / 5) for i in range(3)]
    return Image.fromarray(np.clip(np.stack(waves, -1), 0, 255).astype(np.uint8))


# ---- JPEG: which library decoded a file cannot be seen


@pytest.fixture
def without_simplejpeg(monkeypatch):
    """`without_simplejpeg(f)`: f() with every JPEG decoded by Pillow."""

    def run(f):
        with monkeypatch.context() as m:

            def refuse(*args, **kwargs):
                raise ValueError("not now")

            m.setattr(decode_module.simplejpeg, "decode_jpeg", refuse)
            return f()

    return run


@pytest.mark.parametrize(
    "options", [{"subsampling": s} for s in range(3)] + [{"progressive": True}, {"quality": 35}, {"optimize": True}]
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_both_decoders_give_the_same_pixels(picture, encode, without_simplejpeg, options, mode):
    data = encode(picture.convert(mode), "JPEG", **options)
    pillow = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode(record(data)), pillow)
    np.testing.assert_array_equal(without_simplejpeg(lambda: decode(record(data))), pillow)


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("size", [(333, 241), (320, 240), (161, 400)])
def test_scaled_decoding_is_the_same_too(picture, encode, without_simplejpeg, scale, size):
    data = encode(picture.resize(size), "JPEG")

    def small():
        return decode_module.open_picture(data, 10**6).decode(scale)

    assert small().shape == (-(-size[1] // scale), -(-size[0] // scale), 3)
    np.testing.assert_array_equal(small(), without_simplejpeg(small))


def test_simplejpeg_really_decodes(picture, encode, monkeypatch):
    calls = []
    real = decode_module.simplejpeg.decode_jpeg
    monkeypatch.setattr(decode_module.simplejpeg, "decode_jpeg", lambda *a, **k: calls.append(1) or real(*a, **k))
    decode(record(encode(picture, "JPEG")))
    assert calls == [1]
    decode(record(encode(picture.convert("CMYK"), "JPEG")))  # not for this one
    assert calls == [1]


def test_a_cropped_jpeg_is_turned_and_scaled_like_its_upright_twin(picture, encode):
    big = picture.resize((880, 560), Image.Resampling.BICUBIC)
    config = HostConfig(size=64)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        upright = decode_module.turn_upright(np.asarray(big), orientation)
        turned = record(encode(big, "JPEG", quality=95, subsampling=0, exif=exif))
        lossless = record(encode(np.ascontiguousarray(upright)))
        a, b = (make_image(r, config, random_generator(0, 0, 4)).astype(int) for r in (turned, lossless))
        # The crop is decoded at 1/4: not the same pixels, but the same place.
        assert np.abs(a - b).mean() < 2 < np.abs(a[2:] - b[:-2]).mean()


# ---- other formats and modes


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_tiff_png_and_webp(picture, encode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = decode_module.turn_upright(np.asarray(picture), orientation)
    for format, options in [("TIFF", {}), ("PNG", {}), ("WEBP", {"lossless": True})]:
        stored = record(encode(picture, format, exif=exif, **options))
        np.testing.assert_array_equal(decode(stored), upright, err_msg=format)
    box = make_image(record(encode(picture, "TIFF", exif=exif)), HostConfig(size=32), random_generator(0, 0, 1))
    twin = make_image(record(np.ascontiguousarray(upright)), HostConfig(size=32), random_generator(0, 0, 1))
    np.testing.assert_array_equal(box, twin)


def test_adobe_cmyk_is_not_inverted(picture, encode):
    data = encode(picture.convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data  # which stores it inverted
    assert np.abs(decode(record(data)).astype(int) - np.asarray(picture)).mean() < 4


def test_grey_bilevel_and_transparency(picture, encode):
    grey, rgb = np.asarray(picture.convert("L")), np.asarray(picture)
    bilevel = picture.convert("1")
    np.testing.assert_array_equal(decode(record(encode(bilevel)))[..., 0], np.asarray(bilevel) * np.uint8(255))
    mask = (np.arange(110) < 50)[None].repeat(70, 0)
    alpha = Image.fromarray(np.where(mask, 0, 255).astype(np.uint8))
    la = Image.merge("LA", (Image.fromarray(grey), alpha))
    got = decode(record(encode(la)))
    assert (got[mask] == 255).all()
    np.testing.assert_array_equal(got[~mask][:, 1], grey[~mask])
    colour_key = encode(Image.fromarray(rgb), transparency=tuple(int(v) for v in rgb[9, 9]))
    got, key = decode(record(colour_key)), (rgb == rgb[9, 9]).all(-1)
    assert (got[key] == 255).all() and key.any()
    np.testing.assert_array_equal(got[~key], rgb[~key])
    palette = picture.convert("P")
    index = int(np.asarray(palette)[0, 0])
    got = decode(record(encode(palette, transparency=index)))
    assert (got[np.asarray(palette) == index] == 255).all()
    solid = np.asarray(palette) != index
    np.testing.assert_array_equal(got[solid], np.asarray(palette.convert("RGB"))[solid])


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def deep_png(pixels_HxWxC: np.ndarray) -> bytes:
    """16-bit PNG of 1 or 3 channels."""
    h, w, c = pixels_HxWxC.shape
    header = struct.pack(">IIBBBBB", w, h, 16, {1: 0, 3: 2}[c], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels_HxWxC)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_sixteen_bits(picture, encode):
    rgb = np.asarray(picture)
    got = decode(record(deep_png(rgb.astype(np.uint16) * 257)))
    assert np.abs(got.astype(int) - rgb).max() <= 1
    grey = np.asarray(picture.convert("L"))
    deep = grey.astype(np.uint16) * 257
    pgm = b"P5 110 70 65535\n" + deep.astype(">u2").tobytes()
    for data in (deep_png(deep[..., None]), encode(Image.fromarray(deep), "TIFF"), pgm):
        np.testing.assert_array_equal(decode(record(data))[..., 1], grey)
    with pytest.raises(BrokenRecord, match="mode F") as e:
        decode(record(encode(Image.fromarray(grey.astype(np.float32)), "TIFF")))
    assert e.value.kind == "unsupported"


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_frame_of_several(picture, encode, format):
    frames = [picture.rotate(180), picture.rotate(90)]
    options = {"lossless": True} if format == "WEBP" else {}
    many = encode(picture, format, save_all=True, append_images=frames, **options)
    one = encode(picture, "JPEG" if format == "MPO" else format, **options)
    with Image.open(io.BytesIO(many)) as image:
        assert image.n_frames == 3
    np.testing.assert_array_equal(decode(record(many)), decode(record(one)))


# ---- files that want too much, or are none


def lying_headers() -> dict[str, bytes]:
    h = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", h) + png_chunk(b"IDAT", zlib.compress(bytes(99)))
    bomb = b"key\0\0" + zlib.compress(bytes(50_000_000))
    plain = deep_png(np.zeros((4, 4, 3), np.uint16))
    gif = b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(3) + b"," + struct.pack("<HHHH", 0, 0, 65535, 65535)
    return {
        "png": png,
        "png text": plain[:33] + png_chunk(b"zTXt", bomb) + plain[33:],
        "png profile": plain[:33] + png_chunk(b"iCCP", bomb) + plain[33:],
        "gif": gif + b"\0\2\1\0\0;",
        "bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 50000, 50000, 1, 24, 0, 0, 0, 0, 0, 0),
        "ppm": b"P6 50000 50000 255\n" + bytes(99),
    }


@pytest.mark.parametrize("name", ["png", "png text", "png profile", "gif", "bmp", "ppm"])
def test_bombs_are_refused_before_they_are_decoded(name):
    start = time.process_time()
    with pytest.raises(BrokenRecord) as e:
        decode(record(lying_headers()[name]))
    assert e.value.kind == "too large", e.value
    assert time.process_time() - start < 2


def test_a_jpeg_of_thousands_of_passes_is_refused(encode):
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8))
    whole = encode(grey, "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    data = whole[:last] + whole[last:-2] * 900 + whole[-2:]
    with pytest.raises(BrokenRecord, match="passes over 64x64") as e:
        decode(record(data), max_pixels=200_000)
    assert e.value.kind == "too large"
    decode(record(whole), max_pixels=64 * 64)  # its own ten passes are fine


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",  # Pillow would start Ghostscript
        b"<html>",
        bytes(1000),
        b"RIFF\x10\0\0\0WAVEfmt ",
    ],
)
def test_what_is_no_picture_is_unidentified(data):
    with pytest.raises(BrokenRecord, match="odd: not an image") as e:
        decode(record(data))
    assert e.value.kind == "unidentified"


def test_a_broken_record_keeps_its_kind_between_processes():
    e = pickle.loads(pickle.dumps(BrokenRecord("a", "b", "truncated")))
    assert (e.name, e.reason, e.kind, str(e)) == ("a", "b", "truncated", "a: b")


# ---- real photographs


@pytest.fixture(scope="module")
def real_photos():
    path = Path(os.environ.get("EUPE_DATA_DIR", Path(__file__).parents[3] / "shared" / "data")) / "photos"
    if not (path / "corrupt").is_dir():
        pytest.skip(f"no photographs in {path}; set EUPE_DATA_DIR")
    return path


CORRUPT = {
    "truncated.jpg": "truncated",
    "zero_bytes.jpg": "empty",
    "html_page.jpg": "unidentified",
    "png_renamed.jpg": None,
    "cmyk.jpg": None,
    "gray16.png": None,
}


def test_every_odd_file_is_treated_as_it_should(real_photos):
    folder = real_photos / "corrupt"
    assert {p.name for p in folder.iterdir()} == set(CORRUPT)
    for name, kind in CORRUPT.items():
        data = (folder / name).read_bytes()
        if kind:
            for use in (decode, lambda r: make_image(r, HostConfig(), random_generator(0, 0, 0))):
                with pytest.raises(BrokenRecord, match=name) as e:
                    use(Record(data, name))
                assert e.value.kind == kind
            continue
        got, image = decode(Record(data, name)), Image.open(io.BytesIO(data))
        assert got.shape == (image.height, image.width, 3)
        if image.mode == "I;16":
            np.testing.assert_array_equal(got[..., 0], np.round(np.asarray(image) / 257))
            assert (got < 255).mean() > 0.5  # not clipped to white
        else:
            np.testing.assert_array_equal(got, np.asarray(image.convert("RGB")))


def test_a_pass_over_the_photographs_counts_what_is_broken(real_photos, caplog):
    source = ImageFolder(real_photos)
    reader = RecordReader(HostConfig(size=32, max_broken_fraction=0.5), seed=0)
    with caplog.at_level(logging.WARNING):
        first = [reader.read(source, i, 0, i, "photos") for i in range(len(source))]
        for i in range(len(source)):
            reader.read(source, i, 1, i, "photos")
    asked = Counter(kind for reading in first for kind in reading.broken[:1])
    assert asked == {"truncated": 1, "empty": 1, "unidentified": 1}
    assert reader.reads == 2 * len(source) + reader.counts.total()
    assert set(reader.counts) == {("photos", kind) for kind in asked}
    assert {Path(name).name for name in reader.broken} == {name for name, kind in CORRUPT.items() if kind}
    assert len(caplog.messages) == 3  # each named once, however often it was met


# ---- counting


class Junk:
    digest = "junk"

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index == 0:
            raise RecordError("locked.jpg", "permission denied")
        return Record([b"junk", b"", np.zeros((9, 9, 3), np.uint8)][index % 3], f"record {index}")


def test_counts_by_source_and_kind():
    config = HostConfig(size=4, max_broken_fraction=1.0)
    reader = RecordReader(config, seed=0)
    readings = [reader.read(Junk(), i % 10, 0, i, name) for i in range(60) for name in ("a", "b")]
    by_hand = Counter((name, kind) for r, name in zip(readings, "ab" * 60, strict=True) for kind in r.broken)
    assert reader.counts == by_hand and {k for _, k in by_hand} == {"unidentified", "empty", "unreadable"}
    assert reader.reads == 120 + by_hand.total()


def test_the_last_word_counts_sources_and_kinds():
    reader = RecordReader(HostConfig(size=4, max_broken_fraction=0.01), seed=0)
    with pytest.raises(TooManyBroken, match="(?s)^21 of .*=0.01 .*  record 3: ") as caught:
        for place, name in itertools.product(range(60), "ab"):
            reader.read(Junk(), place % 10, 0, place, name)
    kinds = ", ".join(f"{name}: {n} {kind}" for (name, kind), n in sorted(reader.counts.items()))
    assert f"({kinds})" in str(caught.value) and {"a", "b"} == {name for name, _ in reader.counts}


def test_names_are_bounded_and_counts_are_not(monkeypatch, caplog):
    monkeypatch.setattr(host_module, "_NAMED", 2)
    reader = RecordReader(HostConfig(size=4, max_broken_fraction=1.0), seed=0)
    with caplog.at_level(logging.WARNING):
        for i in range(40):
            reader.read(Junk(), i % 10, 0, i)
    assert len(reader.broken) == 2 and len(caplog.messages) == 3 and "not named" in caplog.messages[-1]
    assert reader.counts.total() > 20


# ---- threads, and the resize


def test_threads_get_what_one_thread_gets(photos):
    config = HostConfig(size=48)
    alone = [make_image(photos[i % len(photos)], config, random_generator(0, 0, i)) for i in range(24)]
    together = [None] * 24

    def work(first):
        for i in range(first, 24, 4):
            together[i] = make_image(photos[i % len(photos)], config, random_generator(0, 0, i))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    np.testing.assert_array_equal(together, alone)


def test_decoding_and_resizing_let_other_threads_run(encode):
    big = np.random.default_rng(0).integers(0, 256, (2500, 2500, 3), np.uint8)
    data = encode(big, "JPEG")
    for work in (lambda: decode(record(data)), lambda: crop_and_resize(big, (0.0, 0.0, 2500.0, 2500.0), 2000)):
        ticks, done = [], threading.Event()

        def tick(ticks=ticks, done=done):
            while not done.wait(0.001):
                ticks.append(time.perf_counter())

        thread = threading.Thread(target=tick)
        thread.start()
        start = time.perf_counter()
        work()
        end = time.perf_counter()
        done.set()
        thread.join()
        assert sum(start < t < end for t in ticks) >= 5, end - start  # a held lock lets one or two through


@pytest.mark.parametrize("box", [(0.0, 0.0, 110.0, 70.0), (13.0, 5.0, 90.0, 66.0), (3.25, 2.5, 40.75, 33.125)])
@pytest.mark.parametrize("size", [16, 64, 200])
def test_resize_is_pillows_filter(picture, box, size):
    got = crop_and_resize(np.asarray(picture), box, size).astype(int)
    left, top, right, bottom = np.floor(box[:2]).tolist() + np.ceil(box[2:]).tolist()
    part = picture.crop((int(left), int(top), int(right), int(bottom)))
    inner = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
    bicubic = Image.Resampling.BICUBIC
    rows = part.resize((part.width, size), bicubic, box=(0, inner[1], part.width, inner[3]))
    both = np.asarray(rows.resize((size, size), bicubic, box=(inner[0], 0, inner[2], size))).astype(int)
    difference = np.abs(got - both)
    assert difference.max() <= 2 and difference.mean() < 0.02
