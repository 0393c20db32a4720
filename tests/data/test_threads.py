"""Threads of our own: what hangs in one keeps no process from ending."""

import subprocess
import sys
import threading
import time

import pytest

from eupe_jax.data import threads

STUCK = """
import os
import time

import numpy as np
from etils import epath

from eupe_jax.data import teacher_stage, threads
from eupe_jax.data.host import HostConfig
from eupe_jax.data.loader import Loader
from eupe_jax.data.sources import ArraySource
from eupe_jax.training import events


class Stuck:
    def __call__(self, images):
        os.write(1, b"teacher\\n")  # at once: print writes the line and its end apart, and threads come between
        time.sleep(3600)


def hang(*_):
    os.write(1, b"hangs\\n")
    time.sleep(3600)


def every():
    threads.for_each(hang, [0], threads=1, name="reads")


source = ArraySource(np.zeros((8, 16, 16, 3), np.uint8))
batches = Loader(source, HostConfig(size=16), batch_size=4, seed=0, threads=1).batches()
teacher_stage._PATIENCE = events.PATIENCE = 0.3
stage = teacher_stage.with_host_teachers(batches, {"stuck": Stuck()})
threads.start(every, name="reader")
written = events.Events(epath.Path("events"), 0)
written._file.write_event = hang
written.write(1, {"loss": 0.0})
time.sleep(1)
stage.close()
try:
    written.close()
except OSError as error:
    print(error, flush=True)
print("all is said", flush=True)
"""


def test_nothing_that_hangs_keeps_a_process_from_ending(tmp_path):
    """A teacher, a read of a feature cache, an events file in a bucket."""
    ended = subprocess.run([sys.executable, "-c", STUCK], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    said = ended.stdout.splitlines()
    assert sorted(said[:3]) == ["hangs", "hangs", "teacher"] and said[-1] == "all is said"
    assert "events has taken no events for 0.3 s" in said[-2]


def test_every_item_is_done_by_so_many_threads():
    meet, done = threading.Barrier(3), []

    def task(item):
        meet.wait(10)
        done.append(item)

    threads.for_each(task, range(9), threads=3, name="three")
    assert sorted(done) == list(range(9))


def test_what_a_thread_raises_is_raised_and_ends_the_others():
    done = []

    def task(item):
        if item == 5:
            raise SystemExit(0)
        done.append(item)
        time.sleep(0.01)

    with pytest.raises(SystemExit):
        threads.for_each(task, range(200), threads=2, name="two")
    assert len(done) < 200 and 5 not in done
