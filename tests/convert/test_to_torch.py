"""Checkpoint to weights file: what is written, and that nothing is written when anything is wrong."""

import dataclasses
import errno
import json
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

torch = pytest.importorskip("torch")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

from convert import gates, to_torch, transformers_layout, weights  # noqa: E402
from eupe_jax.models import interchange, rope  # noqa: E402
from eupe_jax.training.checkpoints import Checkpoints  # noqa: E402


@pytest.fixture
def checkpoint(vit, tmp_path):
    """A training checkpoint with two students."""
    workdir = tmp_path / "run"
    student = {
        "params": {"backbone": vit.variables["params"], "adapters": {"a": np.zeros(1)}},
        "buffers": vit.variables["buffers"],
        "optimizer": {"a": np.zeros(1)},
    }
    manager = Checkpoints(workdir, ConfigDict({"save_every": 1, "keep": 1, "keep_every": 0}))
    entry = vit.manifest | {"adapters": {}}
    state = {"step": np.int32(1), "students": {"first": student, "second": student}}
    manifest = {"students": {"first": entry, "second": entry}}
    manager.save(step=1, state=state, statistics={"t": np.zeros(1)}, chain={}, manifest=manifest, force=True)
    manager.wait()
    manager.close()
    return workdir


def _same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_and_metadata_survive_the_round_trip(encoder, tmp_path, photographs, suffix):
    out = tmp_path / f"student{suffix}"
    metadata = to_torch.convert(encoder, out, photographs)
    loaded = weights.load(out)
    _same(loaded.variables, encoder.variables)
    assert (loaded.name, loaded.overrides, loaded.resolution) == (encoder.name, encoder.overrides, encoder.resolution)
    assert (loaded.mean, loaded.std) == (encoder.mean, encoder.std)
    assert metadata["gates"]["flax_vs_torch"]["patches"]["max_abs"] <= 1e-4
    assert loaded.manifest["weights_sha256"] == weights.digest(weights.to_state_dict(encoder))
    expected = {out.name, out.name + ".md"} | ({out.name + ".json"} if suffix == ".pt" else set())
    assert {p.name for p in tmp_path.iterdir()} == expected
    if suffix == ".pt":  # a bare state_dict: loads into other code without this package
        type(weights.to_module(encoder)).from_state_dict(torch.load(out, weights_only=True))


def test_command_line_takes_a_training_checkpoint(checkpoint, vit, tmp_path, photographs, capsys):
    out = tmp_path / "deep" / "student.safetensors"
    arguments = ["--checkpoint", str(checkpoint), "--out", str(out), "--images", str(photographs)]
    assert to_torch.main(arguments) == 1  # two students, none named
    assert "first" in capsys.readouterr().err and not out.exists()
    assert to_torch.main([*arguments, "--student", "second"]) == 0
    assert "max abs" in capsys.readouterr().out
    _same(weights.load(out).variables, vit.variables)


def computed_periods(encoder):
    """The encoder with the RoPE periods that its base gives, if it has any."""
    if "buffers" not in encoder.variables:
        return encoder
    module = encoder.module
    periods = rope.rope_periods(module.embed_dim // module.num_heads, module.rope_base)
    return dataclasses.replace(encoder, variables=encoder.variables | {"buffers": {"rope_periods": periods}})


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_official_files_have_the_names_and_shapes_of_the_authors(encoder, tmp_path, photographs, suffix):
    out = tmp_path / f"student{suffix}"
    to_torch.convert(encoder, out, photographs)
    tensors = safetensors_numpy.load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True)
    expected = interchange.state_dict_shapes(encoder.name, **encoder.overrides)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    if encoder.name == "eupe_vitt16":
        mask = np.asarray(tensors["blocks.1.attn.qkv.bias_mask"]).reshape(3, -1)
        assert mask.tolist() == [[1.0] * 64, [0.0] * 64, [1.0] * 64]
        periods = encoder.variables["buffers"]["rope_periods"]
        np.testing.assert_array_equal(tensors["rope_embed.periods"], periods)
    else:
        np.testing.assert_array_equal(tensors["norms.3.weight"], tensors["norm.weight"])


