"""Checkpoints that are not what was written are refused, by the name of the file."""

import errno
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from eupe_jax.training import checkpoints, integrity, preemption, workdirs
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

ROOT = Path(__file__).parents[2]


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


def test_the_newest_is_taken_or_refused_but_never_passed_over(run, tmp_path):
    """By whatever loads from a workdir, a folder of checkpoints or a step directory."""
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    shutil.copytree(workdir / "checkpoints/2", workdir / "checkpoints/10.orbax-checkpoint-tmp")  # of a save under way
    assert checkpoints.step_directory(workdir).name == "2"
    for lost in (checkpoints.MANIFEST, integrity.STEP_METADATA, CHECKSUMS):
        path = workdir / "checkpoints/2" / lost
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        for given in (workdir, workdir / "checkpoints", workdir / "checkpoints/2"):
            if lost == CHECKSUMS and given.name == "2":
                continue  # nothing is left that says what it was
            with pytest.raises(CorruptCheckpoint, match="checkpoints/2 .*(is missing|has no checksums.json)"):
                checkpoints.read_manifest(given)


@pytest.mark.parametrize("name", [CHECKSUMS, integrity.STEP_METADATA, "s.optimizer/_METADATA"])
def test_a_file_that_cannot_be_read_is_not_damaged(run, tmp_path, monkeypatch, name):
    """And no checkpoint is put aside for it."""
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    unread = str(workdir / "checkpoints/2" / name)

    def failing(kind):
        opened = kind.open

        def open_or_fail(self, *args, **kwargs):
            if os.fspath(self) == unread:
                raise OSError(errno.EIO, "Input/output error")
            return opened(self, *args, **kwargs)

        return open_or_fail

    kind = type(checkpoints.absolute(workdir))
    monkeypatch.setattr(kind, "open", failing(kind))
    monkeypatch.setattr(kind, "read_text", lambda self, *_: self.open().read())
    with pytest.raises(OSError, match=f"Input/output error.*{name}"):
        restored(workdir, fallback=True)
    monkeypatch.undo()
    assert not (workdir / "damaged").exists() and int(restored(workdir)["step"]) == 2


