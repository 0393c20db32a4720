import multiprocessing
import os
import signal
import time

from eupe_jax.data.processes import end_with_parent


def deaf(told):
    end_with_parent(through_notices=True)
    told.send(os.getpid())
    time.sleep(3600)


def test_a_worker_lives_through_a_notice_as_long_as_it_is_needed():
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    worker = context.Process(target=deaf, args=(there,), daemon=True)
    worker.start()
    assert here.poll(60) and here.recv() == worker.pid
    with open(f"/proc/{worker.pid}/status") as status:
        (ignored,) = [int(line.split()[1], 16) for line in status if line.startswith("SigIgn:")]
    assert ignored >> (signal.SIGTERM - 1) & 1  # no clock of its own runs from there on
    worker.terminate()
    worker.join(0.5)
    assert worker.is_alive()
    worker.kill()
    worker.join()
