"""Encoders as ExecuTorch programs, run by the ExecuTorch runtime."""

import contextlib
import functools
import io
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("executorch", reason="the phone export needs `pip install eupe_jax[export]`")

from PIL import Image  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

from convert import contract, delegation, gates, quantize, teachers_to_orbax, to_executorch, to_torch, weights  # noqa: E402
from eupe_jax.evals.encoders import FlaxEncoder, PteEncoder  # noqa: E402
from eupe_jax.evals.pte import PteProgram  # noqa: E402
from tests.convert.conftest import CONVNEXT, VIT, make_encoder  # noqa: E402

VIT = VIT | {"depth": 1}  # lowering costs seconds a block
CONVNEXT = CONVNEXT | {"depths": (1, 1, 1, 1)}
SIZES = {"eupe_vitt16": [(64, 96), 32], "eupe_convnext_tiny": [(64, 64)]}


@pytest.fixture(scope="module")
def vit():
    return make_encoder("eupe_vitt16", VIT)


@pytest.fixture(scope="module")
def convnext():
    return make_encoder("eupe_convnext_tiny", CONVNEXT)


@pytest.fixture(scope="module")
def student(vit, photographs, tmp_path_factory) -> Path:
    """The ViT's weights."""
    path = tmp_path_factory.mktemp("weights") / "student.safetensors"
    to_torch.convert(vit, path, photographs)
    return path


@pytest.fixture(scope="module")
def written(student, photographs, tmp_path_factory):
    """The folder that the command line made for the ViT, and what it printed."""
    out, printed = tmp_path_factory.mktemp("phone") / "made" / "x.pte", io.StringIO()
    command = arguments(student, photographs, "--out", str(out), "--resolution", "64x96,32")
    with contextlib.redirect_stdout(printed):
        assert to_executorch.main(command) == 0
    return out.parent, printed.getvalue()


@pytest.fixture(scope="module")
def exports(convnext, written):
    pte, report = (written[0] / name for name in ("x.pte", "x.json"))
    return {
        "eupe_vitt16": to_executorch.ExportResult(pte.read_bytes(), json.loads(report.read_text())),
        "eupe_convnext_tiny": to_executorch.export(convnext, SIZES["eupe_convnext_tiny"]),
    }


@pytest.fixture(scope="module")
def quantised(vit):
    return to_executorch.export(vit, 32, precision="int8", outputs=["patches", "cls"], uint8_input=True)


