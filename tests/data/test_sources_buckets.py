"""Sources in buckets: through gcsfs against an emulator of Google Cloud Storage, and through fsspec's memory."""

import logging
import os
import pickle
import socket
import subprocess
import sys

import pytest
from source_files import make_images, prepare_tfds, write_array_records, write_folder, write_parquet, write_tars

from eupe_jax.data.sources import Changed, Unavailable, open_source, storage
from eupe_jax.data.sources.record_codec import pack_record
from tests.buckets import running_emulator

fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")

pytestmark = pytest.mark.timeout(120)  # a stuck server fails

IMAGES = make_images()
KINDS = {"images": "folder", "tar": "tars", "parquet": "parquet", "array_record": "records"}


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("FSSPEC_GS_TOKEN", "anon")  # of other processes; fsspec read it when it was imported here
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    write_folder(folder / "folder", IMAGES)
    write_folder(folder / "folder" / "below", {"z.txt": b"no image", ".hidden.png": IMAGES["0000.png"]})
    write_tars(folder / "tars", IMAGES)
    write_parquet(folder / "parquet", IMAGES)
    write_array_records(folder / "records", [pack_record(n, d) for n, d in IMAGES.items()])
    return folder


@pytest.fixture(scope="module")
def emulator():
    """Address of a running emulator."""
    pytest.importorskip("gcsfs", reason="gcsfs is not installed")
    pytest.importorskip("gcp_storage_emulator", reason="gcp-storage-emulator is not installed")
    with running_emulator() as address:
        yield address


@pytest.fixture(params=["gs", "memory"])
def bucket(request, local, monkeypatch):
    """A bucket with everything of `local` in it."""
    if request.param == "gs":
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", request.getfixturevalue("emulator"))
        filesystem("gs").clear_instance_cache()  # they know the address of another emulator
    fs = filesystem(request.param)
    for file in local.rglob("*"):
        if file.is_file():
            fs.pipe_file(f"data/{file.relative_to(local)}", file.read_bytes())
    yield f"{request.param}://data"
    fs.invalidate_cache()
    for file in fs.find("data"):
        fs.rm_file(file)


def filesystem(scheme):
    """The class that storage takes: gcsfs' other one wants Google's servers."""
    from gcsfs.core import GCSFileSystem

    return GCSFileSystem() if scheme == "gs" else fsspec.filesystem(scheme)


def data(source):
    return [source[i].data for i in range(len(source))]


def put(url, content):
    scheme, path = url.split("://")
    filesystem(scheme).pipe_file(path, content)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_as_from_a_disk(bucket, local, kind):
    near = open_source(kind, str(local / KINDS[kind]))
    far = open_source(kind, f"{bucket}/{KINDS[kind]}")
    assert data(far) == data(near) == list(IMAGES.values())
    assert far.digest == near.digest
    assert kind == "array_record" or far[0].name.startswith(f"{bucket}/")
    assert pickle.loads(pickle.dumps(far))[4] == far[4]
    pattern = {"tar": "train-{000000..000002}.tar", "parquet": "train-*.parquet", "array_record": "*.array_record"}
    if kind in pattern:
        assert data(open_source(kind, f"{bucket}/{KINDS[kind]}/{pattern[kind]}")) == list(IMAGES.values())