def test_transformers_opens_the_folder_and_agrees(encoder, tmp_path, photographs, capsys):
    transformers = pytest.importorskip("transformers")
    source, out = tmp_path / "student.safetensors", tmp_path / "folder"
    encoder = computed_periods(encoder)
    to_torch.convert(encoder, source, photographs)
    out.mkdir()  # an empty folder is no obstacle
    arguments = ["--checkpoint", str(source), "--out", str(out), "--images", str(photographs)]
    assert to_torch.main([*arguments, "--layout", "transformers"]) == 0
    assert "Flax vs transformers, patches: max abs" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "folder", "student.safetensors", "student.safetensors.md"
    ]  # fmt: skip
    files = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(p.name for p in out.iterdir()) == files
    assert "| Flax and transformers | patches" in (out / "README.md").read_text()

    model = transformers.AutoModel.from_pretrained(out)
    assert type(model).__name__ == {"eupe_vitt16": "DINOv3ViTModel"}.get(encoder.name, "DINOv3ConvNextModel")
    images = gates.normalise(encoder, gates.load_images(photographs, 64, 96))
    with torch.inference_mode():
        cls = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).pooler_output.numpy()
    np.testing.assert_allclose(cls, gates.flax_features(encoder, images)["cls"], atol=1e-4)
    if encoder.name == "eupe_vitt16":
        assert (model.config.num_hidden_layers, model.config.rope_theta, model.config.key_bias) == (2, 100.0, False)
    else:
        assert (model.config.depths, model.config.hidden_sizes) == ([1, 1, 2, 1], [16, 32, 48, 64])
    preprocessing = json.loads((out / "preprocessor_config.json").read_text())
    assert preprocessing["size"] == {"height": 64, "width": 64} and preprocessing["image_mean"] == list(encoder.mean)

    # Its own files, written again by transformers, and ours come back the same, but for the bias that nobody reads.
    loaded = weights.load(out / "model.safetensors")
    model.save_pretrained(tmp_path / "again")
    again = interchange.from_state_dict(
        encoder.name, safetensors_numpy.load_file(tmp_path / "again" / "model.safetensors"), **encoder.overrides
    )
    _same(loaded.variables, again)
    if encoder.name == "eupe_vitt16":
        bias, kept = encoder.variables["params"]["blocks"]["attn"]["qkv"]["bias"].reshape(2, 3, -1), [0, 2]
        read = again["params"]["blocks"]["attn"]["qkv"]["bias"].reshape(2, 3, -1)
        assert not read[:, 1].any() and bias[:, 1].any() and np.array_equal(read[:, kept], bias[:, kept])
    else:
        _same(again, encoder.variables)


def test_without_transformers_the_folder_is_written_and_the_missing_check_is_told(
    convnext, tmp_path, photographs, capsys, monkeypatch
):
    to_torch.convert(convnext, tmp_path / "student.pt", photographs)
    monkeypatch.setattr(transformers_layout, "available", lambda: False)
    arguments = [
        "--checkpoint",
        str(tmp_path / "student.pt"),
        "--out",
        str(tmp_path / "out"),
        "--layout",
        "transformers",
    ]
    assert to_torch.main([*arguments, "--images", str(photographs)]) == 0
    assert "transformers is not installed here" in capsys.readouterr().out
    _same(weights.load(tmp_path / "out" / "model.safetensors").variables, convnext.variables)


def test_what_transformers_cannot_hold_is_refused(vit, tmp_path, photographs):
    def refused(encoder, words):
        with pytest.raises(ValueError, match=words):
            to_torch.convert(encoder, tmp_path / "out", photographs, "transformers")
        assert not list(tmp_path.iterdir())

    def changed(**overrides):
        module = dataclasses.replace(computed_periods(vit).module, **overrides)
        return dataclasses.replace(computed_periods(vit), module=module, overrides=vit.overrides | overrides)

    refused(vit, r"rope_periods is computed .* change by up to 1\.00%.*; --layout official keeps all")
    rounded = rope.rope_periods(32).view(np.uint32) + 0x8000 & 0xFFFF0000
    variables = vit.variables | {"buffers": {"rope_periods": rounded.view(np.float32)}}
    refused(dataclasses.replace(vit, variables=variables), r"would change by up to 0\.[1-3]")
    refused(changed(rope_normalize_coords="max"), "rope_normalize_coords='max'")
    refused(changed(rope_base=None, rope_min_period=1.0, rope_max_period=50.0), "rope_min_period")
    tokens = {"params": {"cls_norm": vit.variables["params"]["norm"]} | vit.variables["params"]}
    untied = changed(untie_cls_and_patch_norms=True)
    refused(dataclasses.replace(untied, variables=untied.variables | tokens), "no place for params/cls_norm/")


