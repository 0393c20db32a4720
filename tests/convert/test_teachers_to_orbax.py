"""Published weights as an Orbax checkpoint: every loader takes it, and failures leave nothing behind."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

import eupe_jax
from convert import teachers_to_orbax, transformers_layout
from eupe_jax import files
from eupe_jax.models import interchange, text_tower, zoo
from eupe_jax.training import checkpoints, encoders, integrity, streaming
from tests.convert.conftest import make_encoder

ROOT = Path(__file__).resolve().parents[2]
PE = {"width": 32, "depth": 2, "num_heads": 2, "mlp_dim": 48, "patch_size": 8, "image_size": 32, "pool_heads": 2}
PE |= {"output_dim": 16}
TEXT = {"context_length": 8, "width": 16, "depth": 2, "num_heads": 2, "vocabulary": 64, "output_dim": 16}


def official(encoder):
    return interchange.to_state_dict(encoder.name, encoder.variables, **encoder.overrides)


@pytest.fixture
def source(encoder, tmp_path):
    path = tmp_path / "published.safetensors"
    save_file(official(encoder), path)
    return path


def assert_same(got, expected):
    got, expected = dict(jax.tree.leaves_with_path(got)), dict(jax.tree.leaves_with_path(expected))
    assert got.keys() == expected.keys()
    for path, value in expected.items():
        assert got[path].dtype == value.dtype, path
        np.testing.assert_array_equal(got[path], value, err_msg=str(path))


def test_every_bit_arrives_and_the_manifest_says_how_to_feed_it(encoder, source, tmp_path, monkeypatch):
    out, on_disk = tmp_path / "deep" / "teacher", set()
    monkeypatch.setattr(files, "flush", lambda path: on_disk.add(path.name))
    manifest = teachers_to_orbax.convert(encoder.name, source, out, overrides=encoder.overrides)
    assert on_disk >= {path.name for path in out.rglob("*")}
    loaded = eupe_jax.load_encoder(out)
    assert_same(loaded.variables["params"], encoder.variables["params"])
    assert_same(loaded.variables["buffers"], encoder.variables.get("buffers", {}))
    assert (loaded.name, loaded.overrides) == (encoder.name, encoder.overrides)
    spec = zoo.spec(encoder.name, **encoder.overrides)
    assert (loaded.mean, loaded.std, loaded.resolution) == (spec.mean, spec.std, spec.resolution)
    images = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    expected = encoder(images)
    for name, value in loaded(images, resolution=64).items():
        np.testing.assert_array_equal(value, expected[name])
    assert manifest == checkpoints.read_manifest(out) | {"students": manifest["students"]}
    entry = manifest["students"]["encoder"]
    assert entry["licence"] == spec.licence and entry["kernel_dtype"] == "float32"
    assert entry["parameters"] == sum(x.size for x in jax.tree.leaves(encoder.variables["params"]))
    assert manifest["source"]["layout"] == "official" and len(manifest["source"]["files"][source.name]) == 64
    assert [p.name for p in out.parent.iterdir()] == ["teacher"]


def test_half_precision_rounds_kernels_only(encoder, source, tmp_path):
    teachers_to_orbax.convert(encoder.name, source, tmp_path / "o", dtype="bfloat16", overrides=encoder.overrides)
    loaded = eupe_jax.load_encoder(tmp_path / "o", dtype=jnp.bfloat16)

    def expected(path, value):
        return value.astype(jnp.bfloat16) if path[-1].key == "kernel" else value

    assert_same(loaded.variables["params"], jax.tree_util.tree_map_with_path(expected, encoder.variables["params"]))
    assert_same(loaded.variables["buffers"], encoder.variables.get("buffers", {}))
    images = np.zeros((1, 64, 64, 3), np.uint8)
    patches = np.asarray(loaded(images, resolution=64)["patches"], np.float32)
    np.testing.assert_allclose(patches, encoder(images)["patches"], atol=0.2)


def test_hashes_of_what_was_converted_are_recorded_and_checked(vit, tmp_path):
    source, out = tmp_path / "x.safetensors", tmp_path / "o"
    save_file(official(vit), source)
    manifest = teachers_to_orbax.convert(vit.name, source, out, overrides=vit.overrides)
    assert manifest["source"]["files"] == {source.name: hashlib.sha256(source.read_bytes()).hexdigest()}
    written = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} - {integrity.CHECKSUMS}
    recorded = json.loads((out / integrity.CHECKSUMS).read_text())["files"]
    assert recorded.keys() == written - {integrity.STEP_METADATA, integrity.COMMITTED}  # what Orbax writes last
    for name in recorded:
        assert recorded[name]["sha256"] == hashlib.sha256((out / name).read_bytes()).hexdigest()
    largest = max((out / name for name in recorded), key=lambda path: path.stat().st_size)
    whole = largest.read_bytes()
    largest.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(integrity.CorruptCheckpoint, match=f"{largest.relative_to(out)} has other bytes"):
        eupe_jax.load_encoder(out)
    largest.write_bytes(whole)
    (out / integrity.CHECKSUMS).unlink()
    with pytest.raises(integrity.CorruptCheckpoint, match="no checksums.json"):
        eupe_jax.load_encoder(out)


def test_plain_orbax_restores_it_on_a_mesh(vit, tmp_path):
    save_file(official(vit), tmp_path / "x.safetensors")
    teachers_to_orbax.convert(vit.name, tmp_path / "x.safetensors", tmp_path / "o", overrides=vit.overrides)
    mesh = Mesh(np.array(jax.devices()[:4]), ("fsdp",))

    def target(leaf):
        cut = leaf.ndim and leaf.shape[-1] % 4 == 0
        spec = PartitionSpec(*[None] * (leaf.ndim - 1), "fsdp") if cut else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    wanted = jax.tree.map(target, {"params": vit.variables["params"], "buffers": vit.variables["buffers"]})
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "o" / "encoder.backbone", wanted)
    assert_same(restored, {"params": vit.variables["params"], "buffers": vit.variables["buffers"]})
    kernel = restored["params"]["blocks"]["mlp"]["fc1"]["kernel"]
    assert kernel.sharding == wanted["params"]["blocks"]["mlp"]["fc1"]["kernel"].sharding
    assert kernel.addressable_shards[0].data.size == kernel.size // 4


def test_large_leaves_are_written_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "CHUNK_BYTES", 2**12)
    monkeypatch.setattr(streaming, "WRITE_BYTES", 2**14)
    rng = np.random.default_rng(0)
    arrays = {"a": (3, 70, 130), "b": (5,), "c": (), "d": (4097, 3), "e": (2, 2, 2)}
    arrays = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in arrays.items()}
    announced = {n: streaming.ComingLeaf(n, x.shape, x.dtype) for n, x in arrays.items()}
    streaming.save(tmp_path / "o", {"item": {"deep": announced}}, reversed(arrays.items()), note={"a": 1})
    got = checkpoints.restore_item(checkpoints.absolute(tmp_path / "o"), "item")
    assert_same(got, {"deep": arrays})
    for wrong in ({"a": arrays["b"]}, {"z": arrays["a"]}, {}, {"a": arrays["a"].astype(np.float64)}):
        with pytest.raises(ValueError, match="announced"):
            streaming.save(tmp_path / "wrong", {"item": announced}, wrong.items())
        assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_converters_take_it(vit, tmp_path, dtype):
    weights = pytest.importorskip("convert.weights", reason="needs PyTorch")
    save_file(official(vit), tmp_path / "x.safetensors")
    source = tmp_path / "x.safetensors"
    teachers_to_orbax.convert(vit.name, source, tmp_path / "o", dtype=dtype, overrides=vit.overrides)
    loaded = weights.load(tmp_path / "o")
    assert {x.dtype for x in jax.tree.leaves(loaded.variables)} == {np.dtype(np.float32)}
    weights.to_module(loaded)
    same = weights.digest(weights.to_state_dict(loaded)) == weights.digest(official(vit))
    assert same == (dtype == "float32")


def test_our_own_files_bring_their_description(vit, tmp_path):
    weights = pytest.importorskip("convert.weights", reason="needs PyTorch")
    header = weights.describe(vit) | {"resolution": 96, "mean": [0.1, 0.2, 0.3]}
    save_file(official(vit), tmp_path / "x.safetensors", {"eupe_jax": json.dumps(header)})
    arguments = [f"--checkpoint={tmp_path}/x.safetensors", f"--out={tmp_path}/o"]
    assert teachers_to_orbax.main(["--model=eupe_vits16", *arguments]) == 1
    assert teachers_to_orbax.main([f"--model={vit.name}", *arguments]) == 0
    loaded = eupe_jax.load_encoder(tmp_path / "o")
    assert (loaded.resolution, loaded.mean, loaded.overrides) == (96, (0.1, 0.2, 0.3), vit.overrides)


def test_shards_with_names_of_transformers(convnext, tmp_path):
    tensors = interchange.to_state_dict(convnext.name, convnext.variables, layout="transformers", **convnext.overrides)
    names, folder = list(tensors), tmp_path / "model"
    folder.mkdir()
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    manifest = teachers_to_orbax.convert(convnext.name, folder, tmp_path / "o", overrides=convnext.overrides)
    assert manifest["source"]["layout"] == "transformers" and set(manifest["source"]["files"]) == set(shards)
    assert_same(eupe_jax.load_encoder(tmp_path / "o").variables["params"], convnext.variables["params"])


def test_a_pod_needs_no_pytorch():
    check = "import convert.teachers_to_orbax, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)


def image_text_file(path):
    """A tiny Perception Encoder core model with its text tower, every parameter random."""
    module = text_tower.build("pe_core_t16_384")
    module = module.clone(visual=zoo.build("pe_core_t16_384", **PE), text=module.text.clone(**TEXT))
    inputs = text_tower.FAMILY.example_inputs(module)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    variables = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes)
    tensors = interchange.family_export("PE", text_tower.FAMILY, module, variables)
    save_file(tensors, path)
    return module, variables


def test_text_towers_come_along(tmp_path):
    module, variables = image_text_file(tmp_path / "pe.safetensors")
    manifest = teachers_to_orbax.convert(
        "pe_core_t16_384", tmp_path / "pe.safetensors", tmp_path / "o", overrides=PE, text_overrides=TEXT
    )
    assert manifest["source"]["left_out"] == []
    encoder = eupe_jax.load_encoder(tmp_path / "o")
    assert_same(encoder.variables["params"], variables["params"]["visual"])
    loaded, loaded_variables, entry = encoders.load_image_text(tmp_path / "o")
    assert_same(loaded_variables, variables)
    assert entry["mean"] == [0.5, 0.5, 0.5]
    images, tokens = np.ones((2, 32, 32, 3), np.float32), np.array([[1, 5, 63, 0]])
    expected = module.apply(variables, images, tokens)["logits"]
    np.testing.assert_array_equal(loaded.apply(loaded_variables, images, tokens)["logits"], expected)


def test_what_lies_beside_a_tower_is_known_or_refused(tmp_path):
    """A text tower with a hole is not taken for none, and nothing unknown is left out for lying outside `visual.`."""
    image_text_file(tmp_path / "pe.safetensors")
    tensors = load_file(tmp_path / "pe.safetensors")
    broken = {
        r"missing token_embedding\.weight": {k: v for k, v in tensors.items() if k != "token_embedding.weight"},
        r"unexpected stray\.weight": tensors | {"stray.weight": np.zeros(3, np.float32)},
        r"unexpected conv1\.weight": tensors | {"conv1.weight": np.zeros(3, np.float32)},
    }
    for number, (message, content) in enumerate(broken.items()):
        save_file(content, tmp_path / f"{number}.safetensors")
        with pytest.raises(ValueError, match=message):
            teachers_to_orbax.convert(
                "pe_core_t16_384", tmp_path / f"{number}.safetensors", tmp_path / "o", overrides=PE, text_overrides=TEXT
            )
        assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("override", ["dtype=bfloat16", "num_heads=0", "patch_size=0", "depth=-1", "nothing=3"])
def test_overrides_that_make_no_encoder_end_in_one_line(vit, tmp_path, capsys, override):
    save_file(official(vit), tmp_path / "x.safetensors")
    command = [f"--model={vit.name}", f"--checkpoint={tmp_path / 'x.safetensors'}", f"--out={tmp_path / 'o'}"]
    assert teachers_to_orbax.main([*command, f"--override={override}"]) == 1
    assert capsys.readouterr().err.count("error:") == 1 and not (tmp_path / "o").exists()


def test_towers_without_texts_have_none_to_load(tmp_path):
    _, variables = image_text_file(tmp_path / "pe.safetensors")
    module = zoo.build("pe_core_t16_384", **PE)
    tensors = interchange.to_state_dict("pe_core_t16_384", {"params": variables["params"]["visual"]}, **PE)
    save_file(tensors, tmp_path / "visual.safetensors")
    teachers_to_orbax.convert("pe_core_t16_384", tmp_path / "visual.safetensors", tmp_path / "o", overrides=PE)
    assert eupe_jax.load_encoder(tmp_path / "o").module == module
    with pytest.raises(ValueError, match="holds no text tower"):
        encoders.load_image_text(tmp_path / "o")


def test_adapters_are_kept_when_asked_for(vit, tmp_path, capsys):
    weights = pytest.importorskip("convert.weights", reason="needs PyTorch")
    extra = {"projectors.a.0.weight": np.ones((2, 3), np.float16), "projectors.a.0.bias": np.arange(2)}
    bare, path = tmp_path / "bare.safetensors", tmp_path / "x.safetensors"
    for file, tensors in ((bare, official(vit)), (path, official(vit) | extra)):
        header = weights.describe(vit) | {"weights_sha256": weights.digest(tensors)}
        save_file(tensors, file, {"eupe_jax": json.dumps(header)} if file == bare else {})
    override = [f"--override={k}={v}" for k, v in vit.overrides.items()]
    common = [f"--model={vit.name}", f"--checkpoint={path}", *override]
    assert teachers_to_orbax.main([*common, f"--out={tmp_path}/without"]) == 0
    assert "left out 2 tensors of other parts (projectors); --adapters keeps them" in capsys.readouterr().out
    assert checkpoints.read_manifest(tmp_path / "without")["source"]["left_out"] == sorted(extra)
    assert teachers_to_orbax.main([*common, f"--out={tmp_path}/with", "--adapters"]) == 0
    step = checkpoints.step_directory(tmp_path / "with")
    assert_same(checkpoints.restore_item(step, checkpoints.EXTRAS), extra)
    assert_same(eupe_jax.load_encoder(step).variables["params"], vit.variables["params"])
    arguments = [f"--model={vit.name}", f"--checkpoint={bare}", f"--out={tmp_path}/none", "--adapters"]
    assert teachers_to_orbax.main(arguments) == 1
    assert "leave out --adapters" in capsys.readouterr().err


def test_a_training_run_takes_it_as_teacher_and_as_start(vit, tmp_path):
    from eupe_jax.sharding.mesh import make_mesh
    from eupe_jax.training import assemble
    from tests.training.conftest import tiny_config

    save_file(official(vit), tmp_path / "x.safetensors")
    teachers_to_orbax.convert(vit.name, tmp_path / "x.safetensors", tmp_path / "o", dtype="bfloat16",
                              overrides=vit.overrides)  # fmt: skip
    config = tiny_config()
    config.teachers.a.model = vit.name
    del config.teachers.b
    small = dict(config.teachers.a.overrides)
    config.teachers.a.overrides = {}
    config.teachers.a.dtype = "bfloat16"
    mesh = make_mesh(**config.mesh)
    config.teachers.a.checkpoint = str(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match=r"what convert/teachers_to_orbax\.py makes of a weights file"):
        assemble.load_teachers(config, mesh)
    config.teachers.a.checkpoint = str(tmp_path / "o")
    config.students.vit.init_from = str(tmp_path / "o")
    config.students.vit.overrides = vit.overrides
    config.teachers.a.overrides = small
    with pytest.raises(ValueError, match="teachers.a.overrides.embed_dim is 32, but .* with 64"):
        assemble.load_teachers(config, mesh)
    config.teachers.a.overrides = {}
    teachers = assemble.load_teachers(config, mesh)
    assert teachers.variables["a"]["params"]["blocks"]["mlp"]["fc1"]["kernel"].dtype == jnp.bfloat16
    assert not teachers.chains
    state = assemble.init_state(config, assemble.make_students(config, teachers.by_name), mesh)
    started = state["students"]["vit"]["params"]["backbone"]
    assert_same(started["norm"], vit.variables["params"]["norm"])
    kernel = vit.variables["params"]["blocks"]["mlp"]["fc2"]["kernel"]
    assert_same(started["blocks"]["mlp"]["fc2"]["kernel"], kernel.astype(jnp.bfloat16).astype(np.float32))


def run(*arguments, before="true"):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    command = ["bash", "-c", f'{before}; exec "$0" "$@"', sys.executable, "convert/teachers_to_orbax.py", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture(scope="session")
def whole_file(tmp_path_factory):
    """Random weights of a real size: 22 MB."""
    path = tmp_path_factory.mktemp("whole") / "eupe_vitt16.safetensors"
    save_file(official(make_encoder("eupe_vitt16", {})), path)
    return path


def test_a_full_disk_leaves_nothing_behind(whole_file, tmp_path):
    limit = "trap '' XFSZ; ulimit -f 1024"  # KiB a file
    process = run("--model=eupe_vitt16", f"--checkpoint={whole_file}", f"--out={tmp_path}/o", before=limit)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1 and not out, (out, err)
    assert err == f"error: --out {tmp_path}/o cannot be written: File too large\n"
    assert not list(tmp_path.iterdir())


def test_too_little_disk_is_noticed_before_anything_is_written(vit, tmp_path, monkeypatch):
    save_file(official(vit), tmp_path / "x.safetensors")
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    monkeypatch.setattr(teachers_to_orbax, "_DISK_MARGIN", 4 * free / 2**18)
    with pytest.raises(OSError, match=r"needs .* GB, but .* has .* GB free"):
        teachers_to_orbax.convert(vit.name, tmp_path / "x.safetensors", tmp_path / "o", overrides=vit.overrides)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_ctrl_c_leaves_nothing_behind(whole_file, tmp_path):
    process = run("--model=eupe_vitt16", f"--checkpoint={whole_file}", f"--out={tmp_path}/deep/o")
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("deep/.o.*.tmp/checkpoint*/encoder.backbone*/**/d/*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.skip("the machine wrote faster than Ctrl-C came")
    assert process.returncode == 130 and err == "error: interrupted; nothing written\n" and not out, err
    assert not list((tmp_path / "deep").iterdir())


def test_command_line(whole_file, tmp_path, capsys):
    arguments = ["--model=eupe_vitt16", f"--checkpoint={whole_file}"]
    assert teachers_to_orbax.main([*arguments, f"--out={tmp_path}/o"]) == 0
    printed = capsys.readouterr()
    assert "5.5 M parameters, kernels float32, 256 px, licence FAIR Noncommercial" in printed.out
    assert "from eupe_vitt16.safetensors (official names)" in printed.out and not printed.err
    before = sorted((tmp_path / "o").rglob("*"))
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for extra, words in [
        ([f"--out={tmp_path}/o"], "exists: name a new folder"),
        ([f"--out={tmp_path}/file"], "exists: name a new folder"),
        ([f"--out={tmp_path}/file/o"], "file"),
        (["--out=gs://bucket/o"], "remote"),
        ([f"--out={tmp_path}/n", "--model=eupe_vitt17"], "did you mean eupe_vitt16"),
        ([f"--out={tmp_path}/n", "--model=eupe_vits16"], "mismatches"),
        ([f"--out={tmp_path}/n", "--override=depht=3"], "depth"),
        ([f"--out={tmp_path}/n", "--checkpoint=nowhere.pt"], "nowhere.pt"),
        ([f"--out={tmp_path}/n", f"--checkpoint={tmp_path}/o"], "no .safetensors file"),
    ]:
        assert teachers_to_orbax.main(arguments + extra) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and words in error and error.count("\n") == 1, error
    assert sorted((tmp_path / "o").rglob("*")) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "o"]
    assert teachers_to_orbax.main([*arguments, f"--out={tmp_path}/empty", "--dtype=bfloat16"]) == 0
    with pytest.raises(SystemExit):
        teachers_to_orbax.main(["--help"])
    assert "--model=pe_core_g14_448" in capsys.readouterr().out


def test_folder_of_another_transformers_model_is_refused(convnext, tmp_path):
    """What shows in no tensor stands in config.json."""
    tensors = interchange.to_state_dict(convnext.name, convnext.variables, layout="transformers", **convnext.overrides)
    save_file(tensors, tmp_path / "model.safetensors")
    described = transformers_layout.config(convnext)
    (tmp_path / "config.json").write_text(json.dumps(described | {"layer_norm_eps": 1e-5}))
    with pytest.raises(ValueError, match="layer_norm_eps is 1e-05, not 1e-06"):
        teachers_to_orbax.convert(convnext.name, tmp_path, tmp_path / "o", overrides=convnext.overrides)
    assert not (tmp_path / "o").exists()
    (tmp_path / "config.json").write_text(json.dumps(described))
    teachers_to_orbax.convert(convnext.name, tmp_path, tmp_path / "o", overrides=convnext.overrides)
