"""Weight files are read tensor by tensor, and no file is believed before it is checked."""

import argparse
import hashlib
import json
import logging
import re
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from eupe_jax.training import weight_files
from eupe_jax.training.weight_files import is_weights, open_weights

TENSORS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.bias": np.array([0.5, -3, 1e30], ml_dtypes.bfloat16),
    "half": np.array([[1.5]], np.float16),
    "scalar": np.array(3, np.float32),
    "steps": np.array([1, 2**40]),
    "mask": np.array([True, False]),
}


def assert_holds(weights, tensors):
    assert set(weights) == set(tensors) and len(weights) == len(tensors)
    for name, expected in tensors.items():
        lazy = weights[name]
        assert (lazy.shape, lazy.dtype, lazy.nbytes) == (expected.shape, expected.dtype, expected.nbytes), name
        np.testing.assert_array_equal(np.asarray(lazy), expected)
        if np.issubdtype(expected.dtype, np.floating):
            assert np.asarray(lazy, np.float32).dtype == np.float32


def save_shards(folder, **shards):
    folder.mkdir(exist_ok=True)
    for shard, tensors in shards.items():
        save_file(tensors, folder / f"{shard}.safetensors")
    weight_map = {name: f"{shard}.safetensors" for shard, tensors in shards.items() for name in tensors}
    return write_index(folder, weight_map)


def write_index(folder, weight_map):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def split(tensors):
    names = sorted(tensors)
    return {"one": {n: tensors[n] for n in names[:2]}, "two": {n: tensors[n] for n in names[2:]}}


def test_safetensors(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, {"who": "me"})
    with open_weights(path) as weights:
        assert_holds(weights, TENSORS)
        assert weights.metadata == {"who": "me"} and weights.files == [path]
    assert not list(weights)


def test_shards_folders_and_index(tmp_path):
    index = save_shards(tmp_path / "shards", **split(TENSORS))
    for path in (index, index.parent, str(index.parent)):
        assert is_weights(path)
        with open_weights(path) as weights:
            assert_holds(weights, TENSORS)
            assert [p.name for p in weights.files] == ["one.safetensors", "two.safetensors"]
            assert set(weights.sha256) == {"one.safetensors", "two.safetensors"}
    single = tmp_path / "transformers"
    single.mkdir()
    (single / "config.json").write_text("{}")
    save_file(TENSORS, single / "model.safetensors")
    save_file({}, single / "other.safetensors")
    with open_weights(single) as weights:
        assert_holds(weights, TENSORS)


def test_sha256_is_that_of_the_file(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.zeros(2, np.float32)}, path)
    with open_weights(path) as weights:
        assert weights.sha256 == {"x.safetensors": hashlib.sha256(path.read_bytes()).hexdigest()}


def torch_tensors(torch):
    made = {n: torch.from_numpy(np.array(t)) for n, t in TENSORS.items() if n != "a.bias"}
    return made | {"a.bias": torch.tensor([0.5, -3, 1e30], dtype=torch.bfloat16)}


@pytest.mark.parametrize("wrapper", [(), *((key,) for key in weight_files.WRAPPERS), ("state_dict", "model")])
@pytest.mark.parametrize("legacy", [False, True])
def test_pytorch_files(tmp_path, wrapper, legacy, caplog):
    torch = pytest.importorskip("torch")
    content = torch_tensors(torch)
    for key in reversed(wrapper):
        content = {key: content, "epoch": 3}
    path = tmp_path / "x.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with caplog.at_level(logging.INFO, logger="eupe_jax"), open_weights(path) as weights:
        assert_holds(weights, TENSORS)
    assert ("before 1.6" in caplog.text) == legacy
    assert ("also holds ['epoch']" in caplog.text) == bool(wrapper)


def test_pytorch_files_with_the_arguments_of_their_training_script(tmp_path):
    """DUNE's files hold an argparse.Namespace beside the weights: plain attributes, no code."""
    torch = pytest.importorskip("torch")
    torch.save({"model": torch_tensors(torch), "args": argparse.Namespace(lr=0.1)}, tmp_path / "x.pth")
    with open_weights(tmp_path / "x.pth") as weights:
        assert_holds(weights, TENSORS)