def test_a_config_of_another_model_is_noticed(encoder, tmp_path):
    config = transformers_layout.config(encoder)
    path, module = tmp_path / "config.json", encoder.module
    transformers_layout.check_config(tmp_path, module)  # none there: nothing to say
    path.write_text(json.dumps(config | {"layerscale_value": 7.0, "layer_scale_init_value": 7.0, "image_size": 8}))
    for weights_path in (tmp_path, tmp_path / "model.safetensors"):
        transformers_layout.check_config(weights_path, module)
    key = "rope_theta" if "rope_theta" in config else "layer_norm_eps"
    path.write_text(json.dumps(config | {key: 0.5}))
    with pytest.raises(ValueError, match=rf"config.json: {key} is 0.5, not {config[key]}"):
        transformers_layout.check_config(tmp_path, module)
    path.write_text(json.dumps(config | {"model_type": "siglip"}))
    with pytest.raises(ValueError, match="model_type is 'siglip'"):
        transformers_layout.check_config(tmp_path, module)
    path.write_text("[")
    with pytest.raises(ValueError, match="is no JSON object"):
        transformers_layout.check_config(tmp_path, module)


def test_folders_in_use_and_gates_that_fail_leave_no_trace(convnext, tmp_path, photographs, monkeypatch):
    pytest.importorskip("transformers")
    used = tmp_path / "used"
    used.mkdir()
    (used / "config.json").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="something in it"):
        to_torch.convert(convnext, used, photographs, "transformers")
    with pytest.raises(NotADirectoryError, match="is a file"):
        to_torch.convert(convnext, tmp_path / "file", photographs, "transformers")
    right = transformers_layout.config(convnext)
    monkeypatch.setattr(transformers_layout, "config", lambda encoder: right | {"layer_norm_eps": 0.1})
    with pytest.raises(gates.GateError, match="Flax and transformers disagree"):
        to_torch.convert(convnext, tmp_path / "out", photographs, "transformers")
    monkeypatch.setattr(transformers_layout, "config", lambda encoder: right | {"depths": [1, 1, 1, 1]})
    with pytest.raises(ValueError, match="does not load what was written"):
        to_torch.convert(convnext, tmp_path / "out", photographs, "transformers")
    assert sorted(tmp_path.rglob("*")) == before and (used / "config.json").read_text() == "mine"


def test_help_shows_an_example():
    script = Path(to_torch.__file__)
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
    assert "python convert/to_torch.py --checkpoint" in done.stdout


def test_the_gate_refuses_other_weights_and_nothing_is_written(encoder, tmp_path, photographs, monkeypatch):
    module = weights.to_module(encoder)
    images = gates.load_images(photographs, 64, 64)
    to_torch.gate(encoder, module, images)
    with torch.no_grad():
        module.norm.weight[0] *= 1.001
    with pytest.raises(gates.GateError, match="nothing written"):
        to_torch.gate(encoder, module, images)
    monkeypatch.setattr(weights, "to_module", lambda encoder: module)
    with pytest.raises(gates.GateError):
        to_torch.convert(encoder, tmp_path / "student.safetensors", photographs)
    assert not list(tmp_path.iterdir())


def test_a_nan_never_passes():
    x = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    y = x.copy()
    y[0, 0] = np.nan
    with pytest.raises(gates.GateError):
        gates.require(gates.compare({"cls": x}, {"cls": y}), 1e9, "a and b")
    constant = np.ones((2, 3), np.float32)  # collapsed features cannot be compared
    with pytest.raises(gates.GateError):
        gates.require(gates.compare({"cls": constant}, {"cls": constant}), 1e9, "a and b")
    with pytest.raises(gates.GateError, match="patches"):
        gates.compare({"patches": x}, {"cls": x})


class _Code:
    def __reduce__(self):
        return (open, ("executed", "w"))


def _safetensors(path, tensors, header=None):
    metadata = {} if header is None else {"eupe_jax": header if isinstance(header, str) else json.dumps(header)}
    path.write_bytes(safetensors_numpy.save(tensors, metadata=metadata))
    return path


