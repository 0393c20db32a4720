"""Damaged, lying and hostile weight files: each is refused in one line, nothing runs, and nothing is written."""

import functools
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save, save_file

from convert import teachers_to_orbax
from eupe_jax.models import interchange
from eupe_jax.training import weight_files

MODEL = "eupe_vitt16"
OVERRIDES = {"embed_dim": 16, "depth": 1, "num_heads": 1, "patch_size": 4}
FLAGS = [f"--override={k}={v}" for k, v in OVERRIDES.items()]
Case = tuple[str, Path, str]  # what is wrong, file, words the error must have


@functools.cache
def good() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in interchange.state_dict_shapes(MODEL, **OVERRIDES).items()
    }
    mask = tensors["blocks.0.attn.qkv.bias_mask"]
    mask[:] = 1
    mask[mask.size // 3 : -(mask.size // 3)] = 0
    return tensors


class Refused:
    """Runs a converter's `main` on files and demands a one-line refusal that writes nothing."""

    def __init__(self, main: Callable, flags: list[str], out: str, folder: Path, capfd, bystander: Path):
        self.main, self.flags, self.out, self.capfd, self.bystander = main, flags, folder / out, capfd, bystander
        self.count = 0
        folder.mkdir()

    def __call__(self, what: str, path: Path, words: str = "") -> None:
        status = self.main([f"--checkpoint={path}", f"--out={self.out}", *self.flags])
        printed = self.capfd.readouterr()
        assert status == 1, (what, printed)
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and not printed.out, (what, printed)
        assert words in printed.err and "Traceback" not in printed.err, (what, printed.err)
        assert len(printed.err) < 2000
        assert not list(self.out.parent.iterdir()), what
        assert not self.bystander.exists(), f"{what}: code ran"
        self.count += 1


@pytest.fixture
def bystander(tmp_path):
    """The file that code in a checkpoint would make, if it ran."""
    return tmp_path / "code_ran"


@pytest.fixture
def refused(tmp_path, capfd, bystander) -> Refused:
    return Refused(teachers_to_orbax.main, [f"--model={MODEL}", *FLAGS], "o", tmp_path / "out", capfd, bystander)


def test_the_undamaged_file_is_taken(tmp_path, capfd):
    save_file(good(), tmp_path / "good.safetensors")
    arguments = [f"--model={MODEL}", f"--checkpoint={tmp_path}/good.safetensors", f"--out={tmp_path}/o", *FLAGS]
    assert teachers_to_orbax.main(arguments) == 0
    assert not capfd.readouterr().err


def misfits(folder: Path) -> Iterator[Case]:
    """Files in order, but not of this model."""
    path = folder / "x.safetensors"

    def saved(what: str, tensors: dict, words: str) -> Case:
        save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, path)
        return what, path, words

    for name, tensor in good().items():
        yield saved("missing", {n: t for n, t in good().items() if n != name}, f"missing {name} ")
        if tensor.ndim > 1 and tensor.T.shape != tensor.shape:
            yield saved("transposed", good() | {name: tensor.T}, f"{name} has shape {list(tensor.T.shape)}")
        yield saved("one value short", good() | {name: tensor.reshape(-1)[1:]}, f"{name} has shape [{tensor.size - 1}]")
    for name in list(good())[::3]:
        yield saved("integers", good() | {name: good()[name].astype(np.int32)}, f"{name} has dtype int32")
        yield saved("double precision", good() | {name: good()[name].astype(np.float64)}, f"{name} has dtype float64")
        yield saved("extra", good() | {f"{name}.copy": good()[name]}, f"unexpected {name}.copy")
    yield saved("truth values", good() | {"norm.bias": np.ones(16, bool)}, "norm.bias has dtype bool")
    yield saved("complex", good() | {"norm.bias": np.ones(16, np.complex64)}, "norm.bias has dtype")
    yield saved("another block", good() | {"blocks.1.norm1.bias": np.zeros(16, np.float32)}, "unexpected blocks.1")
    prefixed = {("teacher." if i else "") + n: t for i, (n, t) in enumerate(good().items())}
    yield saved("all but one prefixed", prefixed, "missing")
    yield saved("nothing", {}, "missing")


def test_misfits(refused, tmp_path):
    for case in misfits(tmp_path):
        refused(*case)
    assert refused.count >= 75


