"""A run that is killed and goes on with another number of devices or processes: the same loss curve."""

import contextlib
from pathlib import Path

import pytest

from eupe_jax.training.metrics import read_metrics
from tests.faults.commands import RECIPE, Command, finished_steps
from tests.launch.test_processes import free_port

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

STEPS = 24
FIELDS = {
    "total_steps": STEPS,
    "checkpoint.save_every": 2,
    "students.vitt.overrides.embed_dim": 128,  # large enough to be cut
    "teachers.proxy.overrides.embed_dim": 128,
    # half of what there is to compile
    **{f"augment.{name}_p": 0.0 for name in ("jitter", "grayscale", "blur", "solarize")},
}
MESHES = {8: {"fsdp": 2, "tensor": 2}, 4: {"fsdp": 4}, 2: {}}  # devices -> config.mesh


def start(workdir: Path, cache: Path, devices: int, processes: int = 1) -> list[Command]:
    """launch/train.py in so many processes, which have so many devices together."""
    fields = FIELDS | {f"mesh.{axis}": size for axis, size in MESHES[devices].items()}
    words = ["launch/train.py", RECIPE, f"--workdir={workdir}"]
    words += [f"--config.{name}={value}" for name, value in fields.items()]
    if processes > 1:
        words += [f"--coordinator=localhost:{free_port()}", f"--num_processes={processes}"]
    numbers = [[f"--process_id={i}"] if processes > 1 else [] for i in range(processes)]
    logs = [workdir.parent / f"{workdir.name}.{i}.log" for i in range(processes)]
    return [
        Command(words + number, log, cache, devices=devices // processes)
        for number, log in zip(numbers, logs, strict=True)
    ]


def train_until_killed(workdir: Path, cache: Path, saved: int, **machines: int) -> None:
    """Trains and kills all processes at some moment after step `saved` was saved."""
    started = start(workdir, cache, **machines)
    with contextlib.ExitStack() as killed:
        for each in started:
            killed.callback(each.kill)
        running = started[0].wait_for(lambda: max(finished_steps(workdir), default=0) >= saved)
    assert running, started[0].printed[-3000:]
    assert saved <= finished_steps(workdir)[-1] < STEPS, "it was to be killed on its way"


def train_to_the_end(workdir: Path, cache: Path, **machines: int) -> None:
    started = start(workdir, cache, **machines)
    with contextlib.ExitStack() as killed:
        for each in started:
            killed.callback(each.kill)
        for each in started:
            each.succeed()


@pytest.fixture(scope="module")
def reference(tmp_path_factory, cache):
    """The folder of the run that stays where it is: eight devices of one process."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    train_to_the_end(workdir, cache, devices=8)
    return workdir


def largest_difference(workdir: Path, reference: Path) -> float:
    """Of the losses of all steps, relative; every step stands in both once."""
    lines, expected = (read_metrics(folder / "metrics.jsonl") for folder in (workdir, reference))
    assert [line["step"] for line in lines] == [line["step"] for line in expected] == list(range(1, STEPS + 1))
    losses = [name for name in expected[0] if "loss" in name]
    assert "vitt/loss" in losses
    return max(
        abs(line[name] - wanted[name]) / abs(wanted[name])
        for line, wanted in zip(lines, expected, strict=True)
        for name in losses
    )


def test_eight_four_two_and_eight_devices(reference, tmp_path, cache, record):
    run, worst = tmp_path / "run", 0.0
    for saved, devices in ((4, 8), (10, 4), (16, 2)):
        train_until_killed(run, cache, saved, devices=devices)
    train_to_the_end(run, cache, devices=8)
    worst = largest_difference(run, reference)
    print(f"losses differ by {worst:.2g} at most")
    assert worst <= 1e-5
    record("other number of devices", phase="8 -> 4 -> 2 -> 8", injected=3, recovered=3, lost=0, worst_loss=worst)


def test_one_two_and_one_processes(reference, tmp_path, cache, record):
    run = tmp_path / "run"
    train_until_killed(run, cache, 6, devices=8)
    train_until_killed(run, cache, 14, devices=8, processes=2)
    train_to_the_end(run, cache, devices=8)
    worst = largest_difference(run, reference)
    print(f"losses differ by {worst:.2g} at most")
    assert worst <= 1e-5
    record("other number of processes", phase="1 -> 2 -> 1", injected=2, recovered=2, lost=0, worst_loss=worst)
