"""A step that takes far longer than usual is reported, with what every thread is doing."""

import logging
import multiprocessing
import threading
import time

from eupe_jax.data.processes import end_with_parent
from eupe_jax.training.watchdog import ENOUGH, Watchdog, ask_workers


def reports(caplog):
    return [r.getMessage() for r in caplog.records if "has taken" in r.getMessage()]


def test_a_stall_is_reported_with_stacks_and_its_end(caplog):
    caplog.set_level(logging.WARNING)
    release = threading.Event()
    loader = threading.Thread(target=lambda: release.wait(20), name="loader-7")
    loader.start()
    with Watchdog(factor=5, least_seconds=0.5) as watchdog:
        for step in range(ENOUGH + 2):
            watchdog.stepped(step)
            time.sleep(0.01)
        end = time.monotonic() + 10
        while len(reports(caplog)) < 2 and time.monotonic() < end:  # it says so again when the stall has doubled
            time.sleep(0.01)
        watchdog.stepped(ENOUGH + 2)
    release.set()
    loader.join()
    first, second = reports(caplog)[:2]
    assert f"step {ENOUGH + 2} has taken" in first
    assert "-- loader-7" in first and "-- MainThread" in first and "test_a_stall_is_reported" in first
    assert "is over, after" in caplog.records[-1].getMessage() and second != first


def test_neither_first_steps_nor_pauses_nor_steady_ones_are_stalls(caplog):
    with Watchdog(factor=5, least_seconds=0.2) as watchdog:
        watchdog.stepped(0)
        time.sleep(0.3)  # too early to know
        for step in range(1, ENOUGH + 3):
            watchdog.stepped(step)
        with watchdog.paused():
            time.sleep(0.4)
        watchdog.stepped(ENOUGH + 3)
        time.sleep(0.01)
    assert not reports(caplog)


def stuck_in_a_bucket(started, release, listens):
    if listens:
        end_with_parent()
    started.set()
    release.wait(60)


def test_workers_that_can_print_their_stacks_and_no_others_are_harmed(capfd, caplog):
    context = multiprocessing.get_context("spawn")
    release, workers = context.Event(), []
    for listens in (True, False):
        started = context.Event()
        workers.append(context.Process(target=stuck_in_a_bucket, args=(started, release, listens)))
        workers[-1].start()
        assert started.wait(60)
    ask_workers()
    end, printed = time.monotonic() + 20, ""
    while "stuck_in_a_bucket" not in printed and time.monotonic() < end:
        time.sleep(0.02)
        printed += capfd.readouterr().err
    release.set()
    for worker in workers:
        worker.join(20)
    assert "stuck_in_a_bucket" in printed and [worker.exitcode for worker in workers] == [0, 0]
    assert [str(workers[0].pid) in record.getMessage() for record in caplog.records] == [True]