@pytest.fixture
def source(student, tmp_path, monkeypatch) -> Path:
    """A working folder with the ViT's weights in it."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copy(student, "student.safetensors"))


def arguments(source: Path, photographs: Path, *more: str) -> list[str]:
    return ["--checkpoint", str(source), "--out", "x.pte", "--images", str(photographs), "--runs", "2", *more]


def test_every_method_computes_the_encoders_features(encoder, exports, photographs):
    result = exports[encoder.name]
    assert len(result.report["methods"]) == len(SIZES[encoder.name])
    for method in result.report["methods"].values():
        images = gates.load_images(photographs, *method["input"]["shape"][2:])
        figures = to_executorch.gate(encoder, result.pte, images)
        assert set(figures) == {"flax_vs_torch", "torch_vs_pte"}
        for report in figures["torch_vs_pte"].values():
            assert report["max_abs"] <= 1e-3 and report["cosine"] > 0.9999


def test_the_delegate_takes_everything(encoder, exports):
    for name, method in exports[encoder.name].report["methods"].items():
        report = method["delegation"]
        assert report["partitions"] == 1 and report["outside"] == {}
        assert report["share_of_nodes"] == report["share_of_flops"] == 1
        assert report["nodes_inside"] > 50
        delegation.require(report, name)


def test_flops_are_counted(exports):
    (h, w), _ = SIZES["eupe_vitt16"]
    patches, dim = h * w // 256, VIT["embed_dim"]
    tokens = patches + 5
    block = 2 * tokens * 12 * dim**2 + 4 * tokens**2 * dim
    expected = 2 * patches * 768 * dim + VIT["depth"] * block
    norms = 2 * (2 * VIT["depth"] + 1) * tokens * dim  # at most: their means may be matrix products
    counted = exports["eupe_vitt16"].report["methods"]["encode_64x96"]["delegation"]["flops"]
    assert expected <= counted <= expected + norms < 1.02 * expected


def test_sizes_share_their_weights(vit, exports):
    parameters = sum(leaf.size for leaf in weights.to_state_dict(vit).values())
    single = len(exports["eupe_vitt16"].pte) - 4 * parameters
    assert 0 < single < 4 * parameters / 2
    methods = exports["eupe_vitt16"].report["methods"]
    assert [
        m["planned_bytes"] > 4 * 3 * h * w for m, (h, w) in zip(methods.values(), [(64, 96), (32, 32)], strict=True)
    ] == [True] * 2
    assert methods["encode_32"]["planned_bytes"] < methods["encode_64x96"]["planned_bytes"] / 4


def test_what_the_program_was_not_made_from_does_not_pass_the_gate(encoder, exports, photographs):
    other = make_encoder(encoder.name, encoder.overrides, seed=1)
    images = gates.load_images(photographs, 64, 96 if encoder.name == "eupe_vitt16" else 64)
    with pytest.raises(gates.GateError, match=r"PyTorch and the \.pte disagree"):
        to_executorch.gate(other, exports[encoder.name].pte, images)


def test_a_program_says_how_to_feed_it(encoder, exports):
    result = exports[encoder.name]
    program = PteProgram(result.pte)
    assert list(program.sizes) == list(result.report["methods"])
    assert program.outputs == (["cls", "storage", "patches"] if encoder.name == "eupe_vitt16" else ["cls", "patches"])
    for name in contract.INSIDE:
        assert program.contract[name] == result.report[name], name
    methods = result.report["methods"]
    assert program.contract["methods"] == list(methods)
    assert program.contract["resolution"] == sum([m["input"]["shape"][2:] for m in methods.values()], [])
    with pytest.raises(ValueError, match="takes images of .* pixels only, got 48x64"):
        program(np.zeros((1, 48, 64, 3), np.uint8))


def test_int8_is_close_to_float_and_delegated(vit, quantised, photographs):
    method = quantised.report["methods"]["encode_32"]
    assert [o["name"] for o in method["outputs"]] == ["cls", "patches"]
    assert method["delegation"]["share_of_flops"] == 1
    images = gates.load_images(photographs, 32, 32)
    figures = to_executorch.gate(vit, quantised.pte, images, allow_inaccurate=True)
    assert 0.98 < figures["torch_vs_pte"]["cls"]["mean_cosine"] < 1 - 1e-6
    assert set(figures["int8"]) == {"cosine"}  # two images have no neighbours to speak of
    other = make_encoder(vit.name, vit.overrides, seed=1)
    with pytest.raises(gates.GateError, match="int8 .pte disagree.*--allow_inaccurate"):
        to_executorch.gate(other, quantised.pte, images)


def test_layers_that_hurt_stay_float(vit, photographs):
    images = {f"encode_{side}": gates.load_images(photographs, side, side) for side in (32, 64)}
    chosen = to_executorch.choose_float_layers(vit, images)
    assert all(chosen["cosine"][name] >= least for name, least in quantize.TARGETS.items())
    backwards = to_executorch.choose_float_layers(vit, dict(reversed(images.items())))
    assert backwards == chosen and chosen["chosen_at"] in images


def test_layers_are_chosen_at_the_size_that_int8_harms_most(vit, photographs, monkeypatch):
    images = {f"encode_{side}": gates.load_images(photographs, side, side) for side in (32, 64, 48)}
    monkeypatch.setattr(quantize, "harm_of_int8", lambda _, pixels: {32: 0.1, 64: 0.3, 48: 0.2}[pixels.shape[-1]])
    assert to_executorch.choose_float_layers(vit, images)["chosen_at"] == "encode_64"


def test_int8_with_no_int8_layer_is_refused(vit, tmp_path, photographs, monkeypatch):
    choose = functools.partial(quantize.choose_float_layers, targets={"patches": 1 - 1e-12}, progress=False)
    monkeypatch.setattr(quantize, "choose_float_layers", choose)
    with pytest.raises(gates.GateError, match="every layer would have to stay float at encode_32"):
        to_executorch.convert(vit, tmp_path / "x.pte", 32, images=photographs, precision="int8")
    assert not list(tmp_path.iterdir())


def test_int8_is_not_judged_without_class_token_and_patches():
    storage = {"storage": {"mean_cosine": 1.0}}
    with pytest.raises(gates.GateError, match="cannot be compared without cls or patches"):
        gates.require_cosine(storage, "PyTorch and the .pte")
    with pytest.raises(gates.GateError, match="cls nan"):
        gates.require_cosine(storage | {"cls": {"mean_cosine": float("nan")}}, "PyTorch and the .pte")
    gates.require_cosine(storage | {"patches": {"mean_cosine": 0.996}}, "PyTorch and the .pte")


@pytest.mark.slow
def test_portable_programs_run_too(vit, photographs):
    result = to_executorch.export(vit, 32, "portable")
    report = result.report["methods"]["encode_32"]["delegation"]
    assert report["partitions"] == 0 and report["share_of_flops"] == 0
    dearest = next(iter(report["outside"].values()))
    assert dearest["flops"] > 0 and dearest["bytes"] > 0
    assert sum(cost["flops"] for cost in report["outside"].values()) == report["flops"]
    with pytest.raises(delegation.DelegationError, match=r"only 0.0% of the FLOPs.*--allow_undelegated"):
        delegation.require(report, "encode_32")
    to_executorch.gate(vit, result.pte, gates.load_images(photographs, 32, 32))


def test_command_line_writes_program_and_contract(vit, written):
    folder, printed = written
    assert printed.count("100.0% of") == 4 and printed.count("median of 2 runs, 1 threads") == 2
    assert printed.count("planned buffers") == 2
    assert sorted(p.name for p in folder.iterdir()) == ["x.json", "x.pte", "x.pte.md"]
    card = (folder / "x.pte.md").read_text()
    assert "library_name: executorch" in card and "| `encode_32` " in card and "method `encode_64x96`" in card
    report = json.loads((folder / "x.json").read_text())
    assert report["resolution"] == [64, 96] and report["model"] == "eupe_vitt16" and report["mean"] == list(vit.mean)
    assert report["weights_sha256"] == weights.digest(weights.to_state_dict(vit))
    assert report["pte_bytes"] == (folder / "x.pte").stat().st_size
    assert list(report["methods"]) == ["encode_64x96", "encode_32"]
    for method in report["methods"].values():
        assert set(method["gates"]) == {"flax_vs_torch", "torch_vs_pte"}


def test_one_size_goes_by_the_name_forward_too(quantised):
    program = PteProgram(quantised.pte)
    assert list(program.sizes) == ["encode_32"]
    image = program.prepare(np.full((32, 32, 3), 7, np.uint8))
    assert image.dtype == torch.uint8
    named = [t.clone() for t in program.execute("encode_32", image)]
    assert all(torch.equal(a, b) for a, b in zip(named, program.execute("forward", image), strict=True))


def test_evaluations_read_it(vit, written, photographs, tmp_path):
    encoder = PteEncoder(written[0] / "x.pte")
    flax = FlaxEncoder(vit)
    for size in ((64, 96), (32, 32)):
        images = gates.load_images(photographs, *size)
        got, expected = encoder(images), flax(images)
        for name in ("cls", "patches"):
            np.testing.assert_allclose(got[name], expected[name], atol=2e-3)
    assert encoder.patch_size == 16
    with pytest.raises(ValueError, match="takes images of 64x96, 32x32 pixels only"):
        encoder(np.zeros((1, 48, 48, 3), np.uint8))
    pte, report = (written[0] / "x.pte").read_bytes(), json.loads((written[0] / "x.json").read_text())
    (tmp_path / "x.pte").write_bytes(pte)
    (tmp_path / "x.json").write_text(json.dumps(report | {"weights_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="is of another program"):
        PteEncoder(tmp_path / "x.pte")
    (tmp_path / "x.pte").write_bytes(pte[:5000])
    with pytest.raises(ValueError, match="no program that the ExecuTorch runtime can load"):
        PteEncoder(tmp_path / "x.pte")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--resolution", "40"], "multiple of the patch size"),
        (["--resolution", "32,64,32"], "resolution 32 is given more than once"),
        (["--resolution", "32,axb"], "--resolution 32,axb: give sides in pixels"),
        (["--backend", "vulkan"], "backend 'vulkan' is none of xnnpack, portable"),
        (["--precision", "int4"], "precision 'int4' is none of fp32, int8"),
        (["--precision", "int8", "--backend", "portable"], "needs the backend 'xnnpack'"),
        (["--precision", "int8", "--outputs", "storage"], "'int8' is judged by cls and patches"),
        (["--outputs", "cls,tokens"], "outputs cls, tokens: name some of"),
        (["--threads", "0"], "at least 1"),
        (["--out", "x.bin"], ".pte"),
        (["--out", "student.safetensors/x.pte"], "student.safetensors"),
        (["--images", "nowhere"], "no such folder"),
        (["--onnx", "x.bin"], ".onnx"),
        (["--onnx", "x.onnx", "--resolution", "32,64"], "--onnx is of one --resolution"),
        (["--checkpoint", "nowhere.pt"], "nowhere.pt"),
        (["--model", "eupe_vitt17"], "holds 'eupe_vitt16', not 'eupe_vitt17'"),
    ],
)
def test_bad_arguments_give_one_line(source, photographs, capfd, more, words):
    base = arguments(source, photographs, "--resolution", "32")
    refused(base + more, words, capfd, {"student.safetensors"})


def refused(command: list[str], words: str, capfd, files: set[str]) -> None:
    capfd.readouterr()
    assert to_executorch.main(command) == 1
    error = capfd.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and words in error[0], error
    assert {p.name for p in Path().iterdir()} == files


def test_a_flag_that_does_not_exist_gives_one_line(source, photographs, capfd):
    with pytest.raises(SystemExit) as exit:
        to_executorch.main(arguments(source, photographs, "--resolutoin", "32"))
    assert exit.value.code == 2
    assert capfd.readouterr().err.splitlines() == ["error: unrecognized arguments: --resolutoin 32 (see --help)"]


@pytest.mark.parametrize("script", ["to_executorch.py", "to_torch.py"])
def test_without_the_libraries_there_is_one_line(script):
    code = f"""
