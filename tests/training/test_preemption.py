"""SIGTERM: a run leaves in time with the status that asks to be resumed, also where Python runs no handlers."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import jax
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


def test_it_says_what_resumes_the_run(caplog):
    left = []
    with Preemption(grace=60, leave=left.append) as preemption:
        preemption.again = "run the same command again, now without --fresh,"
        notice()
        assert until(lambda: left)
    assert "status 75, run the same command again, now without --fresh, to go on" in caplog.text
    assert Preempted("saved", preemption.again).again == preemption.again


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


def test_a_bucket_that_cannot_be_reached_is_no_process_that_has_gone():
    error = OSError("checkpoint 3 cannot be written: connection reset by peer")
    error.__cause__ = ValueError("UNAVAILABLE: Connection reset by peer [tensorstore_spec=...]")
    assert not is_lost(error) and is_lost(error.__cause__)


@pytest.mark.parametrize(
    ("error", "told", "leaves"),
    [
        (jax.errors.JaxRuntimeError("INTERNAL: whatever it says"), True, True),
        (jax.errors.JaxRuntimeError("INTERNAL: whatever it says"), False, False),
        (OSError("checkpoint 3 cannot be written: no space left on device"), True, False),
        (ValueError("3 steps in a row did the students no good"), True, False),
        (RuntimeError("Gloo AllReduce failed: connection closed by peer"), False, True),
        (Preempted("saved"), True, False),
    ],
)
def test_what_follows_from_the_leaving_of_others_leaves_too(error, told, leaves):
    left = []
    with pytest.raises(type(error)), Preemption(grace=0.5, leave=left.append) as preemption:
        preemption._joined = True  # JAX's service tells others, and they it: here by hand
        with preemption.something_to_save():
            if told:
                preemption._notice()
            raise error
    assert bool(left) == leaves, "with the status of its own error"
    preemption._leaver.join()


def test_an_error_in_the_farewell_save_has_its_own_status():
    left = []
    with pytest.raises(OSError, match="no space"), Preemption(grace=60, leave=left.append) as preemption:
        with preemption.something_to_save():
            notice()
            assert until(lambda: preemption.requested(1))
            raise OSError("no space left on device")
    assert not left


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
