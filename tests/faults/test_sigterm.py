"""SIGTERM in every phase of a run: it leaves within the grace period with the status that asks to be run again, and
run again it ends as if nobody had ever told it to leave."""

import random
import shutil
import signal
import time

import pytest

from eupe_jax.training.preemption import GRACE_SECONDS, RESUME_ME
from tests.faults.commands import RECIPE, Command, assert_same_run, finished_steps, has_logged, logged_step
from tests.faults.test_kills import EVALUATE_EVERY, STEPS, Seen, Training

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]

AGAIN = "run the same command again"


def tell(command):
    """Sends the notice; seconds until the command has ended, with the status that asks to be run again."""
    command.process.send_signal(signal.SIGTERM)
    return left_in_time(command)


def left_in_time(command):
    """`tell`, once it has been told."""
    began = time.monotonic()
    status = command.end(GRACE_SECONDS + 30)
    seconds = time.monotonic() - began
    assert status == RESUME_ME, f"status {status}: {command.printed[-3000:]}"
    assert seconds < GRACE_SECONDS + 5
    return seconds


@pytest.fixture
def training(tmp_path, cache):
    return Training(tmp_path, cache, random.Random(0))


def test_training_in_every_phase(training, tmp_path, record):
    whole, run = tmp_path / "whole", tmp_path / "run"
    training.start(whole).succeed()
    seconds = {}

    def begin(condition):
        before = Seen(run)
        command = training.start(run)
        assert command.wait_for(lambda: condition(command, before)), command.printed[-3000:]
        return command, before

    # importing: nobody listens yet but launch/early.py
    command = training.start(run)
    command.wait_for(lambda: "libjax_common" in maps_of(command))
    seconds["start"] = tell(command)
    assert not run.exists()

    command, _ = begin(lambda command, _: "statistics:" in command.printed)
    seconds["statistics"] = tell(command)
    assert AGAIN in command.printed and not list(run.glob("statistics/*.safetensors"))

    command, _ = begin(lambda *_: (run / "statistics" / "proxy.safetensors").exists())
    seconds["loading of teachers"] = tell(command)
    assert AGAIN in command.printed and not (run / "config.json").exists()

    warm, training.cache = training.cache, tmp_path / "cold"
    command, _ = begin(lambda command, _: "compiling:" in command.printed)
    seconds["compilation"] = tell(command)
    assert AGAIN in command.printed and "compiling: 100%" not in command.printed and not (run / "config.json").exists()
    training.cache = warm

    command, before = begin(lambda command, before: has_logged(command, run, past=before.newest + 1))
    seconds["training"] = tell(command)
    assert f"is saved at step {finished_steps(run)[-1]}: {AGAIN}" in command.printed
    assert finished_steps(run)[-1] >= logged_step(run) > before.newest

    seconds["save"] = told_within("save", begin, run)
    seconds["evaluation"] = told_within("evaluation", begin, run)

    training.start(run).succeed()
    assert_same_run(run, whole)
    print("seconds from the notice to the end:", {phase: round(value, 2) for phase, value in seconds.items()})
    for phase in seconds:
        record("SIGTERM", phase=phase, injected=1, recovered=1, lost=0)


def maps_of(command):
    """Files that a process has mapped; "" once it has ended."""
    try:
        with open(f"/proc/{command.process.pid}/maps") as file:
            return file.read()
    except OSError:
        return ""


def told_within(phase, begin, run):
    """Tells a run in a phase that is over in no time: again, a save or an evaluation later, until it is hit."""
    for _ in range(STEPS // EVALUATE_EVERY):
        command, before = begin(lambda command, before: Seen(run).phase(before) == phase)
        aimed = Seen(run)
        command.process.send_signal(signal.SIGTERM)
        in_save = bool(aimed.saving & Seen(run).saving - before.saving)  # under way before the notice and after it
        seconds = left_in_time(command)
        newest = finished_steps(run)[-1]
        assert newest >= before.newest and newest < STEPS, "aimed too late"
        hit = in_save if phase == "save" else Seen(run).evaluating
        if hit:
            return seconds
    raise AssertionError(f"no notice came within {phase}")


def test_training_that_logs_now_and_then(tmp_path, cache, record):
    """Told between two lines of metrics, it carries over what stands in neither: no line changes."""
    fields = [f"--config.{name}={value}" for name, value in {"total_steps": 60, "log_every": 7}.items()]

    def start(workdir, *flags):
        words = ["launch/train.py", RECIPE, f"--workdir={workdir}", *fields, "--config.checkpoint.save_every=5", *flags]
        return Command(words, tmp_path / f"{workdir.name}.log", cache)

    whole, run = tmp_path / "whole", tmp_path / "run"
    start(whole).succeed()
    between = 0
    while not between:
        command = start(run)
        assert command.wait_for(lambda command=command: has_logged(command, run, past=0)), command.printed[-3000:]
        tell(command)
        between += finished_steps(run)[-1] % 7 != 0
    start(run).succeed()
    assert_same_run(run, whole)
    record("SIGTERM", phase="training, between two lines of metrics", injected=1, recovered=1, lost=0)


def test_other_commands(tmp_path, cache, record):
    """Statistics, a pack and a feature cache: done again, or gone on with."""
    out = {name: tmp_path / name for name in ("statistics", "pack", "precompute")}
    source = ["--source=synthetic", "--option=size=256", "--option=count=300", "--shards=30", "--max_side=200"]
    commands = {
        "statistics": ["launch/measure_statistics.py", RECIPE, "--config.statistics_steps=60"],
        "pack": ["launch/pack.py", *source, "--workers=2"],
        "precompute": ["launch/precompute.py", RECIPE, "--views=6", "--shards=12", "--precision=int8"],
    }
    started = {
        "statistics": lambda command: "statistics:  " in command.printed,
        "pack": lambda command: list(out["pack"].glob("*.array_record")),
        "precompute": lambda command: list(out["precompute"].glob("*.array_record")),
    }
    for name, words in commands.items():
        Command([*words, f"--out={out[name]}"], tmp_path / "log", cache).succeed()
        expected = contents(out[name])
        shutil.rmtree(out[name])
        command = Command([*words, f"--out={out[name]}"], tmp_path / "log", cache)
        assert command.wait_for(lambda name=name, command=command: started[name](command)), command.printed[-3000:]
        tell(command)
        assert AGAIN in command.printed and contents(out[name]) != expected
        Command([*words, f"--out={out[name]}"], tmp_path / "log", cache).succeed()
        assert contents(out[name]) == expected
        phase = name if name == "statistics" else f"launch/{name}.py"
        record("SIGTERM", phase=phase, injected=1, recovered=1, lost=0)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
