"""Storage that fails for a while, or is another one suddenly: no record may be lost or exchanged for it."""

import errno
import os
import pickle
import resource
import shutil
import time

import numpy as np
import pytest
from source_files import make_images, write_array_records, write_folder, write_parquet, write_tars

from eupe_jax.data import host, packing
from eupe_jax.data.host import HostConfig, RecordReader
from eupe_jax.data.pack_shard import BrokenImages, ImageOptions
from eupe_jax.data.sources import Changed, RecordError, Unavailable, open_source
from eupe_jax.data.sources.base import Refused
from eupe_jax.data.sources.record_codec import pack_record

fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
MemoryFile = pytest.importorskip("fsspec.implementations.memory").MemoryFile

IMAGES = make_images()
WRITERS = {"images": write_folder, "tar": write_tars, "parquet": write_parquet, "array_record": None}


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(kind, folder, options="group_size:1,uncompressed"):
    if kind != "array_record":
        return WRITERS[kind](folder, IMAGES)
    return write_array_records(folder, [pack_record(n, d) for n, d in IMAGES.items()], options=options)


@pytest.fixture
def bucket(tmp_path):
    """fsspec's memory with a folder of every kind."""
    fs = fsspec.filesystem("memory")
    for kind in WRITERS:
        for file in write(kind, tmp_path / kind).iterdir():
            fs.pipe_file(f"outage/{kind}/{file.name}", file.read_bytes())
    yield "memory://outage"
    fs.rm("outage", recursive=True)


class Outage:
    """Lets the first `working` reads of fsspec's memory through, and after `failing` more all others again."""

    def __init__(self, monkeypatch, error, working=0, failing=10**9):
        self.error, self.working, self.failing, self.reads = error, working, failing, 0
        whole = type(fsspec.filesystem("memory")).cat_file

        def cat_file(fs, *args, **kwargs):
            self.reads += 1
            if self.working < self.reads <= self.working + self.failing:
                raise self.error
            return whole(fs, *args, **kwargs)

        monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", cat_file)


def pack(source, out, **settings):
    arguments = {"kind": "images", "shards": 3, "on_broken": "drop", "progress": False} | settings
    return packing.pack(source, out, **arguments)


class HttpError(Exception):
    """As gcsfs and aiohttp have them: no OSError."""