def test_values_that_are_not_finite(refused, tmp_path):
    path = tmp_path / "x.safetensors"
    for i, name in enumerate(["cls_token", "rope_embed.periods", "blocks.0.attn.qkv.weight", "blocks.0.ls2.gamma"]):
        tensors = {n: t.copy() for n, t in good().items()}
        tensors[name].flat[-1] = (np.nan, np.inf, -np.inf, np.nan)[i]
        tensors["norm.bias"][3] = np.nan  # read last: found although the writing has stopped
        save_file(tensors, path)
        refused("not finite", path, f"2 tensors are not all finite numbers: {name}, norm.bias")
    half = good() | {"norm.weight": np.full(16, np.inf, np.float16)}
    save_file(half, path)
    refused("overflown", path, "norm.weight")
    assert refused.count == 5


def with_header(header: dict | str | bytes, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def broken_safetensors(folder: Path) -> Iterator[Case]:
    whole = save(good())
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    path = folder / "x.safetensors"

    def written(what: str, content: bytes, words: str = "cannot be read as weights") -> Case:
        path.write_bytes(content)
        return what, path, words

    rng = np.random.default_rng(0)
    for end in sorted({0, 1, 7, 8, 9, 8 + length - 1, 8 + length, len(whole) - 1} | {*rng.integers(0, len(whole), 32)}):
        yield written(f"cut after {end} bytes", whole[:end])
    for at in sorted(rng.choice(8 + length, 90, replace=False)):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << int(rng.integers(8))
        yield written(f"bit flipped in byte {at} of the header", bytes(flipped), "")
    for size in (0, 1, length - 1, length + 1, 10**8 + 1, 2**40, 2**62, 2**63, 2**64 - 1):
        yield written(f"header said to have {size} bytes", struct.pack("<Q", size) + whole[8:])
    entry = dict(header["norm.bias"])
    start, end = entry["data_offsets"]
    for what, change in {
        "offsets before the file": {"data_offsets": [-8, end]},
        "offsets behind the file": {"data_offsets": [start + 2**40, end + 2**40]},
        "offsets reversed": {"data_offsets": [end, start]},
        "offsets of another tensor": {"data_offsets": header["norm.weight"]["data_offsets"]},
        "overlapping": {"data_offsets": [start - 4, end]},
        "too few bytes": {"data_offsets": [start, end - 4]},
        "fractional offsets": {"data_offsets": [start + 0.5, end]},
        "three offsets": {"data_offsets": [start, end, end]},
        "no offsets": {"data_offsets": None},
        "larger shape": {"shape": [17]},
        "huge shape": {"shape": [2**62, 2**62]},
        "negative shape": {"shape": [-16]},
        "shape of text": {"shape": "16"},
        "unknown type": {"dtype": "F31"},
        "wider type": {"dtype": "F64"},
        "type of text": {"dtype": 3},
    }.items():
        yield written(what, with_header(header | {"norm.bias": entry | change}, data))
    for metadata in ([], "text", {"a": 1}, {"a": {"b": "c"}}):
        yield written(f"metadata {metadata}", with_header(header | {"__metadata__": metadata}, data))
    text = json.dumps(header)
    twice = text[:-1] + ', "norm.bias": ' + json.dumps(entry) + "}"
    yield written("a name twice", with_header(twice, data), "repeats norm.bias")
    for what, wrong in {"a list": b"[]", "no JSON": b"{", "no UTF-8": b"\xff\xfe{}", "nested": b"[" * 10**5}.items():
        yield written(f"header is {what}", with_header(wrong, data))
    yield written("data left over", whole + b"\0")
    yield written("text", b"version https://git-lfs.github.com/spec/v1\n")
    yield written("a web page", b"<!DOCTYPE html>" + b" " * 200)


def test_broken_safetensors(refused, tmp_path):
    for case in broken_safetensors(tmp_path):
        refused(*case)
    assert refused.count >= 155


def lying_indexes(folder: Path) -> Iterator[Case]:
    outside = folder / "outside.safetensors"
    save_file(good(), outside)
    names = list(good())
    shards = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for shard, held in shards.items():
        save_file({n: good()[n] for n in held}, folder / "model" / shard)
    honest = {n: shard for shard, held in shards.items() for n in held}
    index = folder / "model" / "model.safetensors.index.json"

    def written(what: str, weight_map, words: str = "") -> Case:
        index.write_text(json.dumps({"weight_map": weight_map}))
        return what, index.parent, words

    for escape in ("../outside.safetensors", str(outside), "./../outside.safetensors", "x/../../outside.safetensors",
                   "..\\outside.safetensors", "", ".", ".."):  # fmt: skip
        yield written("escapes", honest | {names[0]: escape}, "in the folder of the index")
    swapped = {n: {"a.safetensors": "b.safetensors"}.get(shard, "a.safetensors") for n, shard in honest.items()}
    yield written("shards swapped", swapped, "lacks")
    yield written("one in the wrong shard", honest | {names[0]: "b.safetensors"}, f"b.safetensors lacks {names[0]}")
    yield written("one unsaid", {n: honest[n] for n in names[1:]}, f"holds {names[0]}")
    yield written("one invented", honest | {"ghost": "a.safetensors"}, "a.safetensors lacks ghost")
    yield written("a shard unsaid", {n: s for n, s in honest.items() if s == "a.safetensors"}, "missing")
    yield written("a shard gone", honest | {names[0]: "c.safetensors"}, "not in its folder")
    for what, wrong in {"a list": [], "empty": {}, "numbers": {"a": 1}, "null": None}.items():
        yield written(what, wrong, "weight_map")
    for content in ("", "{", "3", '{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}'):
        index.write_text(content)
        yield f"index {content!r}", index, "index"
    index.write_text(json.dumps({"weight_map": honest}))
    (folder / "model" / "b.safetensors").write_bytes(b"\0" * 100)
    yield "a shard broken", index.parent, "b.safetensors cannot be read"


def test_lying_indexes(refused, tmp_path):
    (tmp_path / "model").mkdir()
    for case in lying_indexes(tmp_path):
        refused(*case)
    assert refused.count == 23


class Touch:
    """Unpickling it makes the file `path`."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def hostile_torch_files(torch, folder: Path, bystander: Path) -> Iterator[Case]:
    path = folder / "x.pt"
    tensors = {name: torch.from_numpy(value) for name, value in good().items()}
    places = {
        "alone": Touch(bystander),
        "as a tensor": tensors | {"norm.bias": Touch(bystander)},
        "beside the tensors": {"state_dict": tensors, "optimizer": Touch(bystander)},
        "as a name": {Touch(bystander): tensors["norm.bias"]},
    }
    for where, content in places.items():
        for protocol in range(2, 6):
            path.write_bytes(pickle.dumps(content, protocol))
            yield f"code {where}, bare pickle {protocol}", path, "cannot be read as weights"
        for zipped in (True, False):
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            yield f"code {where}, zipped: {zipped}", path, "code in a file is never run"
    for code in (b"cos\nsystem\n(S'touch %s'\ntR." % str(bystander).encode(), b"\x80\x02cbuiltins\neval\n."):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data.pkl", code)
            archive.writestr("archive/version", "3\n")
        for content in (code, buffer.getvalue()):
            path.write_bytes(content)
            yield "hand-written code", path, "cannot be read as weights"


def broken_torch_files(torch, folder: Path) -> Iterator[Case]:
    path = folder / "x.pt"
    tensors = {name: torch.from_numpy(value) for name, value in good().items()}
    torch.save(tensors, path)
    whole = path.read_bytes()
    for end in np.linspace(0, len(whole) - 1, 30).astype(int):
        path.write_bytes(whole[:end])
        yield f"cut after {end} bytes", path, "cannot be read as weights"
    for what, content in {
        "a list": list(tensors.values()),
        "a tensor": tensors["norm.bias"],
        "a number": 3,
        "a step count among the tensors": tensors | {"step": 3},
        "names of numbers": dict(enumerate(tensors.values())),
        "another nesting": {"net": tensors},
        "twice wrapped": {"model": {"net": tensors}},
        "nothing": {},
        "nothing wrapped": {"state_dict": {}},
        "sparse": tensors | {"norm.bias": tensors["norm.bias"].to_sparse()},
        "eight bits": tensors | {"norm.bias": tensors["norm.bias"].to(torch.float8_e4m3fn)},
        "on no device": tensors | {"norm.bias": tensors["norm.bias"].to("meta")},
        "one value repeated without end": tensors | {"norm.bias": torch.zeros(1).expand(2**40)},
    }.items():
        torch.save(content, path)
        yield what, path, ""


def test_hostile_and_broken_torch_files(refused, tmp_path, bystander):
    torch = pytest.importorskip("torch")
    pickle.loads(pickle.dumps(Touch(bystander))).close()
    assert bystander.exists(), "the trap works"
    bystander.unlink()
    for case in hostile_torch_files(torch, tmp_path, bystander):
        refused(*case)
    assert refused.count == 28
    for case in broken_torch_files(torch, tmp_path):
        refused(*case)
    assert refused.count == 28 + 43


def test_bits_flipped_in_a_torch_file_never_end_in_a_traceback(tmp_path, capfd):
    """The container has no checksum that a mapped file would be held against: a flip may pass, but not crash."""
    torch = pytest.importorskip("torch")
    path, rng = tmp_path / "x.pt", np.random.default_rng(0)
    torch.save({name: torch.from_numpy(value) for name, value in list(good().items())[:3]}, path)
    whole = path.read_bytes()
    ends = len(whole) - 1000  # its directory
    refused = 0
    for at in [*rng.integers(0, 1500, 40), *rng.integers(ends, len(whole), 40)]:
        flipped = bytearray(whole)
        flipped[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            with weight_files.open_weights(path) as weights:
                {name: np.asarray(tensor) for name, tensor in weights.items()}
        except (ValueError, OSError) as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 20
    assert not capfd.readouterr().err


def test_other_things_than_files(refused, tmp_path):
    save_file(good(), tmp_path / "good.safetensors")
    for suffix in (".safetensors", ".pt", ".pth", ".safetensors.index.json", ".bin", ""):
        (tmp_path / f"folder{suffix}").mkdir()
        refused("an empty folder", tmp_path / f"folder{suffix}")
        refused("nowhere", tmp_path / f"nowhere{suffix}", "nowhere")
        (tmp_path / f"empty{suffix}").write_bytes(b"")
        refused("an empty file", tmp_path / f"empty{suffix}", "empty")
        (tmp_path / f"noise{suffix}").write_bytes(np.random.default_rng(0).bytes(5000))
        refused("noise", tmp_path / f"noise{suffix}", "noise")
    refused("remote", "gs://bucket/x.safetensors", "copy it to this machine")
    for model in ("eupe_vits16", "dinov3_vits16plus", "eupe_convnext_tiny", "pe_core_t16_384", "eupe_vit", ""):
        refused.flags = [f"--model={model}"]
        refused(f"as {model}", tmp_path / "good.safetensors")
    assert refused.count == 31


@pytest.mark.parametrize("converter", ["to_torch", "to_executorch"])
def test_the_other_converters_refuse_them_too(converter, tmp_path, capfd, bystander):
    torch = pytest.importorskip("torch")
    if converter == "to_executorch":
        pytest.importorskip("executorch", reason="the phone export needs `pip install eupe_jax[export]`")
        from convert import to_executorch as module
    else:
        from convert import to_torch as module
    suffix = {"to_torch": ".safetensors", "to_executorch": ".pte"}[converter]
    check = Refused(module.main, [f"--model={MODEL}"], f"x{suffix}", tmp_path / "out", capfd, bystander)
    (tmp_path / "model").mkdir()
    kinds = [
        broken_safetensors(tmp_path),
        lying_indexes(tmp_path),
        hostile_torch_files(torch, tmp_path, bystander),
        broken_torch_files(torch, tmp_path),
    ]
    for cases in kinds:
        for i, case in enumerate(cases):
            if i % 8 == 0 and case[2]:
                check(*case)
    described = {"format": weight_files.FORMAT, "model": MODEL, "overrides": OVERRIDES, "resolution": 32}
    described |= {"mean": [0.5] * 3, "std": [0.5] * 3}
    for i, (what, path, words) in enumerate(misfits(tmp_path)):
        if i % 8:
            continue
        with weight_files.open_weights(path) as weights:
            tensors = {name: np.array(tensor) for name, tensor in weights.items()}
        sealed = described | {"weights_sha256": weight_files.digest(tensors)}
        save_file(tensors, path, {"eupe_jax": json.dumps(sealed)})
        check(what, path, "" if "dtype" in words else words)
    assert check.count >= 25
