"""Encoders as ExecuTorch programs, run by the ExecuTorch runtime."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("executorch", reason="the phone export needs `pip install eupe_jax[export]`")

from convert import gates, to_executorch, to_torch, weights  # noqa: E402
from tests.convert.conftest import VIT, make_encoder  # noqa: E402

SIZES = {"eupe_vitt16": (64, 96), "eupe_convnext_tiny": (64, 64)}


@pytest.fixture(scope="module")
def exports(vit, convnext):
    return {e.name: to_executorch.export(e, SIZES[e.name]) for e in (vit, convnext)}


def test_the_program_computes_the_encoders_features(encoder, exports, photographs):
    images = gates.load_images(photographs, *SIZES[encoder.name])
    figures = to_executorch.gate(encoder, exports[encoder.name].pte, images)
    assert set(figures) == {"flax_vs_torch", "torch_vs_pte"}
    for report in figures["torch_vs_pte"].values():
        assert report["max_abs"] <= 1e-3 and report["cosine"] > 0.9999


def test_the_delegate_takes_everything(encoder, exports):
    report = exports[encoder.name].report["methods"]["forward"]["delegation"]
    assert report["partitions"] == 1 and report["outside"] == {}
    assert report["share_of_nodes"] == report["share_of_flops"] == 1
    assert report["nodes_inside"] > 50


def test_flops_are_counted(exports):
    h, w = SIZES["eupe_vitt16"]
    patches, dim = h * w // 256, VIT["embed_dim"]
    tokens = patches + 5
    block = 2 * tokens * 12 * dim**2 + 4 * tokens**2 * dim
    expected = 2 * patches * 768 * dim + VIT["depth"] * block
    assert exports["eupe_vitt16"].report["methods"]["forward"]["delegation"]["flops"] == expected


def test_what_the_program_was_not_made_from_does_not_pass_the_gate(encoder, exports, photographs):
    other = make_encoder(encoder.name, encoder.overrides, seed=1)
    images = gates.load_images(photographs, *SIZES[encoder.name])
    with pytest.raises(gates.GateError, match=r"PyTorch and the \.pte disagree"):
        to_executorch.gate(other, exports[encoder.name].pte, images)


def test_command_line_writes_program_and_card(vit, tmp_path, photographs, capsys):
    source, out = tmp_path / "student.safetensors", tmp_path / "phone" / "student.pte"
    to_torch.convert(vit, source, photographs)
    arguments = ["--checkpoint", str(source), "--out", str(out), "--images", str(photographs), "--runs", "3"]
    assert to_executorch.main([*arguments, "--resolution", "32"]) == 0
    printed = capsys.readouterr().out
    assert "1 partitions" in printed and "median of 3 runs, 1 threads" in printed
    card = json.loads(out.with_suffix(".json").read_text())
    assert card["resolution"] == [32, 32] and card["model"] == "eupe_vitt16" and card["mean"] == list(vit.mean)
    assert card["weights_sha256"] == weights.digest(weights.to_state_dict(vit))
    outputs = card["methods"]["forward"]["outputs"]
    assert [o["name"] for o in outputs] == ["cls", "storage", "patches"]
    features = to_executorch.run_pte(out.read_bytes(), np.zeros((2, 32, 32, 3), np.float32))
    assert {n: list(f.shape[1:]) for n, f in features.items()} == {o["name"]: o["shape"][1:] for o in outputs}
    assert sorted(p.name for p in out.parent.iterdir()) == ["student.json", "student.pte"]


def test_portable_programs_run_too(vit, photographs):
    result = to_executorch.export(vit, 32, "portable")
    report = result.report["methods"]["forward"]["delegation"]
    assert report["partitions"] == 0 and report["share_of_flops"] == 0 and report["outside"]
    to_executorch.gate(vit, result.pte, gates.load_images(photographs, 32, 32))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resolution", "40"], "multiple of the patch size"),
        (["--threads", "0"], "at least 1"),
        (["--out", "x.bin"], ".pte"),
        (["--checkpoint", "nowhere.pt"], "nowhere.pt"),
    ],
)
def test_bad_arguments_give_one_line(vit, tmp_path, photographs, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    to_torch.convert(vit, "student.safetensors", photographs)
    base = ["--checkpoint", "student.safetensors", "--out", "x.pte", "--images", str(photographs), "--resolution", "32"]
    assert to_executorch.main(base + arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and words in error
    assert [p.name for p in tmp_path.iterdir()] == ["student.safetensors"]


def test_a_failing_gate_writes_nothing(vit, exports, tmp_path, photographs, monkeypatch):
    other = make_encoder(vit.name, vit.overrides, seed=1)
    monkeypatch.setattr(to_executorch, "export", lambda *_: exports[vit.name])
    with pytest.raises(gates.GateError, match="nothing written"):
        to_executorch.convert(other, tmp_path / "x.pte", SIZES[vit.name], images=photographs)
    assert not list(tmp_path.iterdir())