@pytest.mark.parametrize("kind", ["images", "tar", "array_record"])
@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
        HttpError("Service Unavailable, 503"),
        OSError("Forbidden: https://storage.googleapis.com/b/o, 403"),
        FileNotFoundError("the bucket"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_a_pack_stops_at_an_outage_and_then_goes_on_with_every_record(bucket, tmp_path, monkeypatch, kind, error):
    source = open_source(kind, f"{bucket}/{kind}")
    whole = pack(source, tmp_path / "whole", kind=kind)
    with monkeypatch.context() as patch:
        Outage(patch, error, working=4)
        with pytest.raises(Unavailable, match="^memory://outage/"):
            pack(source, tmp_path / "out", kind=kind)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert len(list((tmp_path / "out").glob("*.array_record"))) == 1
    assert pack(source, tmp_path / "out", kind=kind) == whole
    assert whole["records"] == len(IMAGES) and not any(shard["broken"] for shard in whole["shards"])


def test_an_outage_within_a_parquet_file_is_no_damage(bucket, monkeypatch):
    source = open_source("parquet", f"{bucket}/parquet", cache_mib=0)
    reads, failing, real = [], [], MemoryFile.read

    def read(file, size=-1):
        reads.append(size)
        if len(reads) in failing:
            raise HttpError("Service Unavailable, 503")
        return real(file, size)

    monkeypatch.setattr(MemoryFile, "read", read)
    assert source[0].data == IMAGES["0000.png"] and len(reads) >= 2  # of the footer and of the row group
    for number in range(1, len(reads) + 1):
        reads.clear()
        failing[:] = [number]
        source = pickle.loads(pickle.dumps(source))  # with an empty cache
        with pytest.raises(Unavailable, match="train-00000-of-00002.parquet: cannot be read: Service Unavailable"):
            source[0]


def test_an_outage_while_opening_does_not_hide_a_manifest(bucket, monkeypatch):
    def info(fs, path, **kwargs):
        if path.endswith("manifest.json"):
            raise HttpError("Service Unavailable, 503")
        return real(fs, path, **kwargs)

    memory = type(fsspec.filesystem("memory"))
    real = memory.info
    assert len(open_source("array_record", f"{bucket}/array_record")) == len(IMAGES)  # it has none
    monkeypatch.setattr(memory, "info", info)
    with pytest.raises(ValueError, match=r"^source: memory://.*/manifest.json: cannot be read: Service Unavailable"):
        open_source("array_record", f"{bucket}/array_record")


@pytest.mark.parametrize("gone", ["deleted", "unmounted"])
def test_a_folder_that_is_gone_is_no_broken_image(tmp_path, gone):
    folder = write_folder(tmp_path / "in", IMAGES)
    source = open_source("images", str(folder))
    shutil.rmtree(folder)
    if gone == "unmounted":  # what it was mounted on is there
        folder.mkdir()
    with pytest.raises(Refused, match="0000.png: no such file, nor can others of .*/in be read: is it mounted"):
        pack(source, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    shutil.rmtree(folder, ignore_errors=True)
    write_folder(folder, IMAGES)
    assert pack(source, tmp_path / "out")["records"] == len(IMAGES)


@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_one_image_that_is_gone_is_a_broken_record(bucket, tmp_path, where):
    folder = write_folder(tmp_path / "in", IMAGES)
    (folder / "alone").mkdir()  # nothing lies beside it
    (folder / "alone" / "z.png").write_bytes(IMAGES["0000.png"])
    source = open_source("images", str(folder) if where == "disk" else f"{bucket}/images")
    gone = [3, 9] if where == "disk" else [3]
    for index in gone:
        name = source.name(index)
        os.unlink(name) if where == "disk" else fsspec.filesystem("memory").rm_file(name)
        with pytest.raises(RecordError, match="no such"):
            source[index]
    manifest = pack(source, tmp_path / "out")
    assert [b["index"] for s in manifest["shards"] for b in s["broken"]] == gone
    assert manifest["records"] == len(source) - len(gone)


@pytest.mark.parametrize("kind", [k for k in WRITERS if k != "images"])
def test_a_shard_that_is_gone_is_no_broken_record(tmp_path, kind):
    """Thousands of records would be."""
    for options in ["group_size:1,uncompressed", "group_size:2,zstd"][: 1 + (kind == "array_record")]:
        source = open_source(kind, str(write(kind, tmp_path / options[:12], options)))
        last = sorted((tmp_path / options[:12]).iterdir())[-1]
        content = last.read_bytes()
        last.unlink()
        with pytest.raises(Unavailable, match=f"{last.name}: no such file"):
            source[-1]
        last.write_bytes(content[:-1] + b"x")
        with pytest.raises(Changed, match=f"{last.name}: changed since the source was opened"):
            source[-1]


@pytest.mark.parametrize("kind", WRITERS)
def test_no_more_open_files_are_no_broken_record(tmp_path, kind):
    source = open_source(kind, str(write(kind, tmp_path / "in")))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(Unavailable, match="Too many open files"):
            source[5]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert source[5].data == IMAGES["0005.jpg"]


def test_a_stale_handle_is_opened_again(tmp_path):
    source = open_source("tar", str(write_tars(tmp_path / "in", IMAGES)))
    assert source[8].data == IMAGES["0008.png"]
    (descriptor,) = source._reader._open.values()
    null = os.open(os.devnull, os.O_WRONLY)  # cannot be read
    os.dup2(null, descriptor._number)
    os.close(null)
    with pytest.raises(Unavailable, match="train-000002.tar: cannot be read: Bad file descriptor"):
        source[8]
    assert source[8].data == IMAGES["0008.png"]


def test_nothing_but_broken_images_is_no_pack(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"")
    with pytest.raises(BrokenImages, match="every image is broken.*a.jpg .the file is empty.; .*b.jpg"):
        pack(open_source("images", str(tmp_path / "in")), tmp_path / "out", shards=1)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_how_a_source_is_read_may_change_and_what_it_is_may_not(tmp_path, numbered):
    first = {"index_dir": "a", "cache_mib": 1, "relist": True, "column": "image"}
    whole = pack(numbered, tmp_path / "out", source_options=first)
    assert pack(numbered, tmp_path / "out", source_options={"index_dir": "b", "column": "image"}) == whole
    with pytest.raises(ValueError, match=r"source.options={'column': 'image'} \(now {'column': 'picture'}\)"):
        pack(numbered, tmp_path / "out", source_options=first | {"column": "picture"})


def test_images_of_too_many_pixels_are_broken(tmp_path):
    source = open_source("images", str(write_folder(tmp_path / "in", IMAGES)))
    manifest = pack(source, tmp_path / "out", images=ImageOptions(max_pixels=256 * 257 - 1))
    (broken,) = (b for s in manifest["shards"] for b in s["broken"])
    assert broken["name"].endswith("0004.png") and broken["kind"] == "too large"
    assert pack(source, tmp_path / "all", images=ImageOptions(max_pixels=256 * 257))["records"] == len(IMAGES)
    with pytest.raises(ValueError, match="max_pixels must be positive, got 0"):
        ImageOptions(max_pixels=0)


# ---- in training


@pytest.fixture
def pauses(monkeypatch):
    """Those that are made, in seconds, without waiting for them."""
    made = []
    monkeypatch.setattr(time, "sleep", made.append)
    return made


def images_of(source):
    reader = RecordReader(HostConfig(size=8), seed=0)
    read = [reader(source, i, 0, i) for i in range(len(source))]
    assert not reader.counts
    return [index for _, index in read], np.stack([image for image, _ in read])


def test_a_hiccup_changes_no_record_of_a_run(bucket, monkeypatch, pauses):
    source = open_source("tar", f"{bucket}/tar")
    expected = images_of(source)
    outage = Outage(monkeypatch, ConnectionResetError(errno.ECONNRESET, "reset"), working=3, failing=4)
    index, pixels = images_of(source)
    assert index == expected[0] and np.array_equal(pixels, expected[1])
    assert pauses == list(host._PAUSES) and outage.reads == len(IMAGES) + 4


def test_an_outage_ends_a_run_and_a_replaced_shard_does_at_once(bucket, monkeypatch, pauses, tmp_path):
    with monkeypatch.context() as patch:
        source = open_source("tar", f"{bucket}/tar")
        Outage(patch, ConnectionResetError(errno.ECONNRESET, "reset"))
        with pytest.raises(Unavailable, match="train-000000.tar: cannot be read: reset"):
            images_of(source)
    assert pauses == list(host._PAUSES)
    folder = write_tars(tmp_path / "in", IMAGES)
    source = open_source("tar", str(folder))
    write_tars(folder, dict(reversed(IMAGES.items())))
    with pytest.raises(Changed, match="train-000000.tar: changed since the source was opened; start again"):
        images_of(source)
    assert pauses == list(host._PAUSES)


# ---- links


def test_folders_that_several_links_lead_to_count_under_each_and_links_back_up_end(tmp_path, monkeypatch):
    folder = tmp_path / "in"
    write_folder(folder / "m", IMAGES)
    for link in ("z", "a"):
        (folder / link).symlink_to("m")
    (folder / "m" / "up").symlink_to(folder)
    source = open_source("images", str(folder))
    names = [f"{folder}/{below}/{name}" for below in "amz" for name in IMAGES]
    assert [source.name(i) for i in range(len(source))] == names
    scandir = os.scandir

    class Backwards:
        """The same entries in another order, as another host's file system may give them."""

        def __init__(self, path):
            with scandir(path) as found:
                self._entries = sorted(found, key=lambda e: e.name, reverse=True)

        def __enter__(self):
            return iter(self._entries)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    again = open_source("images", str(folder))
    assert [again.name(i) for i in range(len(again))] == names and again.digest == source.digest
