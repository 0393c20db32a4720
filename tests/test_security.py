"""Files by other hands: no code in them is run, no name in them leaves its folder, no claim in them takes the memory.

docs/reliability.md lists what is covered.
"""

import ast
import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eupe_jax.data import packing
from eupe_jax.data.decode import BrokenRecord, decode
from eupe_jax.data.feature_cache import FORMAT, MANIFEST, FeatureCache
from eupe_jax.data.feature_codec import unpack_arrays
from eupe_jax.data.sources import Record, RecordError, open_source, riegeli, storage
from eupe_jax.data.sources.base import is_plain_name
from eupe_jax.data.sources.index_cache import IndexCache
from eupe_jax.data.sources.record_codec import pack_record
from eupe_jax.distill.normalization import Statistics
from eupe_jax.evals.dense_data import open_image
from eupe_jax.evals.interface import DataError
from eupe_jax.training import integrity
from eupe_jax.training.weight_files import open_weights

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("eupe_jax", "launch", "convert", "configs", "benchmarks")
OUTSIDE = ("../x", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "a\0b", "n" * 300)
DEEP = b"[" * 200_000
# What runs code that lies in data, or writes where an archive says: module -> names in it, "*" for all.
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml", "runpy", "code"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "os.system", "os.popen", "extractall", "unpack_archive", "mktemp", "import_module",
    "__import__", "spec_from_file_location",
}  # fmt: skip
# file: call that is let pass, because of what it is called with.
ALLOWED = {
    "eupe_jax/distill/host_teachers.py": {"import_module"},  # the import path of a teacher, out of the user's config
    "eupe_jax/evals/registry.py": {"import_module"},  # one of a fixed list of our modules
    "eupe_jax/evals/tokenizer.py": {"__import__"},  # a constant
    "convert/cards.py": {"yaml"},  # safe_dump, of a card's header: nothing is read
    "convert/origins.py": {"import_module"},  # the recipes of configs/, by the names of their files
    "benchmarks/recipe/xfeat.py": {"spec_from_file_location"},  # a module of an installed package
    "benchmarks/pod_choices.py": {"import_module"},  # a recipe of ours
    "benchmarks/plans.py": {"import_module"},  # the same
    "benchmarks/save_blocking.py": {"import_module"},  # the same
}


def python_files():
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def call_name(node):
    """ "os.system" of os.system(...), "extractall" of archive.extractall(...), "eval" of eval(...)."""
    if isinstance(node.func, ast.Name):
        return node.func.id, node.func.id
    if isinstance(node.func, ast.Attribute):
        owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
        return node.func.attr, f"{owner}.{node.func.attr}"
    return "", ""


def constant(node, keyword):
    """The literal that a call gives for a keyword; None without one."""
    found = [k.value for k in node.keywords if k.arg == keyword]
    return found[0].value if found and isinstance(found[0], ast.Constant) else None


