"""ArrayRecord shards: byte ranges against array_record's own reader, manifests, layouts, damage."""

import hashlib
import json
import random
import shutil

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from source_files import make_images, write_array_records

from eupe_jax.data.sources import ArrayRecordSource, Changed, RecordError, open_source, storage
from eupe_jax.data.sources.record_codec import pack_record
from eupe_jax.data.sources.riegeli import NotPlain, Unreadable, read_record, record_table
from eupe_jax.data.sources.tf_example import bytes_feature

BLOCK = 1 << 16


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(path, records, options="group_size:1,uncompressed"):
    writer = ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()
    return storage.stat(str(path))


def sizes_of(generator: random.Random) -> list[int]:
    """Sizes of records, some of which put the ends of chunks and headers at every place about a block's boundary."""
    kind = generator.choice(["small", "edges", "near a block", "large", "none"])
    count = {"small": 300, "edges": 60, "near a block": 30, "large": 12, "none": 0}[kind]
    edges = (0, 1, 127, 128, 16383, 16384, BLOCK - 24, BLOCK - 1, BLOCK, 3 * BLOCK)
    draw = {
        "small": lambda: generator.randrange(300),
        "edges": lambda: generator.choice(edges),
        "near a block": lambda: BLOCK - 24 - 40 - 4 + generator.randrange(-70, 70),
        "large": lambda: generator.randrange(5 * BLOCK),
        "none": lambda: 0,
    }[kind]
    return [draw() for _ in range(count)]


def check_against_own_reader(path, seed):
    generator = random.Random(seed)
    records = [generator.randbytes(size) for size in sizes_of(generator)]
    file, reader = write(path, records), storage.RangeReader()
    table = record_table(file, reader)
    theirs = ArrayRecordReader(str(path))
    assert len(table) == theirs.num_records() == len(records)
    for i, record in enumerate(records):
        assert read_record(file, reader, table[i]) == record == theirs.read([i])[0], (seed, i)


@pytest.mark.parametrize("seed", range(12))
def test_byte_ranges_give_what_array_record_reads(tmp_path, seed):
    check_against_own_reader(tmp_path / "x.array_record", seed)


@pytest.mark.slow
def test_byte_ranges_give_what_array_record_reads_many_times(tmp_path):
    for seed in range(100, 1000):
        check_against_own_reader(tmp_path / "x.array_record", seed)


