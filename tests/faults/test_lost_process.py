"""One of two processes is lost or told to leave: the other one ends within a bounded time, says why, and both go on."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from eupe_jax.training.preemption import GRACE_SECONDS, RESUME_ME
from tests.faults.commands import RECIPE, Command, assert_same_run, finished_steps, has_logged
from tests.launch.test_commands import ROOT
from tests.launch.test_processes import free_port

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]

STEPS, LOST_AFTER = 48, 20
AGAIN = "run the same command again"
FIELDS = {
    "total_steps": STEPS,
    "checkpoint.save_every": 4,
    "mesh.fsdp": 2,
    # half of what there is to compile
    **{f"augment.{name}_p": 0.0 for name in ("jitter", "grayscale", "blur", "solarize")},
}


PEER = """
import pathlib, sys, time
from eupe_jax.training import distributed
from eupe_jax.training.preemption import Preempted, Preemption
from launch import cli

port, number, phase, ready = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], pathlib.Path(sys.argv[4])


def main():
    with Preemption() as preemption:
        distributed.join(f"localhost:{port}", 2, number, lost_after=20)
        preemption.joined()
        import jax.numpy as jnp
        from jax.experimental.multihost_utils import process_allgather

        process_allgather(jnp.ones(4))
        ready.touch()
        if phase == "compilation":
            time.sleep(600)
        with preemption.something_to_save():
            step = 0
            while not preemption.requested(step):
                process_allgather(jnp.ones(4))
                step += 1
                time.sleep(0.02)
            raise Preempted(f"saved at step {step}")


sys.argv[1:] = []
cli.run(main)
"""


@pytest.mark.parametrize(
    ("phase", "number", "victim"),
    [
        ("training", signal.SIGKILL, 0),
        ("training", signal.SIGKILL, 1),
        ("training", signal.SIGSTOP, 1),
        ("compilation", signal.SIGKILL, 1),
        ("training", signal.SIGTERM, 0),
        ("compilation", signal.SIGTERM, 1),
    ],
)
def test_two_bare_processes(phase, number, victim, tmp_path, record):
    """What ends them, without a run around it: collectives that fail, JAX's own heartbeats, its preemption service."""
    port, ready = free_port(), [tmp_path / f"ready{i}" for i in range(2)]
    started = []
    for i in range(2):
        with open(tmp_path / f"{i}.log", "w") as log:
            words = [sys.executable, "-c", PEER, str(port), str(i), phase, str(ready[i])]
            environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
            started.append(subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT))
    printed = lambda i: (tmp_path / f"{i}.log").read_text(errors="replace")[-4000:]  # noqa: E731
    try:
        end = time.monotonic() + 200
        while not all(path.exists() for path in ready):
            assert time.monotonic() < end, printed(0) + printed(1)
            time.sleep(0.05)
        began = time.monotonic()
        started[victim].send_signal(number)
        for i in range(2) if number == signal.SIGTERM else [1 - victim]:
            assert started[i].wait(100) == RESUME_ME, printed(i)
            assert AGAIN in printed(i)
        seconds = time.monotonic() - began
    finally:
        for process in started:
            process.kill()
            process.wait()
    print(f"{phase}, {number.name}: {seconds:.1f} s")
    if number == signal.SIGTERM:
        assert seconds < GRACE_SECONDS + 5
        record("SIGTERM", phase=f"{phase}, one of two processes", injected=1, recovered=1, lost=0)
    else:
        assert seconds < 20 + 20
        kind = {signal.SIGKILL: "lost process", signal.SIGSTOP: "frozen process"}[number]
        record(kind, phase=f"{phase}, one of two", injected=1, detected=1, accepted=0)