def dangers(source):
    """{what} of a Python file that could run code out of data."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found |= {name for name in names if name.split(".")[0] in FORBIDDEN_MODULES}
        if not isinstance(node, ast.Call):
            continue
        short, dotted = call_name(node)
        if dotted in FORBIDDEN_CALLS or (short in FORBIDDEN_CALLS - {"eval", "exec", "compile"}):
            found.add(short)
        if dotted == "torch.load" and constant(node, "weights_only") is not True:
            found.add("torch.load")
        if dotted in ("np.load", "numpy.load") and constant(node, "allow_pickle") is not False:
            found.add("np.load")
        if constant(node, "allow_pickle") or constant(node, "shell") or constant(node, "trust_remote_code"):
            found.add(f"{short} with a dangerous option")
        if dotted.startswith("subprocess.") and not (node.args and isinstance(node.args[0], ast.List | ast.Name)):
            found.add("subprocess of a string")
    return found


def test_no_code_out_of_data_is_ever_run():
    files = python_files()
    assert len(files) > 100
    found = {str(path.relative_to(ROOT)): dangers(path.read_text()) for path in files}
    assert {file: what for file, what in found.items() if what} == ALLOWED


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("import pickle", "pickle"),
        ("from joblib import load", "joblib"),
        ("torch.load(path)", "torch.load"),
        ("torch.load(path, weights_only=False)", "torch.load"),
        ("np.load(path)", "np.load"),
        ("np.load(path, allow_pickle=True)", "np.load"),
        ("eval(text)", "eval"),
        ("os.system(text)", "system"),
        ("subprocess.run(f'ls {x}', shell=True)", "subprocess of a string"),
        ("archive.extractall(folder)", "extractall"),
        ("importlib.import_module(name)", "import_module"),
    ],
)
def test_the_scan_sees_what_it_looks_for(line, what):
    assert what in dangers(line)
    assert not dangers("model.eval(); torch.load(p, weights_only=True); np.load(p, allow_pickle=False); re.compile(x)")


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_of_manifests_stay_in_their_folder(name, tmp_path):
    assert not is_plain_name(name)
    shard = {"file": name, "records": 1, "bytes": 1, "sha256": "0", "broken": []}
    cache = {"format": FORMAT, "recipe": {}, "chains": {}, "shards": [shard]}
    (tmp_path / MANIFEST).write_text(json.dumps(cache))
    with pytest.raises(ValueError, match="no file of its folder"):
        FeatureCache(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({**cache, "shards": [], "chains": {f"../{name}": {}}}))
    with pytest.raises(ValueError, match="no file of its folder"):
        FeatureCache(tmp_path)
    pack = {"format": packing.FORMAT, "records": 1, "images": {}, "shards": [shard]}
    (tmp_path / packing.MANIFEST).write_text(json.dumps(pack))
    with pytest.raises(ValueError, match="no file of its folder"):
        packing.verify(tmp_path, progress=False)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises((ValueError, FileNotFoundError)):
        open_weights(index)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x"])
def test_checksums_of_a_checkpoint_name_no_file_outside_of_it(name, tmp_path):
    (tmp_path / "x").write_text("outside")
    step = tmp_path / "step"
    step.mkdir()
    held = {"files": {name: {"size": 7, "sha256": "0"}}, integrity.STEP_METADATA: None}
    content = json.dumps({**held, "sha256": integrity._digest(held)})
    (step / integrity.CHECKSUMS).write_text(content)
    with pytest.raises(integrity.CorruptCheckpoint, match="checksums.json is damaged"):
        integrity.verify(integrity.epath.Path(step))


def test_items_of_a_checkpoint_are_its_own_folders(tmp_path):
    """A student's name out of a manifest makes the name of an item."""
    step = tmp_path / "step"
    (step / "vit.backbone").mkdir(parents=True)
    (step / "vit.backbone" / "0").write_text("weights")
    (tmp_path / "x.backbone").mkdir()
    (step / integrity.STEP_METADATA).write_text("{}")
    integrity.seal(integrity.epath.Path(step))
    integrity.verify(integrity.epath.Path(step), ["vit.backbone"])
    for item in ("../x.backbone", str(tmp_path / "x.backbone"), "vit.backbone/../../x.backbone"):
        with pytest.raises(integrity.CorruptCheckpoint, match="holds no"):
            integrity.verify(integrity.epath.Path(step), [item])


