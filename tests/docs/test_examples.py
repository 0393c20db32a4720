"""docs/extending.md: its examples, put where the page says and with the lines changed that it shows, run together."""

import importlib.util
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from eupe_jax.data.sources import RecordError
from eupe_jax.distill.host_teachers import check_features
from tests import onnx_file
from tests.docs import shell
from tests.docs.pages import ROOT, blocks, tables

PAGE = ROOT / "docs" / "extending.md"
EXAMPLES = ROOT / "docs" / "examples"

# Both teachers, the source and the evaluation, in one process.
TOGETHER = """
import json
from pathlib import Path
from docs.examples import own_parts
from eupe_jax.evals import registry
from eupe_jax.training.measure import measure_statistics
from launch.load_any import load_any

config = own_parts.get_config()
config.statistics_steps = 1
config.augment.update({name: 0.0 for name in config.augment if name.endswith("_p")})  # compiles for nothing
found = measure_statistics(config, "runs/own/statistics")
settings = registry.settings("effective_rank", {"images": 12})
module = registry.evaluation("effective_rank")
assert module.__file__ == str(Path("eupe_jax/evals/effective_rank.py").resolve())
data = module.load(Path("data/pictures"), settings)
result = module.run(load_any("host:hog_teacher:HogTeacher"), data, settings, workdir=Path("work"))
widths = {name: {kind: len(mean) for kind, mean in s.mean.items()} for name, s in found.items()}
print(json.dumps({"widths": widths, "metrics": result.metrics, "images": result.details["images"]}))
"""


