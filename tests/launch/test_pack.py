"""launch/pack.py as a user runs it: killed at any moment it goes on, and mistakes end in one line."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.data.test_loader import session_is_alive
from tests.launch.test_commands import ROOT, assert_one_line, run

# 300 pictures of 256 x 256 that have to be encoded, in 30 shards: seconds of work with something to lose.
SOURCE = ["--source=synthetic", "--option=size=256", "--option=count=300", "--shards=30", "--max_side=200"]


def command(out, workers=2):
    return [sys.executable, "launch/pack.py", *SOURCE, f"--out={out}", f"--workers={workers}"]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def finish(out, workers=2):
    result = run(*command(out, workers)[1:])
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    assert "300 images (300 encoded anew)" in finish(out).stdout
    return contents(out)


def wait_for_the_end_of(session):
    """Nothing that the killed command began stays behind."""
    deadline = time.time() + 30
    while session_is_alive(session):
        assert time.time() < deadline
        time.sleep(0.05)


def test_killed_and_run_again_it_makes_the_same_bytes(uninterrupted, tmp_path):
    """Killed when the first shards are there, and when half of them are; finished by another number of workers."""
    out = tmp_path / "out"
    for shards in (1, 15):
        process = subprocess.Popen(command(out), cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
        while len(list(out.glob("*.array_record"))) < shards:
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        wait_for_the_end_of(process.pid)
        assert not (out / "manifest.json").exists() and list(out.glob(".pack/*.json"))
    finished = {p.name: p.stat().st_ino for p in out.glob("*.array_record")}
    noted = {p.name.removesuffix(".json") for p in out.glob(".pack/*.array_record.json")}
    finish(out, workers=1)
    assert contents(out) == uninterrupted
    assert {name: (out / name).stat().st_ino for name in noted} == {name: finished[name] for name in noted}


@pytest.mark.slow
def test_an_interrupt_stops_the_workers_and_keeps_what_is_finished(uninterrupted, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(command(out), cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    while not list(out.glob("*.array_record")):
        assert process.poll() is None
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process
    assert process.wait(timeout=60) != 0
    assert not list(out.glob(".pack/*.partial")) and not (out / "manifest.json").exists()
    finish(out, workers=1)
    assert contents(out) == uninterrupted


def test_verify_and_bad_input(uninterrupted, tmp_path):
    out = tmp_path / "out"
    for name, data in uninterrupted.items():
        out.mkdir(exist_ok=True)
        (out / name).write_bytes(data)
    fine = run("launch/pack.py", "--verify", f"--out={out}", "--workers=1")
    assert fine.returncode == 0 and "as its manifest says" in fine.stdout
    victim = out / "images-00003-of-00030.array_record"
    victim.write_bytes(victim.read_bytes()[:-1])
    damaged = run("launch/pack.py", "--verify", f"--out={out}", "--workers=1")
    assert_one_line(damaged, "findings", "run the pack again")
    assert victim.name in damaged.stdout
    for flags, words in (
        ([], ["--out is missing"]),
        (["--out=gs://bucket/x"], ["gs://bucket/x", "mounted"]),
        ([f"--out={out}", "--path=/nowhere"], ["/nowhere"]),
        ([f"--out={out}", "--source=photos", "--option=size"], ["'size'", "NAME=VALUE"]),
        ([f"--out={out}", *SOURCE[:3], "--shards=7"], ["another pack", "shard_count=30 (now 7)"]),
    ):
        assert_one_line(run("launch/pack.py", *flags), *words)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_pack_goes_on_elsewhere_or_later(tmp_path):
    """On a file system of 2 MB, where this machine lets one be made."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def on_small_disk(script):
        mounted = f"mount -t tmpfs -o size=2m none {disk} && {{ {script}; }}"
        command = ["unshare", "-rm", "sh", "-c", mounted]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)

    if on_small_disk("true").returncode:
        pytest.skip("no file system can be mounted here")
    pack = " ".join([*command(disk / "out"), "2>&1 | tail -n 1"])
    listing = f"ls -A {disk}/out {disk}/out/.pack"
    result = on_small_disk(f"{pack}; {listing}; mount -o remount,size=200m {disk}; {pack}; ls -A {disk}/out")
    first, _, rest = result.stdout.partition("\n")
    assert first.startswith("error:") and "disk is full" in first and "same command again" in first, result
    left, _, after = rest.partition("300 images")
    assert ".partial" not in left and "manifest.json" not in left
    assert "manifest.json" in after and after.count(".array_record") == 30 and ".pack" not in after
