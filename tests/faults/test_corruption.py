"""Checkpoints damaged in every way that storage damages files: each is named, none is gone on from silently.

EUPE_CORRUPTION_SEED chooses other places.
"""

import json
import os
import random
import re
import shutil
from collections import Counter

import jax
import numpy as np
import pytest

from eupe_jax.training.integrity import CHECKSUMS, COMMITTED, STEP_METADATA, CorruptCheckpoint
from tests.faults.commands import RECIPE, Command, assert_same_run, finished_steps
from tests.training.damaged import cut, empty, flip, grow, make_run, make_state, remove, restored, zero

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

STEPS = (1, 2, 3)
TIMES = 15  # of every damage to the newest checkpoint
# Orbax writes these when it commits, after the checksums: the fact and the time of it, nothing that is restored.
WRITTEN_LAST = {COMMITTED, STEP_METADATA}


@pytest.fixture(scope="module")
def moments():
    seed = int(os.environ.get("EUPE_CORRUPTION_SEED", 0))
    print("EUPE_CORRUPTION_SEED", seed)
    return random.Random(seed)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with the checkpoints of STEPS."""
    return make_run(tmp_path_factory.mktemp("run"), STEPS)


def files_of(step):
    """The files of a step directory that hold anything, checksums included."""
    files = sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size)
    return [path for path in files if path.name not in WRITTEN_LAST]


def one_file(damage):
    def to_a_run(workdir, moments):
        path = moments.choice(files_of(workdir / "checkpoints/3"))
        damage(path, moments)
        return path.name

    return to_a_run


def remove_folder(workdir, moments):
    path = moments.choice(sorted(p for p in (workdir / "checkpoints/3").rglob("*") if p.is_dir() and files_of(p)))
    shutil.rmtree(path)
    return path.name


def swap_between_steps(workdir, moments):
    """A file of this step and the file of the same name of another, where they differ."""
    here, there = workdir / "checkpoints/3", workdir / "checkpoints" / moments.choice("12")
    names = [path.relative_to(here) for path in files_of(here)]
    pairs = [(here / n, there / n) for n in names if (there / n).exists()]
    ours, theirs = moments.choice([(a, b) for a, b in pairs if a.read_bytes() != b.read_bytes()])
    held = ours.read_bytes()
    ours.write_bytes(theirs.read_bytes())
    theirs.write_bytes(held)
    return ours.name if ours.name != CHECKSUMS else "other bytes"  # whole itself: then all the others differ


def swap_within_step(workdir, moments):
    ours, other = moments.sample(files_of(workdir / "checkpoints/3"), 2)
    while ours.read_bytes() == other.read_bytes():
        ours, other = moments.sample(files_of(workdir / "checkpoints/3"), 2)
    held = ours.read_bytes()
    ours.write_bytes(other.read_bytes())
    other.write_bytes(held)
    return f"{ours.name}|{other.name}"  # either


def swap_steps(workdir, moments):
    """Whole checkpoints under each other's names."""
    folder, other = workdir / "checkpoints", moments.choice("12")
    (folder / "3").rename(folder / "held")
    (folder / other).rename(folder / "3")
    (folder / "held").rename(folder / other)
    return f"holds the checkpoint of step {other}"


DAMAGES = {
    "bit flipped": one_file(flip),
    "file cut short": one_file(cut),
    "file emptied": one_file(empty),
    "block zeroed": one_file(zero),
    "file grown": one_file(grow),
    "file deleted": one_file(remove),
    "folder deleted": remove_folder,
    "files swapped between steps": swap_between_steps,
    "files swapped within a step": swap_within_step,
    "steps swapped": swap_steps,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named_and_an_older_checkpoint_is_taken_only_where_asked(run, tmp_path, moments, record, kind):
    found = Counter()
    for number in range(TIMES):
        workdir = tmp_path / str(number)
        shutil.copytree(run, workdir)
        name = DAMAGES[kind](workdir, moments)
        found["injected"] += 1
        try:
            restored(workdir)
        except CorruptCheckpoint as error:
            said = str(error)
            assert "checkpoints/3" in said and any(re.escape(part) in re.escape(said) for part in name.split("|"))
            found["detected"] += 1
        assert (workdir / "checkpoints/3").is_dir() and not (workdir / "damaged").exists(), "nothing is moved unasked"
        state = restored(workdir, fallback=True)
        assert int(state["step"]) in (1, 2) and (workdir / "damaged/3").is_dir()
        expected = make_state(int(state["step"]))["students"]
        jax.tree.map(np.testing.assert_array_equal, state["students"], expected)
        shutil.rmtree(workdir)
    assert found["detected"] == found["injected"] == TIMES
    record("corrupted checkpoint", phase=kind, **found, accepted=0)


def test_what_is_written_last_holds_nothing_that_is_restored(run, tmp_path, moments, record):
    """Where these files are damaged, the checkpoint is refused, or restored bit for bit as it was written."""
    found = Counter()
    for number in range(TIMES):
        workdir = tmp_path / str(number)
        shutil.copytree(run, workdir)
        path = workdir / "checkpoints/3" / moments.choice(sorted(WRITTEN_LAST))
        moments.choice([flip, cut, empty, zero, grow, remove])(path, moments)
        found["injected"] += 1
        try:
            state = restored(workdir)
            assert int(state["step"]) == 3
            jax.tree.map(np.testing.assert_array_equal, state["students"], make_state(3)["students"])
            found["recovered"] += 1
        except CorruptCheckpoint as error:
            assert path.name in str(error)
            found["detected"] += 1
    record("corrupted checkpoint", phase="note of the commit", **found, accepted=0)


def test_training_stops_and_falls_back_as_told(tmp_path, cache, moments, record):
    """A damaged newest checkpoint stops the command with its file's name; --on_corrupt=fallback ends as if whole."""
    words = ["launch/train.py", RECIPE, "--config.total_steps=12", "--config.checkpoint.save_every=3"]
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    Command([*words, f"--workdir={whole}"], tmp_path / "whole.log", cache).succeed()
    Command([*words, f"--workdir={workdir}", "--stop_at=9"], tmp_path / "first.log", cache).succeed()
    assert finished_steps(workdir) == [3, 6, 9]
    newest = workdir / "checkpoints/9"
    weights = max((p for p in files_of(newest) if "vitt.backbone" in str(p)), key=lambda p: p.stat().st_size)
    flip(weights, moments)
    stopped = Command([*words, f"--workdir={workdir}"], tmp_path / "stopped.log", cache)
    assert stopped.end() == 2
    said = stopped.printed.strip().splitlines()[-1]
    assert said.startswith("error: ") and weights.name in said and "--on_corrupt=fallback" in said, said
    assert finished_steps(workdir) == [3, 6, 9]
    told = Command([*words, f"--workdir={workdir}", "--on_corrupt=fallback"], tmp_path / "told.log", cache)
    assert "resumed from step 6" in told.succeed()
    assert_same_run(workdir, whole)
    assert (workdir / "damaged/9").is_dir() and json.loads((workdir / "config.json").read_text())
    record("corrupted checkpoint", phase="launch/train.py", injected=1, detected=1, accepted=0)
