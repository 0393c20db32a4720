"""A run that is killed and goes on with another number of devices or processes: the same loss curve."""

import contextlib
from pathlib import Path

import pytest

from eupe_jax.training.metrics import read_metrics
from tests.faults.commands import Command, finished_steps
from tests.launch.test_processes import free_port

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

STEPS = 24
MESHES = {8: {"fsdp": 2, "tensor": 2}, 4: {"fsdp": 4}, 2: {}}  # devices -> config.mesh

# Arrays large enough to be cut; blocks that count (at the published LayerScale a fresh one is invisible); and half of
# what there would be to compile.
RECIPE = f"""
from configs import stage2_vitt


def get_config():
    config = stage2_vitt.get_config("runlocal")
    with config.unlocked():
        for encoder in (config.students.vitt, config.teachers.proxy):
            encoder.overrides.embed_dim, encoder.overrides.layerscale_init = 128, 0.5
    for name in ("jitter", "grayscale", "blur", "solarize"):
        config.augment[name + "_p"] = 0.0
    config.total_steps, config.checkpoint.save_every = {STEPS}, 2
    return config
"""


def recipe(folder: Path) -> str:
    """The flag that names it."""
    (folder / "recipe.py").write_text(RECIPE)
    return f"--config={folder / 'recipe.py'}"


def start(workdir: Path, statistics: Path, cache: Path, devices: int, processes: int = 1) -> list[Command]:
    """launch/train.py in so many processes, which have so many devices together."""
    words = ["launch/train.py", recipe(workdir.parent), f"--workdir={workdir}", f"--config.statistics={statistics}"]
    words += [f"--config.mesh.{axis}={size}" for axis, size in MESHES[devices].items()]
    if processes > 1:
        words += [f"--coordinator=localhost:{free_port()}", f"--num_processes={processes}"]
    numbers = [[f"--process_id={i}"] if processes > 1 else [] for i in range(processes)]
    logs = [workdir.parent / f"{workdir.name}.{i}.log" for i in range(processes)]
    return [
        Command(words + number, log, cache, devices=devices // processes)
        for number, log in zip(numbers, logs, strict=True)
    ]


def train_until_killed(saved: int, workdir: Path, *args: Path, **machines: int) -> None:
    """Trains and kills all processes at some moment after step `saved` was saved."""
    started = start(workdir, *args, **machines)
    with contextlib.ExitStack() as killed:
        for each in started:
            killed.callback(each.kill)
        running = started[0].wait_for(lambda: max(finished_steps(workdir), default=0) >= saved)
    assert running, started[0].printed[-3000:]
    assert saved <= finished_steps(workdir)[-1] < STEPS, "it was to be killed on its way"


def train_to_the_end(workdir: Path, *args: Path, **machines: int) -> None:
    started = start(workdir, *args, **machines)
    with contextlib.ExitStack() as killed:
        for each in started:
            killed.callback(each.kill)
        for each in started:
            each.succeed()


@pytest.fixture(scope="module")
def statistics(tmp_path_factory, cache):
    """Folder of the statistics of all runs."""
    folder = tmp_path_factory.mktemp("statistics")
    words = ["launch/measure_statistics.py", recipe(folder), f"--out={folder / 'out'}"]
    Command(words, folder / "log", cache, devices=8).succeed()
    return folder / "out"


@pytest.fixture(scope="module")
def reference(tmp_path_factory, statistics, cache):
    """The folder of the run that stays where it is: eight devices of one process."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    train_to_the_end(workdir, statistics, cache, devices=8)
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


def test_eight_four_two_and_eight_devices(reference, statistics, tmp_path, cache, record):
    run = tmp_path / "run"
    for saved, devices in ((4, 8), (10, 4), (16, 2)):
        train_until_killed(saved, run, statistics, cache, devices=devices)
    train_to_the_end(run, statistics, cache, devices=8)
    worst = largest_difference(run, reference)
    print(f"losses differ by {worst:.2g} at most")
    assert worst <= 1e-5
    record("other number of devices", phase="8 -> 4 -> 2 -> 8", injected=3, recovered=3, lost=0, worst_loss=worst)


def test_one_two_and_one_processes(reference, statistics, tmp_path, cache, record):
    run = tmp_path / "run"
    train_until_killed(6, run, statistics, cache, devices=8)
    train_until_killed(14, run, statistics, cache, devices=8, processes=2)
    train_to_the_end(run, statistics, cache, devices=8)
    worst = largest_difference(run, reference)
    print(f"losses differ by {worst:.2g} at most")
    assert worst <= 1e-5
    record("other number of processes", phase="1 -> 2 -> 1", injected=2, recovered=2, lost=0, worst_loss=worst)