def test_pytorch_views_and_parameters(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    content = {"t": base.T, "half": base[1:, ::2].bfloat16().T, "p": torch.nn.Parameter(base)}
    torch.save(content, tmp_path / "x.pt")
    with open_weights(tmp_path / "x.pt") as weights:
        np.testing.assert_array_equal(weights["t"], base.numpy().T)
        np.testing.assert_array_equal(np.asarray(weights["half"], np.float32), base.numpy()[1:, ::2].T)
        np.testing.assert_array_equal(weights["p"], base.numpy())


def test_types_that_no_encoder_has_are_not_mistaken_for_numbers(tmp_path):
    torch = pytest.importorskip("torch")
    content = {"eight": torch.zeros(2).to(torch.float8_e4m3fn), "sparse": torch.eye(2).to_sparse()}
    for name, tensor in content.items():
        torch.save({name: tensor}, tmp_path / "x.pt")
        with open_weights(tmp_path / "x.pt") as weights:
            assert weights[name].dtype.kind == "V"
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0")
    with open_weights(tmp_path / "x.safetensors") as weights:
        assert weights["a"].dtype.kind == "V"


def test_all_tensors_that_are_not_finite_are_named_once_read(tmp_path):
    tensors = {n: np.zeros((3, 2), np.float32) for n in "abcd"}
    tensors["b"][1, 1], tensors["d"][0, 0] = np.nan, -np.inf
    save_file(tensors, tmp_path / "x.safetensors")
    with open_weights(tmp_path / "x.safetensors") as weights:
        weights.require_finite()
        for name in "aabbcc":
            np.asarray(weights[name])
        assert weights.non_finite == ["b"]
        np.asarray(weights["d"], np.float32)
        with pytest.raises(ValueError, match=r"x\.safetensors: 2 tensors are not all finite numbers: b, d"):
            weights.require_finite()


def test_opening_reads_no_tensor_into_memory(tmp_path):
    torch = pytest.importorskip("torch")
    big = 64 * 2**20
    save_file({"big": np.ones(big // 4, np.float32)}, tmp_path / "x.safetensors")
    torch.save({"big": torch.ones(big // 4)}, tmp_path / "x.pt")
    for suffix in (".safetensors", ".pt"):
        before = _anonymous_bytes()
        with open_weights(tmp_path / f"x{suffix}") as weights:
            assert weights["big"].nbytes == big
            assert _anonymous_bytes() - before < big / 4


def _anonymous_bytes():
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("this system does not tell how much anonymous memory is in use")
    return int(re.search(r"RssAnon:\s+(\d+)", status.read_text())[1]) * 1024


def _bad(folder):
    """(path, words of the error)"""
    yield "gs://bucket/x.safetensors", "copy it to this machine"
    yield folder / "nowhere.safetensors", "no weights file"
    (folder / "empty").mkdir()
    yield folder / "empty", "no .safetensors file"
    two = folder / "two"
    two.mkdir()
    save_file({}, two / "a.safetensors"), save_file({}, two / "b.safetensors")
    yield two, "a.safetensors, b.safetensors"
    (folder / "x.bin").write_bytes(b"x")
    yield folder / "x.bin", "expected"
    (folder / "empty.pt").write_bytes(b"")
    yield folder / "empty.pt", "cannot be read as weights"
    one = {"a": np.zeros(1, np.float32)}
    for i, (weight_map, words) in enumerate([
        ({"a": "one.safetensors", "b": "one.safetensors"}, "one.safetensors lacks b"),
        ({"a": "one.safetensors", "c": "two.safetensors"}, "two.safetensors lacks c"),
        ({"a": "one.safetensors"}, None),
        ({"a": "gone.safetensors"}, "'gone.safetensors', which is not"),
        ({"a": "../0/one.safetensors"}, "must be .safetensors files in the folder"),
        ({"a": str(folder / "0" / "one.safetensors")}, "must be .safetensors files in the folder"),
        ({"a": "sub\\one.safetensors"}, "must be .safetensors files in the folder"),
        ({"a": "one.pt"}, "must be .safetensors files in the folder"),
        ({"a": ".."}, "must be .safetensors files in the folder"),
        ({"a": 3}, "weight_map"),
        ({}, "weight_map"),
        ([], "weight_map"),
    ]):  # fmt: skip
        shards = folder / str(i)
        save_shards(shards, one=one, two={"b": np.zeros(1, np.float32)})
        index = write_index(shards, weight_map)
        if words:
            yield index, words
    twice = folder / "twice"
    save_shards(twice, one=one)
    save_shards(twice, two=one)
    write_index(twice, {"a": "one.safetensors", "b": "two.safetensors"})
    yield twice, "in another shard as well"
    more = folder / "more"
    save_shards(more, one=one | {"hidden": np.zeros(1, np.float32)})
    write_index(more, {"a": "one.safetensors"})
    yield more, "holds hidden, which the index does not say"
    index = folder / "repeats.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    yield index, "repeats a"
    index = folder / "deep.safetensors.index.json"
    index.write_text("[" * 100_000)
    yield index, "cannot be read"


def test_what_is_wrong_is_named(tmp_path):
    cases = list(_bad(tmp_path))
    assert len(cases) == 21
    for path, words in cases:
        with pytest.raises((ValueError, OSError)) as error:
            open_weights(path)
        assert words in str(error.value) and str(path) in str(error.value), (path, error.value)


def test_pytorch_files_without_pytorch_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    (tmp_path / "x.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"pip install 'eupe_jax\[export\]'"):
        open_weights(tmp_path / "x.pt")


def test_folders_of_other_things_are_no_weights(tmp_path):
    (tmp_path / "manifest").mkdir()
    assert not is_weights(tmp_path) and not is_weights("gs://bucket/run") and not is_weights(tmp_path / "x.bin")
    assert is_weights("gs://bucket/x.safetensors") and is_weights("x.pth")


def test_digest_depends_on_names_shapes_and_values_alone(tmp_path):
    tensors = {"b": np.ones((2, 3), np.float16), "a": np.zeros(2, np.float32)}
    save_file(tensors, tmp_path / "x.safetensors")
    with open_weights(tmp_path / "x.safetensors") as weights:
        same = weight_files.digest(weights)
    assert same == weight_files.digest({"a": np.zeros(2), "b": np.ones((2, 3)).T.copy().T})
    for other in ({"b": np.ones((3, 2))}, {"b": np.zeros((2, 3))}, {"c": np.ones((2, 3))}):
        assert weight_files.digest({"a": np.zeros(2)} | other) != same