def test_another_process_reads_a_pickled_source(emulator, monkeypatch, local, tmp_path):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator)
    filesystem("gs").clear_instance_cache()
    for file in (local / "records").iterdir():
        put(f"gs://data/spawned/{file.name}", file.read_bytes())
    (tmp_path / "source.pickle").write_bytes(pickle.dumps(open_source("array_record", "gs://data/spawned")))
    code = (
        "import pickle, sys; s = pickle.load(open(sys.argv[1], 'rb')); "
        "assert 'tensorflow' not in sys.modules and 'jax' not in sys.modules; print(len(s), len(s[4].data))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "source.pickle")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=dict(os.environ))
    assert done.stdout.split() == ["9", str(len(IMAGES["0004.png"]))], done.stderr


def test_a_replaced_shard_is_indexed_again(bucket, tmp_path):
    first = open_source("tar", f"{bucket}/tars")
    write_tars(tmp_path / "other", {"9999.png": IMAGES["0004.png"]}, parts=1)
    put(f"{bucket}/tars/train-000000.tar", (tmp_path / "other" / "train-000000.tar").read_bytes())
    second = open_source("tar", f"{bucket}/tars")
    assert second[0].data == IMAGES["0004.png"] and second.digest != first.digest


def test_the_listing_is_kept_and_checked(bucket, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "eupe_jax")
    path = f"{bucket}/folder"
    first = open_source("images", path)
    listed, real = [], storage._find_remote
    monkeypatch.setattr(storage, "_find_remote", lambda path: listed.append(path) or real(path))
    assert open_source("images", path).digest == first.digest and not listed
    put(f"{path}/below/new.png", IMAGES["0000.png"])
    assert len(open_source("images", path)) == 9 and not listed  # new objects alone wait for relist
    assert "9 objects as listed in" in caplog.text and "relist=True looks for new ones" in caplog.text
    assert len(open_source("images", path, relist=True)) == 10 and len(listed) == 1
    put(f"{path}/0003.jpg", IMAGES["0001.jpg"])
    changed = open_source("images", path)
    assert len(listed) == 2 and changed[3].data == IMAGES["0001.jpg"] and changed.digest != first.digest


def test_what_is_not_there(bucket):
    scheme = bucket.split("://")[0]
    for kind, path, message in [
        ("images", f"{bucket}/nowhere", "nowhere"),
        ("images", f"{scheme}://no-such-bucket/x", "no-such-bucket/x"),
        ("tar", f"{scheme}://no-such-bucket/x-{{0..2}}.tar", "no-such-bucket/x-0.tar: no such"),
        ("tar", f"{bucket}/tars/train-{{000000..000003}}.tar", "train-000003.tar: no such"),
        ("parquet", f"{bucket}/folder", "no parquet files found"),
    ]:
        with pytest.raises(ValueError, match=f"^source: .*{message}") as e:
            open_source(kind, path)
        assert len(str(e.value).splitlines()) == 1 and len(str(e.value)) < 300
    source = open_source("tar", f"{bucket}/tars")
    filesystem(scheme).rm_file("data/tars/train-000000.tar")
    with pytest.raises(Unavailable, match="train-000000.tar: no such object"):
        source[0]
    put(f"{bucket}/tars/train-000000.tar", b"short")
    with pytest.raises(Changed, match="train-000000.tar: "):
        source[0]


def test_shards_of_others(bucket, tmp_path):
    records = [pack_record(n, d) for n, d in IMAGES.items()]
    for options, folder in (("group_size:1", "compressed"), ("group_size:4,brotli", "groups")):
        write_array_records(tmp_path / folder, records, parts=2, options=options)
        for file in (tmp_path / folder).iterdir():
            put(f"{bucket}/{folder}/{file.name}", file.read_bytes())
        assert data(open_source("array_record", f"{bucket}/{folder}")) == list(IMAGES.values())
    write_array_records(tmp_path / "t", records, parts=1, options="group_size:1,transpose")
    put(f"{bucket}/t/x.array_record", next((tmp_path / "t").iterdir()).read_bytes())
    with pytest.raises(ValueError, match="x.array_record: its records are transposed; .*mount it as a folder .gcsfuse"):
        open_source("array_record", f"{bucket}/t")


def test_tfds_in_a_bucket(bucket, tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is not installed")
    pictures = [{"image": IMAGES[n], "label": i} for i, n in enumerate(["0001.jpg", "0005.jpg", "0007.jpg"])]
    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=1000)}
    for version, count in (("5.1.0", 3), ("5.0.0", 1)):
        splits = {"train": pictures[:count], "validation": pictures[:1]}
        prepare_tfds(tmp_path, "imagenet2012", version, features, splits)
    for file in (tmp_path / "imagenet2012").rglob("*"):
        if file.is_file():
            put(f"{bucket}/tfds/{file.relative_to(tmp_path)}", file.read_bytes())
    near = open_source("tfds", "imagenet2012:5.1.0:train", data_dir=str(tmp_path))
    far = open_source("tfds", "imagenet2012", data_dir=f"{bucket}/tfds")
    assert data(far) == data(near) and len(far) == 3
    assert len(open_source("tfds", "imagenet2012:5.0.0:train", data_dir=f"{bucket}/tfds")) == 1
    for path, message in [
        ("imagenet2012:val", "no split 'val', only 'train', 'validation'"),
        ("imagenet2012:9.9.9:train", r"no version '9.9.9', only \['5.0.0', '5.1.0'\]"),
        ("gone", "tfds/gone: no such file or folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_source("tfds", path, data_dir=f"{bucket}/tfds")
    assert "tensorflow" not in sys.modules


class _Refusing:
    """fsspec's answers where access is refused, as gcsfs words them."""

    def __init__(self, error):
        self._error = error

    def __getattr__(self, name):
        def refuse(*args, **kwargs):
            raise self._error

        return refuse


def test_errors_of_storage_are_one_sentence(monkeypatch):
    gcsfs = pytest.importorskip("gcsfs", reason="gcsfs is not installed")
    for error, message in [
        (
            OSError("Forbidden: https://storage.googleapis.com/b/data/o\nAnonymous caller does not have ..."),
            "forbidden",
        ),
        (gcsfs.retry.HttpError({"code": 403, "message": "Anonymous caller"}), "forbidden"),
        (PermissionError(13, "Permission denied"), "forbidden"),
        (gcsfs.retry.HttpError({"code": 503, "message": "Service unavailable"}), "Service unavailable"),
        (FileNotFoundError("data/x"), "no such object, folder or bucket"),
    ]:
        monkeypatch.setattr(storage, "_filesystem", lambda path, error=error: _Refusing(error))
        for call in (lambda path: storage.find(path, bool, "files"), storage.stat, storage.read_file):
            with pytest.raises(Unavailable, match=f"^gs://data/x: .*{message}") as e:
                call("gs://data/x")
            assert len(str(e.value).splitlines()) == 1


@pytest.mark.slow
def test_a_refused_connection_is_one_sentence(monkeypatch):
    """gcsfs tries again for half a minute before it gives up."""
    pytest.importorskip("gcsfs", reason="gcsfs is not installed")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{s.getsockname()[1]}")
    filesystem("gs").clear_instance_cache()
    with pytest.raises(ValueError, match=r"^source: gs://data/x: cannot be read: .*Connect call failed"):
        open_source("tar", "gs://data/x")
