"""Checkpoints that are not what was written are refused, by the name of the file."""

import errno
import json
import random
import shutil
import time

import jax
import numpy as np
import pytest

from eupe_jax.training import checkpoints, integrity
from eupe_jax.training.integrity import CHECKSUMS, CorruptCheckpoint
from tests.training.damaged import (
    MANIFEST,
    STATISTICS,
    cut,
    flip,
    make_checkpoints,
    make_run,
    make_state,
    remove,
    restored,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with checkpoints of steps 1 and 2."""
    return make_run(tmp_path_factory.mktemp("run"))


def test_every_damage_to_every_file_is_named(run, tmp_path):
    """No bit, no byte and no file of a checkpoint can change unseen, but for the time of its commit (more damage, to
    whole runs: tests/faults/test_corruption.py)."""
    step, moments = run / "checkpoints" / "2", random.Random(0)
    written_last = {integrity.COMMITTED, integrity.STEP_METADATA}
    files = sorted(p.relative_to(step) for p in step.rglob("*") if p.is_file() and p.name != integrity.COMMITTED)
    assert len(files) > 20
    for number, path in enumerate(files):
        for damage in (flip, (cut, remove)[number % 2]):
            copy = tmp_path / "copy"
            shutil.copytree(step, copy)
            damage(copy / path, moments)
            if str(path) in written_last and damage is flip:
                note = json.loads((step / path).read_text())
                (copy / path).write_text(json.dumps(note | {"item_handlers": {}}))
            with pytest.raises(CorruptCheckpoint, match=path.name):
                integrity.verify(checkpoints.absolute(copy))
            shutil.rmtree(copy)
    integrity.verify(checkpoints.absolute(step))


def test_a_damaged_checkpoint_stops_the_run_unless_asked_to_fall_back(run, tmp_path, caplog):
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    flip(max((workdir / "checkpoints/2/s.optimizer").rglob("d/*"), key=lambda p: p.stat().st_size), random.Random(1))
    with pytest.raises(CorruptCheckpoint, match=r"s.optimizer/.* other bytes.*with --on_corrupt=fallback"):
        restored(workdir)
    assert (workdir / "checkpoints/2").is_dir(), "nothing is touched"
    state = restored(workdir, fallback=True)
    assert int(state["step"]) == 1 and "put aside into" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, state["students"], make_state(1)["students"])
    assert (workdir / "damaged/2").is_dir() and not (workdir / "checkpoints/2").exists()
    saver = make_checkpoints(workdir)
    saver.save(2, make_state(2), STATISTICS, {}, MANIFEST)  # the step can be saved again
    saver.close()
    assert int(restored(workdir)["step"]) == 2


def test_where_none_is_intact_nothing_is_put_aside(run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    for step in (1, 2):
        remove(workdir / f"checkpoints/{step}/statistics/_METADATA", None)
    with pytest.raises(CorruptCheckpoint, match="checkpoints/2 .*_METADATA is missing; none is intact"):
        restored(workdir, fallback=True)
    assert (workdir / "checkpoints/2").is_dir() and not (workdir / "damaged").exists()
    assert restored(tmp_path / "new") is None


def test_what_is_loaded_alone_is_checked_alone(run, tmp_path):
    step = tmp_path / "2"
    shutil.copytree(run / "checkpoints/2", step)
    cut(step / "s.adapters/_METADATA", random.Random(2))
    step = checkpoints.absolute(step)
    found = checkpoints.restore_item(step, "s.backbone")
    written = make_state(2)["students"]["s"]["params"]["backbone"]
    np.testing.assert_array_equal(found["params"]["kernel"], written["kernel"])
    with pytest.raises(CorruptCheckpoint, match="s.adapters/_METADATA has"):
        checkpoints.restore_item(step, "s.adapters")
    (step / CHECKSUMS).unlink()
    with pytest.raises(CorruptCheckpoint, match="no checksums.json"):
        checkpoints.restore_item(step, "s.backbone")


def test_a_checkpoint_under_the_name_of_another_step_is_none(run, tmp_path):
    """Its files are whole, and not those of that step."""
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    shutil.rmtree(workdir / "checkpoints/2")
    shutil.copytree(workdir / "checkpoints/1", workdir / "checkpoints/2")
    with pytest.raises(CorruptCheckpoint, match="checkpoints/2 holds the checkpoint of step 1; bring its files back"):
        restored(workdir)
    assert int(restored(workdir, fallback=True)["step"]) == 1


def test_checksums_name_no_file_outside(run, tmp_path):
    step = tmp_path / "2"
    shutil.copytree(run / "checkpoints/2", step)
    held = json.loads((step / CHECKSUMS).read_text())
    held["files"] = {"../secret": {"size": 1, "sha256": ""}}
    held["sha256"] = integrity._digest({k: v for k, v in held.items() if k != "sha256"})
    (step / CHECKSUMS).write_text(json.dumps(held))
    with pytest.raises(CorruptCheckpoint, match="checksums.json is damaged"):
        integrity.verify(checkpoints.absolute(step))


def test_a_save_that_fails_in_the_background_is_told_at_the_next_step(tmp_path, monkeypatch):
    """And the checkpoints before it stay."""
    saver = make_checkpoints(tmp_path)
    saver.save(1, make_state(1), STATISTICS, {}, MANIFEST)
    saver.wait()

    def full(step):
        raise OSError(errno.ENOSPC, "No space left on device", str(step))

    monkeypatch.setattr(integrity, "seal", full)
    saver.save(2, make_state(2), STATISTICS, {}, MANIFEST)
    while saver.saving:
        time.sleep(0.01)
    with pytest.raises(OSError, match="checkpoints/2 cannot be written: .*No space left.*those before it are as they"):
        saver.check()
    saver.close()
    assert int(restored(tmp_path)["step"]) == 1
    monkeypatch.undo()
    saver = make_checkpoints(tmp_path)
    saver.save(2, make_state(2), STATISTICS, {}, MANIFEST)
    saver.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"], "no half save is left"
