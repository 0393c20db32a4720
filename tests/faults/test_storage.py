"""A disk that fills, a folder that turns read-only, permission that is lost and clocks that jump, while a run writes:
one line says where and why, no finished checkpoint is lost, and the same command goes on once the cause is gone."""

import contextlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from eupe_jax.training import checkpoints, integrity
from tests.faults.commands import RECIPE, Command, assert_same_run, finished_steps, has_logged

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]

HERE = Path(__file__).parent
STEPS = 60
WORDS = [RECIPE, f"--config.total_steps={STEPS}", "--config.checkpoint.save_every=4"]
TRAIN = ["launch/train.py", *WORDS]
MEGABYTE = 1 << 20
BAD_INPUT = 2
HOUR = 3600  # seconds
FULL, READ_ONLY, DENIED = "No space left on device", "Read-only file system", "Permission denied"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """A run that met nothing."""
    folder = tmp_path_factory.mktemp("whole")
    Command([*TRAIN, f"--workdir={folder / 'run'}"], folder / "log", cache).succeed()
    return folder / "run"


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A small file system of its own."""
    folder = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "eupe_jax_test", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@contextlib.contextmanager
def filled(disk: Path, left: int) -> Iterator[None]:
    """With a file there that leaves so many bytes free."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(MEGABYTE)):
            pass
    os.truncate(filler, max(filler.stat().st_size - left, 0))
    try:
        yield
    finally:
        filler.unlink()


class Run:
    """launch/train.py in one folder, again and again."""

    def __init__(self, folder: Path, workdir: Path, cache: Path) -> None:
        self.folder, self.workdir, self.cache, self.runs = folder, workdir, cache, 0

    def start(self, *flags: str, through: str = "") -> Command:
        """through: a file here that starts the command its own way."""
        self.runs += 1
        words = [HERE / through] if through else []
        words += [*TRAIN, f"--workdir={self.workdir}", *flags]
        return Command(words, self.folder / f"{self.runs}.log", self.cache, PYTHONPATH=".")

    def come_further(self, command: Command, steps: int = 5) -> None:
        """Waits until this very process has done so many steps and finished a checkpoint."""
        began = max(finished_steps(self.workdir), default=0)
        assert command.wait_for(
            lambda: (
                has_logged(command, self.workdir, began + steps)
                and max(finished_steps(self.workdir), default=0) > began
            )
        ), command.printed[-3000:]

    def fails(self, command: Command, *causes: str) -> str:
        """The one line that it ends with, of one of these causes; what was saved before is as it was."""
        held = finished_steps(self.workdir) if self.workdir.exists() else []
        status, printed = command.end(), command.printed
        assert status == BAD_INPUT, f"{status}: {printed[-3000:]}"
        assert not re.search(r'File "[^"]*/(eupe_jax|launch)/', printed), "a stack of ours"  # threads of Orbax's may
        errors = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, printed[-3000:]
        assert str(self.workdir) in errors[0] and any(cause in errors[0] for cause in causes), errors[0]
        if held:
            assert finished_steps(self.workdir)[-1] >= held[-1]
            integrity.verify(checkpoints.step_directory(self.workdir))
        return errors[0]


def test_a_disk_that_fills(whole, disk, tmp_path, cache, record):
    """Before the first file, in statistics, in metrics and in saves of one run after another on one disk."""
    run = Run(tmp_path, disk / "run", cache)
    said = {}
    for phase, left in (("start", 0), ("statistics", 4096)):
        with filled(disk, left):
            said[phase] = run.fails(run.start(), FULL)
    for phase, left in (("metrics", 0), ("save", 96 << 10), ("save ", 256 << 10)):
        command = run.start()
        run.come_further(command)
        with filled(disk, left):
            said[phase] = run.fails(command, FULL)
    assert "checkpoints/" in said["save"] + said["save "], said
    run.start().succeed()
    assert_same_run(run.workdir, whole)
    assert not [path.name for path in (run.workdir / "checkpoints").iterdir() if not path.name.isdigit()], "half a save"
    for line in said.values():
        print(line)
    for phase in said:
        record("full disk", phase=phase.strip(), injected=1, recovered=1, lost=0)


