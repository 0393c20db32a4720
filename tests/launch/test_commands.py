"""The commands as a user types them: bad input ends in one line, a non-zero status, and nothing half-written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from launch import cli
from tests import forked

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "--config=configs/stage2_vitt.py:runlocal"


def run(*command, **environment):
    """A script of ours and its arguments, on one device, in a process of its own (environment: `tests.forked`)."""
    return forked.run([str(word) for word in command], ROOT, alone() | environment, timeout=300)


def alone():
    """The environment of a command on one device. What it compiles runs once: the compiler is told to hurry."""
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}


def assert_one_line(result, *words):
    assert result.returncode == 2, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.sed=3"], ["'sed'", "did you mean 'seed'"]),
        (["--config.optimizer.learning_rat=3"], ["learning_rat", "'learning_rate'"]),
        (["--config.seed=abc"], ["--config.seed=abc"]),
        (["--nope=3"], ["nope"]),
        (["--config.teachers.proxy.checkpoint=/nowhere"], ["no checkpoint at /nowhere"]),
        (["--config.data.sources.synthetic.kind=magic"], ["data.sources.synthetic.kind", "'magic'"]),
    ],
)
def test_train_refuses(flags, words, tmp_path):
    statistics = "--config.statistics=x" if "checkpoint" in flags[0] else "--noprint_config"
    result = run("launch/train.py", RECIPE, f"--workdir={tmp_path}/run", statistics, *flags)
    assert_one_line(result, *words)
    assert not list(tmp_path.glob("run/*.json*"))


def test_train_refuses_an_unwritable_workdir(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert_one_line(run("launch/train.py", RECIPE, f"--workdir={tmp_path}/file/run"), "file/run")
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_folder_of_junk_ends_in_its_list(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(30):
        (tmp_path / "photos" / f"{i}.jpg").write_text("no picture")
    recipe = tmp_path / "junk.py"
    recipe.write_text(
        "from configs import common, stage2_vitt\n\n\n"
        "def get_config():\n"
        '    config = stage2_vitt.get_config("runlocal")\n'
        "    with config.unlocked():\n"
        f'        config.data.sources = {{"photos": common.source("images", {str(tmp_path / "photos")!r})}}\n'
        "    return config\n"
    )
    result = run("launch/train.py", f"--config={recipe}", f"--workdir={tmp_path}/run")
    assert_one_line(result, "were broken")
    lines = result.stderr.splitlines()
    listed = [line for line in lines[lines.index("broken records:") :] if line.startswith("  ")]
    assert len(listed) > 10 and all(re.fullmatch(r"  \S+/photos/\d+\.jpg: not an image .*", line) for line in listed)


@pytest.mark.parametrize("error", [ValueError("two\nlines"), ChildProcessError("a data worker process ended")])
def test_errors_end_in_their_notes_and_one_line(error, monkeypatch, capsys):
    error.add_note("broken records:\n  a.jpg: empty")

    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["command"])
    monkeypatch.setattr(cli, "set_up_logging", lambda: None)
    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert ended.value.code == 2
    *notes, line = capsys.readouterr().err.splitlines()
    assert notes == ["broken records:", "  a.jpg: empty"]
    assert line == f"error: {' '.join(str(error).split())} [EUPE_TRACEBACK=1 shows where]"


def test_unknown_recipe_and_mode():
    assert_one_line(run("launch/train.py", "--config=configs/stage2_vitx.py", "--workdir=x"), "stage2_vitx.py")
    assert_one_line(run("launch/train.py", "--config=configs/stage2_vitt.py:tiny", "--workdir=x"), "'tiny'")


def test_print_config_shows_the_whole_recipe():
    """In a Python of its own, as a shell starts it."""
    command = [sys.executable, "launch/train.py", "--config=configs/stage3_vitb.py", "--print_config"]
    result = subprocess.run(command, cwd=ROOT, env=alone(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0
    assert "total_steps: 100000" in result.stdout and "patch_smooth_l1: 0.1" in result.stdout


def quickstart(images, out):
    return run("launch/quickstart.py", f"--images={images}", f"--out={out}", "--budget=0.01")


def test_quickstart_refuses_bad_images_and_keeps_earlier_results(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "summary.json").write_text("earlier")
    assert_one_line(quickstart(tmp_path / "nowhere", out), "nowhere")
    (tmp_path / "empty").mkdir()
    assert_one_line(quickstart(tmp_path / "empty", out), "no images found")
    few = tmp_path / "few"
    few.mkdir()
    Image.new("RGB", (64, 64)).save(few / "one.png")
    assert_one_line(quickstart(few, out), "only 1", "at least 40")
    for i in range(60):
        Image.new("RGB", (64, 64), (4 * i, 0, 0)).save(few / f"{i}.png")
    (few / "broken.jpg").write_bytes(b"<html>no picture</html>")
    assert_one_line(quickstart(few, out), "broken.jpg")
    assert (out / "summary.json").read_text() == "earlier"
    assert not (out / "images" / "train").exists()


def test_quickstart_refuses_an_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    assert_one_line(quickstart(ROOT, tmp_path / "file" / "out"), "file/out")