def png():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_members_of_an_archive_are_bytes_and_never_files(tmp_path):
    shard, names = tmp_path / "a.tar", ["../../evil.png", "/etc/evil.png", "n" * 300 + ".png", "link.png", "plain.png"]
    with tarfile.open(shard, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            if name == "link.png":
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(member)
                continue
            member.size = len(png())
            tar.addfile(member, io.BytesIO(png()))
    before = sorted(tmp_path.parent.rglob("*evil*"))
    source = open_source("tar", str(shard))
    assert [r.data for r in map(source.__getitem__, range(len(source)))] == [png()] * 4  # the link is none
    assert sorted(tmp_path.parent.rglob("*evil*")) == before


def tar_header(name, size, kind=b"0"):
    """A header with any size, also a negative one."""
    head = bytearray(512)
    head[: len(name)] = name
    head[100:124], head[136:148] = b"0000644\0" + b"0000000\0" * 2, b"00000000000\0"
    head[124:136] = (b"\xff" if size < 0 else b"\x80") + (size % (1 << 88)).to_bytes(11, "big")
    head[156:157], head[257:265], head[148:156] = kind, b"ustar\x0000", b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "header",
    [
        tar_header(b"b.png", -512),  # leads back to itself
        tar_header(b"b.png", -1024),
        tar_header(b"long", 1 << 40, b"L"),  # a name of a terabyte
        tar_header(b"long", -512, b"x"),
        tar_header(b"b.png", 1 << 60),
    ],
)
def test_a_tar_file_that_lies_about_sizes_is_an_error(header, tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(tar_header(b"a.png", 0) + header + bytes(1024))
    with pytest.raises((ValueError, RecordError)):
        source = open_source("tar", str(path))
        source[1]


def test_records_larger_than_any_picture_are_not_read(tmp_path):
    huge = tmp_path / "a" / "huge.png"
    huge.parent.mkdir()
    with huge.open("wb") as file:
        file.truncate(storage.MOST_BYTES + 1)  # without a byte on the disk
    with pytest.raises(RecordError, match="more than"):
        open_source("images", str(huge.parent))[0]
    file = storage.stat(str(huge))
    with pytest.raises(RecordError, match="more than"):
        storage.RangeReader().read(file, 0, storage.MOST_BYTES + 1)
    with pytest.raises(RecordError, match="before a record"):
        storage.RangeReader().read(file, 1 << 63, 1)


def test_a_pipe_among_images_is_an_error_and_no_wait(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png: not a regular file"):
        open_source("images", str(tmp_path))


@pytest.mark.parametrize("side", [100_000, 2**31 - 1])
def test_a_picture_is_refused_by_its_header(side):
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + bytes(100)
    with pytest.raises(BrokenRecord, match="max_pixels|too large|identify|exceeds limit"):
        decode(Record(data, "bomb.png"))


def test_formats_that_start_programs_are_not_pictures(tmp_path):
    """PostScript would be handed to Ghostscript."""
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    path = tmp_path / "a.png"
    path.write_bytes(script)
    with Image.open(path) as image:
        assert image.format == "EPS"  # what Pillow makes of it, left alone
    with pytest.raises(BrokenRecord, match="identify"):
        decode(Record(script, "a.png"))
    with pytest.raises(DataError, match="cannot be decoded"):
        open_image(path, "here")


@pytest.mark.timeout(30)
def test_a_footer_that_claims_petabytes_is_an_error(tmp_path):
    path = tmp_path / "a.array_record"
    with path.open("wb") as file:
        file.truncate(1 << 17)
    row = np.zeros(1, riegeli.ROW)[0]
    row["offset"], row["size"] = 65536, 1 << 60
    with pytest.raises(RecordError, match="damaged"):
        riegeli.read_record(storage.stat(str(path)), storage.RangeReader(), row)
    with pytest.raises(ValueError, match="decompressed size"):
        riegeli._decompress(ord("z"), memoryview(bytes([0xFF] * 9 + [1]) + bytes(100)))


def test_an_index_of_python_objects_is_made_again(tmp_path):
    """Its bytes would be taken for addresses."""
    path, folder = tmp_path / "shard", tmp_path / "index"
    path.write_bytes(b"x")
    file = storage.stat(str(path))
    cache = IndexCache(lambda file: np.zeros(4, [("a", "<u8")]), "numbers", str(folder))
    cache.indices([file])
    (kept,) = folder.glob("*.idx")
    line, rest = kept.read_bytes().split(b"\n", 1)
    text = line[9:].replace(b'"<u8"', b'"|O"') + b" "
    kept.write_bytes(b"%08x %s\n" % (zlib.crc32(text), text) + b"\1" * len(rest))
    table = cache.table(cache.indices([file])[0])
    assert table.dtype == np.dtype([("a", "<u8")]) and not table["a"].any()


@pytest.mark.parametrize(
    "header",
    [
        DEEP,
        json.dumps([["a", "uint8", [1 << 40, 1 << 40]]]).encode(),
        json.dumps([["a", "uint8", [-1]]]).encode(),
        json.dumps([["a", "object", [1]]]).encode(),
    ],
)
def test_a_record_that_claims_too_much_is_an_error(header):
    record = pack_record("a", struct.pack("<I", len(header)) + header + bytes(16))
    with pytest.raises(ValueError, match="not a record of arrays"):
        unpack_arrays(record)


def test_json_nested_without_end_is_an_error(tmp_path):
    for name, read in {
        MANIFEST: lambda: FeatureCache(tmp_path),
        packing.MANIFEST: lambda: packing.verify(tmp_path),
        "model.safetensors.index.json": lambda: open_weights(tmp_path),
        "teacher.safetensors": lambda: Statistics.load(tmp_path / "teacher.safetensors"),
        integrity.CHECKSUMS: lambda: integrity.verify(integrity.epath.Path(tmp_path)),
    }.items():
        head = struct.pack("<Q", len(DEEP)) if name.startswith("teacher") else b""
        (tmp_path / name).write_bytes(head + DEEP)
        with pytest.raises(ValueError, match=name):
            read()
        (tmp_path / name).unlink()


def test_a_header_of_weights_that_claims_gigabytes_is_an_error(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 50) + b"{}")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        open_weights(path)
    head = json.dumps({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(16))
    with pytest.raises(ValueError, match="cannot be read as weights"):
        open_weights(path)
    with pytest.raises(ValueError):
        Statistics.load(path)


def packed_again(path, out, method, extra=b""):
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", method) as new:
        for entry in old.infolist():
            more = extra if entry.filename.endswith("data.pkl") else b""
            new.writestr(entry.filename, old.read(entry) + more)
    return out


def test_weights_of_pytorch_are_not_compressed_nor_bombs(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(4)}, tmp_path / "a.pt")
    with open_weights(tmp_path / "a.pt") as weights:
        np.testing.assert_array_equal(np.asarray(weights["a"]), np.ones(4, np.float32))
    # the mapped bytes of a compressed tensor are other numbers
    for extra in (b"", bytes(8 << 20)):
        with pytest.raises(ValueError, match="compressed in it"):
            open_weights(packed_again(tmp_path / "a.pt", tmp_path / "b.pt", zipfile.ZIP_DEFLATED, extra))
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "c.pt")  # four terabytes of one number
    with open_weights(tmp_path / "c.pt") as weights:
        assert weights["a"].dtype == np.dtype("V1")  # a type that no encoder has


class Payload:
    """Leaves a file when it is unpickled."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return os.mkdir, (str(self._path),)


def test_code_in_a_weights_file_is_not_run(tmp_path):
    torch = pytest.importorskip("torch")
    for legacy in (False, True):
        torch.save({"a": Payload(tmp_path / "ran")}, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(ValueError, match="never run"):
            open_weights(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


def test_data_of_an_onnx_model_lie_in_its_folder(tmp_path):
    onnxruntime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    outside, folder = tmp_path / "secret.bin", tmp_path / "model"
    outside.write_bytes(np.ones(4, np.float32).tobytes())
    folder.mkdir()
    os.symlink(outside, folder / "link.bin")
    for location in ("../secret.bin", str(outside), "link.bin"):
        weight = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
        for key, value in (("location", location), ("offset", "0"), ("length", "16")):
            weight.external_data.add(key=key, value=value)
        x, y = (onnx.helper.make_tensor_value_info(name, 1, [4]) for name in "xy")
        graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [weight])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
        (folder / "a.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(Exception, match="External data path"):
            onnxruntime.InferenceSession(str(folder / "a.onnx"), providers=["CPUExecutionProvider"])