def test_a_folder_that_turns_read_only(whole, disk, tmp_path, cache, record):
    run = Run(tmp_path, disk / "read_only", cache)
    run.start("--stop_at=10").succeed()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    try:
        line = run.fails(run.start(), READ_ONLY)
    finally:
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    run.start().succeed()
    assert_same_run(run.workdir, whole)
    print(line)
    record("read-only folder", phase="start", injected=1, recovered=1, lost=0)


def test_permission_that_is_lost(whole, tmp_path, cache, record):
    """Of the folder at the start, and of the folder of checkpoints while the run goes on."""
    run = Run(tmp_path, tmp_path / "run", cache)
    run.workdir.mkdir(mode=0o500)
    line = run.fails(run.start(through="as_owner.py"), DENIED)
    run.workdir.chmod(0o700)
    print(line)
    command = run.start(through="as_owner.py")
    run.come_further(command)
    (run.workdir / "checkpoints").chmod(0o500)
    line = run.fails(command, DENIED)
    (run.workdir / "checkpoints").chmod(0o700)
    assert "checkpoints/" in line
    run.start(through="as_owner.py").succeed()
    assert_same_run(run.workdir, whole)
    print(line)
    for phase in ("start", "save"):
        record("permission lost", phase=phase, injected=1, recovered=1, lost=0)


def clocks_of(workdir: Path, step: int) -> list[float]:
    """Seconds: when a save began and when it ended, by the clock of the process that made it."""
    note = json.loads((workdir / f"checkpoints/{step}" / integrity.STEP_METADATA).read_text())
    return [note[name] / 1e9 for name in integrity.TIMESTAMPS]


def test_clocks_that_jump(whole, tmp_path, cache, record):
    """While it runs, and in the times of the files that it goes on from: newer ones are older, or of no year at all.

    Orbax waits by the clock of the day: a save that a jump falls into may fail, and is told as one that failed.
    """
    run = Run(tmp_path, tmp_path / "run", cache)
    failed = 0
    for _ in range(2):
        command = run.start("--stop_at=30", through="jumping_clock.py")
        if command.end() == 0:
            break
        failed += 1
        print(run.fails(command, "cannot be written"))
    spans = [clocks_of(run.workdir, step) for step in finished_steps(run.workdir)]
    in_saves = sum(abs(end - begin) > HOUR for begin, end in spans)
    begins = [begin for begin, _ in spans]
    assert failed or in_saves or max(begins) - min(begins) > HOUR, "no clock jumped"
    print(f"{failed} save(s) failed; a clock jumped in {in_saves} of the {len(spans)} that are there")
    if len(finished_steps(run.workdir)) < 3:
        run.start("--stop_at=30").succeed()
    steps = finished_steps(run.workdir)
    for age, step in enumerate(steps):  # the newest is the oldest, and one is of the year 316889355
        note = run.workdir / f"checkpoints/{step}" / integrity.STEP_METADATA
        when = 10**25 if age == 1 else -(10**18) * (age + 1)
        stamps = dict.fromkeys(integrity.TIMESTAMPS, when)
        note.write_text(json.dumps(json.loads(note.read_text()) | stamps))
        for path in (run.workdir / f"checkpoints/{step}").rglob("*"):
            os.utime(path, (10**9 - age * 10**8,) * 2)
    for path in run.workdir.glob("*.json*"):
        os.utime(path, (4 * 10**9,) * 2)
    assert f"resumed from step {steps[-1]}" in run.start().succeed()
    assert finished_steps(run.workdir)[-3:] == [STEPS - 8, STEPS - 4, STEPS]
    assert_same_run(run.workdir, whole)
    for phase in ("training", "resume"):
        record("clock jumps", phase=phase, injected=1, recovered=1, lost=0)
