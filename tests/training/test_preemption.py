"""SIGTERM: a run leaves in time with the status that asks to be resumed, also where Python runs no handlers."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from eupe_jax.training.preemption import RESUME_ME, Preempted, Preemption, is_lost


def notice():
    os.kill(os.getpid(), signal.SIGTERM)


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_the_loop_hears_of_it_and_leaves_by_itself():
    left = []
    before = signal.getsignal(signal.SIGTERM)
    with Preemption(grace=60, leave=left.append) as preemption, preemption.something_to_save():
        assert not preemption.requested(1)
        notice()
        assert until(lambda: preemption.requested(2))
        time.sleep(0.05)
        assert not left
    assert signal.getsignal(signal.SIGTERM) == before


def test_with_nothing_to_save_it_leaves_at_once():
    left = []
    with Preemption(grace=60, leave=left.append):
        assert not left
        notice()
        assert until(lambda: left)
    assert left == [RESUME_ME]


def test_a_notice_from_before_counts_when_nothing_can_be_lost_any_more():
    left = []
    with Preemption(grace=60, leave=left.append) as preemption, preemption.something_to_save():
        notice()
        assert until(lambda: preemption.requested(1)) and not left
        with preemption.nothing_to_save():
            assert until(lambda: left)


def test_a_run_that_has_saved_and_leaves_closes_in_peace():
    left = []
    with pytest.raises(Preempted), Preemption(grace=60, leave=left.append) as preemption:
        with preemption.something_to_save():
            notice()
            assert until(lambda: preemption.requested(1))
            raise Preempted("saved")
    assert not left


def test_a_loop_that_does_not_come_by_ends_with_the_grace_period():
    left = []
    with Preemption(grace=0.3, leave=left.append) as preemption, preemption.something_to_save():
        notice()
        began = time.monotonic()
        assert until(lambda: left)
        assert time.monotonic() - began > 0.2


def test_one_that_was_never_opened_hears_nothing():
    preemption = Preemption()
    with preemption.something_to_save(), preemption.nothing_to_save():
        assert not preemption.requested(1)


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("UNKNOWN: Gloo AllGather failed: [pair.cc:547] Connection closed by peer [127.0.0.1]:45261", True),
        ("UNAVAILABLE: Task 1 heartbeat timeout. This indicates that the remote task has failed", True),
        ("config.batch_size must be at least 1", False),
    ],
)
def test_errors_that_say_that_another_process_has_gone(message, lost):
    assert is_lost(ValueError(message)) == lost
    wrapped = OSError("checkpoint 3 cannot be written")
    wrapped.__cause__ = ValueError(message)
    assert is_lost(wrapped) == lost and not is_lost(None)


def test_other_signals_are_no_notice():
    left = []
    with Preemption(grace=0.1, leave=left.append) as preemption, preemption.something_to_save():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        assert not preemption.requested(1)
    assert not left
    assert not [t for t in threading.enumerate() if t.name.startswith("preemption")]


def test_it_ends_a_process_that_is_inside_compiled_code(tmp_path):
    """A handler in Python would wait for this sort to end."""
    program = textwrap.dedent(f"""
        import pathlib, numpy
        from eupe_jax.training.preemption import Preemption
        values = numpy.random.default_rng(0).random(1 << 25)
        with Preemption():
            pathlib.Path({str(tmp_path / "ready")!r}).touch()
            for _ in range(100):
                numpy.sort(values, kind="heapsort")
    """)
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)
    try:
        assert until((tmp_path / "ready").exists, 60)
        time.sleep(0.2)
        process.terminate()
        assert process.wait(timeout=10) == RESUME_ME, process.stderr.read().decode()
    finally:
        process.kill()
        process.stderr.close()