def _bad_files(encoder, folder):
    """(file, --model, words the error must have)"""
    good = weights.to_state_dict(encoder)
    header = weights.describe(encoder)
    name = encoder.name
    yield folder / "missing.pt", None, "no weights file"
    code = folder / "code.pt"
    code.write_bytes(pickle.dumps({"a": _Code()}))
    yield code, name, "cannot be read as weights"
    torch.save({"a": _Code()}, folder / "zipped_code.pt")
    yield folder / "zipped_code.pt", name, "cannot be read as weights"
    torch.save({"parts": {"a": torch.zeros(1)}}, folder / "nested.pt")
    yield folder / "nested.pt", name, "flat dict"
    torch.save({"a": torch.zeros(1)}, folder / "bare.pt")
    yield folder / "bare.pt", None, "--model"
    yield folder / "bare.pt", "eupe_vitt17", "did you mean"
    yield folder / "bare.pt", name, "missing"
    (folder / "weights.bin").write_bytes(b"0")
    yield folder / "weights.bin", name, "expected a checkpoint folder"
    (folder / "cut.safetensors").write_bytes(safetensors_numpy.save(good)[:1000])
    yield folder / "cut.safetensors", name, "cannot be read as weights"
    yield _safetensors(folder / "text.safetensors", good, "{"), None, "metadata"
    yield _safetensors(folder / "partial.safetensors", good, {"format": weights.FORMAT}), None, "model"
    yield _safetensors(folder / "side.safetensors", good, header | {"resolution": "big"}), None, "resolution"
    yield _safetensors(folder / "std.safetensors", good, header | {"std": [1, 0, 1]}), None, "std"
    yield _safetensors(folder / "depth.safetensors", good, header | {"overrides": {"deep": 1}}), None, "deep"
    yield _safetensors(folder / "other.safetensors", good, header), "eupe_vitb16", "not 'eupe_vitb16'"
    key = next(k for k in good if k.endswith("weight"))
    changed = good | {key: good[key] + np.float32(1e-3)}
    yield _safetensors(folder / "changed.safetensors", changed, header), None, "was changed"
    shape = good | {key: np.zeros((2, 2), np.float32)}
    sealed = header | {"weights_sha256": weights.digest(shape)}
    yield _safetensors(folder / "shape.safetensors", shape, sealed), None, key
    holes = good | {key: np.full_like(good[key], np.nan)}
    yield _safetensors(folder / "nan.safetensors", holes, header), None, "finite"


def test_bad_weights_give_one_line_and_write_nothing(vit, tmp_path, photographs, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inputs, out = tmp_path / "in", tmp_path / "out"
    inputs.mkdir(), out.mkdir()
    for path, model, words in _bad_files(vit, inputs):
        arguments = ["--checkpoint", str(path), "--out", str(out / "x.pt"), "--images", str(photographs)]
        assert to_torch.main(arguments + (["--model", model] if model else [])) == 1, path
        printed = capsys.readouterr()
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
        assert words in printed.err and not printed.out, (path, printed.err)
        assert not list(out.iterdir())
    assert not (tmp_path / "executed").exists()


def test_bad_outputs_and_images_give_one_line(vit, tmp_path, photographs, capsys):
    source = tmp_path / "student.safetensors"
    to_torch.convert(vit, source, photographs)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_text("no image")
    before = sorted(tmp_path.rglob("*"))
    for out, images, words in [
        (tmp_path / "file" / "x.pt", photographs, "file"),
        (tmp_path / "folder.pt", photographs, "folder"),
        (tmp_path / "x.onnx", photographs, ".safetensors or .pt"),
        (tmp_path / "x.pt", tmp_path / "nowhere", "no such folder"),
        (tmp_path / "x.pt", tmp_path / "empty", "no .jpg"),
        (tmp_path / "x.pt", tmp_path / "broken", "a.png"),
    ]:
        assert to_torch.main(["--checkpoint", str(source), "--out", str(out), "--images", str(images)]) == 1
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
        assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_write_leaves_the_old_file(tmp_path):
    old = tmp_path / "x.pt"
    old.write_bytes(b"old")
    with pytest.raises(OSError):
        weights.write_files({old: b"new", tmp_path / "no" / "such" / "folder": b""})
    assert old.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_a_disk_that_turns_out_full_leaves_all_old_files(tmp_path, monkeypatch):
    """What a write took without a word may fail to reach the disk."""
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"old"), second.write_bytes(b"old")

    def full(path):
        if path.name.startswith(".b."):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights, "flush", full)
    with pytest.raises(OSError, match="No space left"):
        weights.write_files({first: b"new", second: b"new"})
    assert first.read_bytes() == second.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2


def test_the_packaged_photographs_serve_by_default():
    pytest.importorskip("skimage")
    images = gates.load_images(None, 48, 64)
    assert images.shape == (4, 48, 64, 3) and images.dtype == np.uint8 and images.std() > 20


def test_periods_that_transformers_cannot_hold_are_let_go_only_on_request(vit, tmp_path, photographs):
    with pytest.raises(ValueError, match="--recompute_periods"):
        to_torch.convert(vit, tmp_path / "hf", photographs, layout="transformers")
    assert not (tmp_path / "hf").exists()
    metadata = to_torch.convert(vit, tmp_path / "hf", photographs, layout="transformers", recompute_periods=True)
    assert 0 < metadata["recomputed_periods"]["patches"]["max_abs"] < 1
    loaded = weights.load(tmp_path / "hf")
    np.testing.assert_allclose(loaded.variables["buffers"]["rope_periods"], rope.rope_periods(32), rtol=1e-6)