def test_an_abort_ends_the_process_whatever_keeps_python():
    """A thread of C aborts while the main thread stays in compiled code, and holds the interpreter."""
    program = """
import ctypes, sys
from eupe_jax.training import distributed

distributed._explain_aborts()
libc, held, thread = ctypes.CDLL(None), ctypes.PyDLL(None), ctypes.c_ulong()
sys.setswitchinterval(1000)
held.pthread_create(ctypes.byref(thread), None, libc.abort, None)
while True:
    held.sleep(100)
"""
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert process.returncode == -signal.SIGALRM, process.stderr


class Pair:
    """launch/train.py in two processes with a device each."""

    def __init__(self, workdir, cache):
        words = ["launch/train.py", RECIPE, f"--workdir={workdir}", f"--lost_after={LOST_AFTER}", "--num_processes=2"]
        words += [f"--config.{name}={value}" for name, value in FIELDS.items()]
        words.append(f"--coordinator=localhost:{free_port()}")
        self.workdir, before = workdir, max(finished_steps(workdir), default=0)
        self.each = [
            Command([*words, f"--process_id={i}"], workdir.parent / f"{workdir.name}.{i}.log", cache) for i in range(2)
        ]
        self.in_steps = lambda: has_logged(self.each[0], workdir, past=before + 1)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for command in self.each:
            with contextlib.suppress(ProcessLookupError):
                command.process.send_signal(signal.SIGCONT)
            command.kill()

    def wait_for(self, happened):
        assert self.each[0].wait_for(happened), self.each[0].printed[-3000:]

    def succeed(self):
        for command in self.each:
            command.succeed()

    def inject(self, number, victim):
        """Sends a signal to one process; seconds until the others have ended."""
        began = time.monotonic()
        self.each[victim].process.send_signal(number)
        for i, command in enumerate(self.each):
            if number == signal.SIGTERM or i != victim:
                status = command.end(LOST_AFTER + 60)
                assert status == RESUME_ME, f"process {i}: status {status}: {command.printed[-4000:]}"
                assert AGAIN in command.printed
        return time.monotonic() - began


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("pair") / "whole"
    with Pair(workdir, cache) as pair:
        pair.succeed()
    return workdir


@pytest.mark.parametrize("victim", [0, 1], ids=["the first process", "another process"])
def test_killed_or_frozen(victim, whole, tmp_path, cache, record):
    run, seconds = tmp_path / "run", {}
    for kind, number in {"lost process": signal.SIGKILL, "frozen process": signal.SIGSTOP}.items():
        with Pair(run, cache) as pair:
            pair.wait_for(pair.in_steps)
            seconds[kind] = pair.inject(number, victim)
    with Pair(run, cache) as pair:
        pair.succeed()
    assert_same_run(run, whole)
    print(f"seconds until the other process had ended: {seconds}")
    assert seconds["lost process"] < LOST_AFTER + 10 and seconds["frozen process"] < LOST_AFTER + 20
    phase = f"training, {'the first' if victim == 0 else 'another'} of two"
    for kind in seconds:
        record(kind, phase=phase, injected=1, recovered=1, lost=0)


def test_one_of_two_is_told_to_leave(whole, tmp_path, cache, record):
    run, cold = tmp_path / "run", tmp_path / "cold"
    told = {
        "statistics": lambda pair: "statistics:" in pair.each[0].printed,
        "compilation": lambda pair: "compiling:" in pair.each[0].printed,
        "training": lambda pair: pair.in_steps(),
    }
    for victim, (phase, condition) in enumerate(told.items()):
        with Pair(run, cold if phase == "compilation" else cache) as pair:
            pair.wait_for(lambda pair=pair, condition=condition: condition(pair))
            seconds = pair.inject(signal.SIGTERM, victim % 2)
            assert seconds < GRACE_SECONDS + 5
        print(f"{phase}: both had ended after {seconds:.1f} s")
        assert bool(finished_steps(run)) == (phase == "training")
        record("SIGTERM", phase=f"{phase}, one of two processes", injected=1, recovered=1, lost=0)
    with Pair(run, cache) as pair:
        pair.succeed()
    assert_same_run(run, whole)