def test_what_is_put_aside_takes_no_name_that_is_taken(run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    for name in ("2", "2.2", "20.7"):
        (workdir / "damaged" / name).mkdir(parents=True)
    cut(workdir / "checkpoints/2/s.adapters/_METADATA", random.Random(3))
    assert int(restored(workdir, fallback=True)["step"]) == 1
    assert {path.name for path in (workdir / "damaged").iterdir()} == {"2", "2.2", "2.3", "20.7"}


def test_in_buckets_nothing_is_moved(tmp_path):
    saver = make_checkpoints(tmp_path)
    saver.directory = epath.Path("gs://bucket/run/checkpoints")
    with pytest.raises(ValueError, match="--on_corrupt=fallback moves folders"):
        saver.restore_latest(make_state(0), fallback=True)
    saver.close()
    with pytest.raises(ValueError, match="--fresh moves folders.*gs://bucket/run"):
        workdirs.set_aside(epath.Path("gs://bucket/run"))


def test_a_checkpoint_without_the_note_of_its_step_is_not_sealed(run, tmp_path):
    step = checkpoints.absolute(tmp_path / "2")
    shutil.copytree(run / "checkpoints/2", step)
    (step / integrity.STEP_METADATA).write_text("[]")
    with pytest.raises(ValueError, match="2/_CHECKPOINT_METADATA is not what Orbax writes"):
        integrity.seal(step)
    with pytest.raises(CorruptCheckpoint, match="_CHECKPOINT_METADATA says other things"):
        integrity.verify(step)


JOIN = """
import errno, os, sys, jax
process, address, workdir = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, 2, process)
from eupe_jax.training import checkpoints, integrity, preemption
from tests.training.damaged import MANIFEST, make_checkpoints
"""

LOOK = """
saver = make_checkpoints(workdir)
print("newest", saver.latest_step)
for kind in (OSError, integrity.CorruptCheckpoint):
    def problem(step, items):
        raise OSError("unread")
    integrity._problem = problem if kind is OSError else lambda step, items: "changed"
    try:
        integrity.verify_on_all_hosts(saver.directory / "2")
    except (OSError, ValueError) as error:
        print(type(error).__name__, error)
saver.close()
"""

SAVE = """
import numpy as np, time
checkpoints.SAVE_SECONDS_TOGETHER = 4
everywhere = jax.sharding.NamedSharding(jax.make_mesh((2,), ("data",)), jax.sharding.PartitionSpec("data"))
array = jax.make_array_from_callback((4,), everywhere, lambda index: np.ones(4, np.float32)[index])
student = {"params": {"backbone": {"w": array}, "adapters": {"w": array}}, "buffers": {}, "optimizer": {"mu": array}}
saver = make_checkpoints(workdir)
def save(step):
    saver.save(step, {"students": {"s": student}}, {"teacher": {"mean": np.ones(3)}}, {}, MANIFEST)
save(1)
saver.wait()
def full(step):
    raise OSError(errno.ENOSPC, "No space left on device")
integrity.seal = full  # the first host's part
save(2)
end = time.monotonic() + 40
try:
    while time.monotonic() < end:
        saver.check()  # as after every step
        time.sleep(0.05)
except (OSError, jax.errors.JaxRuntimeError) as error:
    print("another is lost" if preemption.is_lost(error) else error, flush=True)
time.sleep(3 * (process == 0))  # it keeps the service that the other one asks
os._exit(0)  # JAX would wait for the other one
"""


def two_hosts(script, workdirs):
    """What two processes of one run print, each in its workdir."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("XLA_")} | {"JAX_PLATFORMS": "cpu"}
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN + script, str(process), address, str(workdir)], cwd=ROOT, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for process, workdir in enumerate(workdirs)
    ]  # fmt: skip
    try:
        ended = [host.communicate(timeout=60) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    for host, (_, errors) in zip(hosts, ended, strict=True):
        assert host.returncode == 0, errors[-3000:]
    return [[line for line in printed.splitlines() if not line.startswith("[Gloo]")] for printed, _ in ended]


@pytest.mark.slow
def test_hosts_see_the_checkpoints_that_the_first_one_sees(run, tmp_path):
    """What a network disk showed the second one a while ago may be older; and they agree on what is wrong."""
    behind = tmp_path / "behind"
    shutil.copytree(run, behind)
    shutil.rmtree(behind / "checkpoints/2")
    for printed in two_hosts(LOOK, (run, behind)):
        assert printed == ["newest 2", "OSError unread", "CorruptCheckpoint changed"]


@pytest.mark.slow
def test_a_save_that_fails_on_one_host_is_told_by_that_host(tmp_path):
    """Without another save: its disk is what has to be mended, and the other one only misses it."""
    (failed,), (other,) = two_hosts(SAVE, (tmp_path, tmp_path))
    assert "checkpoints/2 cannot be written: [Errno 28] No space left on device; those before it are as" in failed
    assert other == "another is lost"


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


def test_what_went_wrong_first_is_told_and_not_that_others_waited_in_vain(tmp_path):
    """With several hosts a save that fails on one makes all wait: where it failed, that is what a person has to read;
    elsewhere it is another host that is missing."""
    saver = make_checkpoints(tmp_path)
    gone = jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out. Id: set_value_start")
    with pytest.raises(OSError, match="cannot be written: .*No space left") as raised, saver._explained():
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise gone
    assert not preemption.is_lost(raised.value)
    with pytest.raises(jax.errors.JaxRuntimeError) as raised, saver._explained():
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out. Id: async_write_complete")
    assert preemption.is_lost(raised.value)
    saver.close()