@pytest.mark.parametrize(
    "options", ["group_size:1", "group_size:7", "group_size:3,brotli", "group_size:5,uncompressed"]
)
def test_compressed_and_grouped_records_by_byte_ranges(tmp_path, options):
    for seed in range(5):
        generator = random.Random(seed)
        records = [generator.randbytes(n // 2) + bytes(n - n // 2) for n in sizes_of(generator)]
        file, reader = write(tmp_path / "x.array_record", records, options), storage.RangeReader()
        table = record_table(file, reader, plain=False)
        assert [read_record(file, reader, row) for row in table] == records


def test_what_byte_ranges_do_not_read(tmp_path):
    records, reader = [b"a" * 500] * 20, storage.RangeReader()
    for options in ("group_size:4,uncompressed", "group_size:1", "group_size:1,brotli", "group_size:1,transpose"):
        file = write(tmp_path / f"{options}.array_record", records, options)
        with pytest.raises((NotPlain, Unreadable)):
            record_table(file, reader)
        if "transpose" in options:
            with pytest.raises(Unreadable):
                record_table(file, reader, plain=False)
        source = ArrayRecordSource(file.path, layout="raw")  # through array_record's reader
        assert [source[i].data for i in range(20)] == records
        assert source[3].name == f"{file.path}[3]"


def test_no_flipped_bit_goes_unseen(tmp_path):
    images = make_images()
    records = [pack_record(name, data) for name, data in images.items()]
    folder = write_array_records(tmp_path / "x", records, parts=1)
    (path,) = folder.iterdir()
    whole, expected = path.read_bytes(), list(images.items())
    used = len(whole.rstrip(b"\0")) - 1
    # Bytes of records, and of the index (that is at the end), as often as each other.
    rng = np.random.default_rng(0)
    places = [*rng.integers(64, whole.rindex(b"group_size"), 60), *rng.integers(used - 200, used, 60)]
    second = whole.index(b"EUPR", whole.index(b"EUPR") + 1)
    places += list(range(second - 50, second + 4))  # headers of a chunk that is not the first
    places += list(range(whole.index(b"group_size") - 120, whole.index(b"group_size") + 150, 4))
    seen = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        try:
            source = ArrayRecordSource(folder, layout="packed")
        except (ValueError, OSError) as e:
            assert str(path) in str(e)
            seen += 1
            continue
        assert len(source) == len(expected)
        for i, (name, data) in enumerate(expected):
            try:
                record = source[i]
            except RecordError as e:
                assert str(path) in str(e)
                seen += 1
            else:
                assert record == (data, name)
    assert seen > 60


def test_no_flipped_bit_goes_unseen_in_a_compressed_shard_of_a_bucket(tmp_path):
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
    images = make_images()
    folder = write_array_records(
        tmp_path / "x", [pack_record(n, d) for n, d in images.items()], parts=1, options="group_size:2"
    )
    whole, fs = next(folder.iterdir()).read_bytes(), fsspec.filesystem("memory")
    rng, seen = np.random.default_rng(0), 0
    for place in [*rng.integers(64, len(whole.rstrip(b"\0")), 60), *rng.integers(0, 3000, 30)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        fs.pipe_file("flips/x.array_record", bytes(damaged))
        try:
            source = ArrayRecordSource("memory://flips", layout="packed", index_dir=str(tmp_path / f"index{place}"))
        except (ValueError, OSError):
            seen += 1
            continue
        for i, (name, data) in enumerate(images.items()):
            try:
                assert source[i] == (data, name)
            except RecordError:
                seen += 1
    assert seen > 40


def test_cut_off_shards(tmp_path):
    folder = write_array_records(tmp_path / "x", [pack_record(n, d) for n, d in make_images().items()], parts=2)
    path = folder / "train-00001-of-00002.array_record"
    whole = path.read_bytes()
    for length in (0, 10, 100, BLOCK, BLOCK + 1, 2 * BLOCK, len(whole) - BLOCK, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(OSError, match="train-00001-of-00002.array_record: .*ArrayRecord"):
            ArrayRecordSource(folder)
    path.unlink()
    with pytest.raises(ValueError, match="1 of 2 shards are missing, the first is train-00001-of-00002"):
        ArrayRecordSource(folder)
    # One that shrinks while it is open is seen as well.
    path.write_bytes(whole)
    source = ArrayRecordSource(folder)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Changed, match="train-00001.*changed since the source was opened"):
        source[len(source) - 1]


def manifest_of(folder):
    shards = []
    for path in sorted(folder.glob("*.array_record")):
        data = path.read_bytes()
        count = ArrayRecordReader(str(path)).num_records()
        shards.append({"file": path.name, "records": count, "bytes": len(data)})
        shards[-1]["sha256"] = hashlib.sha256(data).hexdigest()
    return {"format": "eupe_jax packed images 1", "shards": shards}


def test_a_manifest_says_what_is_there(tmp_path):
    images = make_images()
    folder = write_array_records(tmp_path / "x", [pack_record(n, d) for n, d in images.items()], name="images")
    manifest = manifest_of(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    source = ArrayRecordSource(folder)
    assert not (tmp_path / "cache").exists()  # nothing is looked up until it is read
    assert [source[i] for i in range(len(source))] == [(d, n) for n, d in images.items()]
    assert len(list((tmp_path / "cache/eupe_jax/array_record_index").glob("*.idx"))) == 3
    assert ArrayRecordSource(folder).digest == source.digest

    def opened(change, match):
        broken = json.loads(json.dumps(manifest))
        change(broken["shards"])
        (folder / "manifest.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=match):
            ArrayRecordSource(folder)

    opened(lambda s: s[1].update(bytes=3), "images-00001-of-00003.array_record: .* its manifest says 3: copy it again")
    opened(lambda s: s.pop(), "images-00002-of-00003.array_record is not in its manifest")
    opened(lambda s: s.append({**s[0], "file": "images-9.array_record"}), "lists images-9.array_record, .*not there")
    opened(lambda s: s[0].pop("sha256"), "manifest.json: not the manifest of packed shards")
    # A wrong count is seen when the shard is read.
    wrong = json.loads(json.dumps(manifest))
    wrong["shards"][2]["records"] += 1
    (folder / "manifest.json").write_text(json.dumps(wrong))
    source = ArrayRecordSource(folder)
    with pytest.raises(Changed, match="images-00002-of-00003"):
        source[len(source) - 1]


def test_layouts_are_found_out_or_asked_for(tmp_path):
    image = make_images(1)["0000.png"]
    write(tmp_path / "raw.array_record", [image] * 2)
    assert ArrayRecordSource(tmp_path / "raw.array_record")[1].data == image
    file = write(tmp_path / "odd.array_record", [b"odd " + image] * 2)
    with pytest.raises(ValueError, match="odd.array_record: its first record begins with b'odd '.*layout='raw'.*key="):
        ArrayRecordSource(file.path)
    assert ArrayRecordSource(file.path, layout="raw")[0].data == b"odd " + image
    mixed = write(tmp_path / "mixed.array_record", [pack_record("a", image), image])
    source = ArrayRecordSource(mixed.path)
    assert source[0].name == "a"
    with pytest.raises(RecordError, match=r"mixed.array_record\[1\]: not a packed record"):
        source[1]


def test_splits_of_a_folder(tmp_path):
    images = make_images()
    records = [pack_record(n, d) for n, d in images.items()]
    write_array_records(tmp_path / "x", records[:3], parts=1, name="train")
    write_array_records(tmp_path / "x", records[3:], parts=2, name="val")
    with pytest.raises(ValueError, match="several splits, 'train', 'val': name one, split='val'"):
        ArrayRecordSource(tmp_path / "x")
    assert [len(ArrayRecordSource(tmp_path / "x", split=s)) for s in ("train", "val", "*")] == [3, 6, 9]
    with pytest.raises(ValueError, match="no split 'test', only 'train', 'val'"):
        ArrayRecordSource(tmp_path / "x", split="test")


def test_tf_examples(tmp_path):
    def field(number, data):
        size = len(data)
        return bytes([number << 3 | 2]) + (bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])) + data

    def example(image):
        label = field(1, b"label") + field(2, field(3, b"\x08\x05"))
        picture = field(1, b"image") + field(2, field(1, field(1, image)))
        return field(1, field(1, label) + field(1, picture))

    assert bytes_feature(example(b"abc"), "image") == b"abc"
    assert bytes_feature(example(b""), "image") == b""
    with pytest.raises(ValueError, match=r"no feature 'picture', only \['image', 'label'\]"):
        bytes_feature(example(b"abc"), "picture")
    with pytest.raises(ValueError, match="feature 'label' holds 0 byte strings"):
        bytes_feature(field(1, field(1, field(1, b"label") + field(2, field(1, b"")))), "label")
    whole = example(b"x" * 200)
    rng = random.Random(0)
    for _ in range(500):  # damage never leads to anything but a ValueError
        at = rng.randrange(len(whole))
        try:
            bytes_feature(whole[:at] + bytes([rng.randrange(256)]) + whole[at + rng.randrange(2) :], "image")
        except ValueError:
            pass
    images = list(make_images(3).values())
    file = write(tmp_path / "e.array_record", [example(d) for d in images if len(d) < 16000])
    source = open_source("array_record", file.path, key="image")
    assert [source[i].data for i in range(len(source))] == [d for d in images if len(d) < 16000]
    with pytest.raises(RecordError, match=r"e.array_record\[0\]: no feature 'jpeg', only \['image', 'label'\]"):
        open_source("array_record", file.path, key="jpeg")[0]