import runpy, sys
sys.modules["torch"] = sys.modules["executorch"] = None
sys.argv = [{script!r}, "--help"]
runpy.run_path("convert/" + {script!r}, run_name="__main__")
"""
    root = Path(to_executorch.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == "error: needs torch, executorch: pip install 'eupe_jax[export]'\n"


@pytest.mark.parametrize("error", [RuntimeError("no kernel\nfor this"), MemoryError()])
def test_what_the_libraries_raise_gives_one_line(error, source, photographs, capfd, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(to_executorch, "export", fail)
    words = "no kernel for this" if str(error) else "MemoryError"
    refused(arguments(source, photographs, "--resolution", "32"), words, capfd, {"student.safetensors"})


def test_images_too_large_to_decode_give_one_line(photographs, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="0.png cannot be read as an image: .* exceeds limit"):
        gates.load_images(photographs, 32, 32)


def test_broken_checkpoints_give_one_line(vit, tmp_path, photographs, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = weights.to_state_dict(vit)
    save_file(tensors, "bare.safetensors")
    half = Path("bare.safetensors").read_bytes()[:-1000]
    Path("half.safetensors").write_bytes(half)
    torch.save({name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}, "half.pt")
    Path("half.pt").write_bytes(Path("half.pt").read_bytes()[:-5000])
    teachers_to_orbax.convert(vit.name, "bare.safetensors", "run", overrides=vit.overrides)
    data = max((p for p in Path("run").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    files = {"bare.safetensors", "half.safetensors", "half.pt", "run"}
    for checkpoint, model, words in [
        ("bare.safetensors", None, "name it with --model"),
        ("bare.safetensors", "eupe_vitt17", "eupe_vitt16"),
        ("bare.safetensors", "eupe_convnext_tiny", "bare.safetensors"),
        ("half.safetensors", "eupe_vitt16", "half.safetensors"),
        ("half.pt", "eupe_vitt16", "half.pt"),
        ("run", None, "is damaged: encoder.backbone"),
    ]:
        more = ["--model", model] if model else []
        refused(arguments(Path(checkpoint), photographs, *more), words, capfd, files)
    assert to_torch.main(["--checkpoint", "run", "--out", "y.safetensors"]) == 1
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert "is damaged: encoder.backbone" in line and not Path("y.safetensors").exists()


def test_a_full_disk_leaves_no_file(vit, exports, source, photographs, capfd, monkeypatch):
    result = exports[vit.name]
    assert len(result.pte) > 100_000
    monkeypatch.setattr(to_executorch, "export", lambda *_, **__: result)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        command = arguments(source, photographs, "--resolution", "64x96,32")
        refused(command, "--out x.pte could not be written: File too large", capfd, {"student.safetensors"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
def test_onnx_is_written_beside_it(encoder, exports, tmp_path, photographs, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript", reason="--onnx needs `pip install eupe_jax[onnx]`")
    size = {"eupe_vitt16": [(64, 96)], "eupe_convnext_tiny": [(64, 64)]}[encoder.name]
    result = exports[encoder.name]
    one = dict([*result.report["methods"].items()][:1])
    result = to_executorch.ExportResult(result.pte, result.report | {"methods": one})
    monkeypatch.setattr(to_executorch, "export", lambda *_, **__: result)
    report = to_executorch.convert(
        encoder, tmp_path / "x.pte", size, images=photographs, runs=1, onnx=tmp_path / "x.onnx"
    )
    (method,) = report["methods"].values()
    assert method["gates"]["torch_vs_onnx"]["patches"]["max_abs"] < 1e-3
    assert "torch vs onnx" in to_executorch.summarise(report)
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == report["outputs"]
    inside = json.loads(session.get_modelmeta().custom_metadata_map["eupe_jax"])
    assert inside["weights_sha256"] == report["weights_sha256"] and inside["resolution"] == [*size[0]]


def test_onnx_names_what_is_to_be_installed(source, photographs, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    more = ["--onnx", "x.onnx", "--resolution", "32"]
    refused(
        arguments(source, photographs, *more), "--onnx needs onnxscript: pip install 'eupe_jax[onnx]'", capfd,
        {"student.safetensors"},
    )  # fmt: skip


def test_a_failing_gate_writes_nothing(vit, exports, tmp_path, photographs, monkeypatch):
    other = make_encoder(vit.name, vit.overrides, seed=1)
    monkeypatch.setattr(to_executorch, "export", lambda *_, **__: exports[vit.name])
    with pytest.raises(gates.GateError, match="nothing written"):
        to_executorch.convert(other, tmp_path / "x.pte", SIZES[vit.name], images=photographs)
    assert not list(tmp_path.iterdir())