def example(name):
    found = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def applied(patch: str, text: str) -> str:
    """`text` with the hunks of a diff without line numbers: every old part must stand there exactly once."""
    for hunk in patch.split("@@\n")[1:]:
        lines = hunk.splitlines()
        assert all(line[0] in " -+" for line in lines), f"not a diff: {hunk}"
        old = "".join(line[1:] + "\n" for line in lines if line[0] in " -")
        new = "".join(line[1:] + "\n" for line in lines if line[0] in " +")
        assert text.count(old) == 1, f"these lines are not in the file that docs/extending.md changes:\n{old}"
        text = text.replace(old, new)
    return text


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((48, 40)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    """A copy of the project with the page's changes made, and data for its recipe."""
    folder = tmp_path_factory.mktemp("extended")
    for name in ("eupe_jax", "configs", "launch", "docs/examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    ((_, rows),) = [t for t in tables(PAGE.read_text()) if t[0][0] == "you have"]
    for _, link, place in rows:
        if place.startswith("`"):
            source = re.search(r"\((.*)\)", link)[1]
            assert not (ROOT / place.strip("`")).exists()
            shutil.copy(PAGE.parent / source, folder / place.strip("`"))
    patches = [block for block in blocks(PAGE) if block.language == "diff"]
    assert len(patches) == 3
    for block in patches:
        target = folder / re.match(r"--- (\S+)\n\+\+\+ \1\n", block.text)[1]
        target.write_text(applied(block.text, target.read_text()))
    for name in ("own", "pictures"):
        (folder / "data" / name).mkdir(parents=True)
    for shard in range(2):
        with zipfile.ZipFile(folder / "data" / "own" / f"{shard}.zip", "w") as archive:
            for i in range(8):
                archive.writestr(f"folder/{i}.png", picture(10 * shard + i))
    for i in range(16):
        (folder / "data" / "pictures" / f"{i}.png").write_bytes(picture(i))
    return folder


def run(sandbox, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join([str(sandbox), str(sandbox / "docs" / "examples")]),
    }
    done = subprocess.run(
        [sys.executable, *arguments], cwd=sandbox, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_all_of_them_together(sandbox):
    found = json.loads(run(sandbox, "-c", TOGETHER).splitlines()[-1])
    assert found["widths"] == {"hog": {"cls": 9, "patches": 9}, "mixer": {"cls": 24, "patches": 24}}
    assert found["images"] == 12
    assert 1 < found["metrics"]["effective_rank"] < 9
    assert list(sandbox.glob("work/features/*")), "extract keeps nothing: encoder, data or crop has no fingerprint"


@pytest.mark.slow
def test_the_commands_of_the_page(sandbox):
    (commands,) = [b.text for b in blocks(PAGE) if not b.language]
    for line in commands.splitlines():
        words = line.split()
        if words[0] == "python":
            run(sandbox, *words[1:])
    metrics = (sandbox / "runs/own/train/metrics.jsonl").read_text()
    for name in ("mixer/hog/patch_cosine", "narrow/mixer/cls_cosine", "rank/narrow/effective_rank"):
        assert name in metrics


@pytest.mark.slow
def test_an_onnx_file_and_a_folder_of_ones_own(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("efficientnet_lite_pytorch")
    (text,) = [b.text for b in blocks(ROOT / "README.md") if "own_onnx.py" in b.text]
    short = "--config.total_steps=3 --config.optimizer.warmup_steps=1 --config.statistics_steps=2 --config.log_every=1"
    (tmp_path / "photos" / "inner").mkdir(parents=True)
    for i in range(24):
        (tmp_path / "photos" / "inner" / f"{i}.png").write_bytes(picture(i))
    for old, new in {
        "/path/to/photos": f"{tmp_path}/photos",
        "/path/to/model.onnx": str(onnx_file.write(tmp_path / "tiny.onnx")),
        'TENSOR"': f'map {short} --config.statistics={tmp_path}/statistics"',
        "runs/mine": str(tmp_path),
        "mine.pte": f"{tmp_path}/mine.pte",
    }.items():
        assert old in text
        text = text.replace(old, new)
    for words in shell.lines(text, {}):
        run(ROOT, *words[1:])
    assert (tmp_path / "mine.pte").stat().st_size > 1e6
    assert "vitt/mine/patch_cosine" in (tmp_path / "train" / "metrics.jsonl").read_text()


def test_the_host_teacher_keeps_its_promise():
    teacher = example("hog_teacher").HogTeacher(32)
    images = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), dtype=np.uint8)
    features = teacher(images)
    check_features(teacher.spec, features, 3)
    # A ramp from left to right has gradients in one direction: all votes in the first bin.
    ramp = np.broadcast_to(np.arange(0, 256, 8, dtype=np.uint8)[None, None, :, None], (1, 32, 32, 3))
    assert np.argmax(teacher(ramp)["patches"], axis=-1).max() == 0
    np.testing.assert_allclose(np.linalg.norm(teacher(ramp)["cls"], axis=-1), 1, atol=1e-3)
    assert teacher.spec.fingerprint != example("hog_teacher").HogTeacher(32, bins=8).spec.fingerprint
    with pytest.raises(ValueError, match="33"):
        example("hog_teacher").HogTeacher(33)


def test_the_source_reads_what_is_there_and_names_what_is_not(tmp_path):
    module = example("zip_source")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        with zipfile.ZipFile(tmp_path / folder / "x.zip", "w") as archive:
            archive.writestr("notes.txt", "no image")
            for i in range(3):
                archive.writestr(f"{i}.png", picture(i))
    source = module.ZipFiles(str(tmp_path / "a"))
    assert [source[i].data for i in range(len(source))] == [picture(i) for i in range(3)]
    sys.modules[module.__name__] = module  # pickle looks classes up there
    assert pickle.loads(pickle.dumps(source))[-1].data == picture(2)
    assert source.digest == module.ZipFiles(str(tmp_path / "b")).digest
    with zipfile.ZipFile(tmp_path / "b" / "x.zip", "a") as archive:
        archive.writestr("3.png", picture(3))
    assert source.digest != module.ZipFiles(str(tmp_path / "b")).digest

    whole = (tmp_path / "a" / "x.zip").read_bytes()
    at = whole.index(picture(1)) + 40
    (tmp_path / "a" / "x.zip").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert source[0].data == picture(0)
    with pytest.raises(RecordError, match=r"x\.zip:1\.png: cannot be unpacked"):
        source[1]
    module.MAX_BYTES = 10
    with pytest.raises(RecordError, match="more than 10"):
        source[0]
    (tmp_path / "a" / "x.zip").write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"x\.zip: is no whole zip file"):
        module.ZipFiles(str(tmp_path / "a"))


def test_effective_rank_in_closed_form():
    effective_rank = example("effective_rank").effective_rank
    assert effective_rank(np.eye(5))[0] == pytest.approx(5)
    assert effective_rank(np.ones((7, 4)))[0] == pytest.approx(1, abs=1e-6)
    rank, shares = effective_rank(np.diag([3.0, 1.0]))
    assert rank == pytest.approx(np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25)))
    np.testing.assert_allclose(shares, [0.75, 0.25])
