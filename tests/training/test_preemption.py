"""SIGTERM: a run leaves in time with the status that asks to be resumed, also where Python runs no handlers."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from eupe_jax.training.preemption import RESUME_ME, Preemption


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
    with Preemption(grace=60, leave=left.append) as preemption:
        assert not preemption.requested(1)
        notice()
        assert until(lambda: preemption.requested(2))
    assert not left and signal.getsignal(signal.SIGTERM) == before


def test_where_nothing_can_be_lost_it_leaves_at_once():
    left = []
    with Preemption(grace=60, leave=left.append) as preemption:
        with preemption.nothing_to_save():
            assert not left
            notice()
            assert until(lambda: left)
    assert left == [RESUME_ME]


def test_a_notice_from_before_counts_when_nothing_can_be_lost_any_more():
    left = []
    with Preemption(grace=60, leave=left.append) as preemption:
        notice()
        assert until(lambda: preemption.requested(1)) and not left
        with preemption.nothing_to_save():
            assert until(lambda: left)


def test_a_loop_that_does_not_come_by_ends_with_the_grace_period():
    left = []
    with Preemption(grace=0.3, leave=left.append):
        notice()
        began = time.monotonic()
        assert until(lambda: left)
        assert time.monotonic() - began > 0.2


def test_other_signals_are_no_notice():
    left = []
    with Preemption(grace=0.1, leave=left.append) as preemption:
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
        with Preemption() as preemption, preemption.nothing_to_save():
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
