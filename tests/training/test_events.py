import errno
import os
import time

import pytest
from tensorboardX.event_file_writer import EventsWriter

from eupe_jax.training.events import Events


def test_a_disk_that_is_full_is_told_by_the_next_write_and_by_closing(tmp_path, monkeypatch):
    events = Events(tmp_path / "tensorboard", 3)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(EventsWriter, "write_event", full)
    events.write(4, {"loss": 1.0})
    deadline = time.time() + 10
    with pytest.raises(OSError, match="No space left on device.*tensorboard"):
        while time.time() < deadline:
            events.write(5, {"loss": 1.0})
            time.sleep(0.01)
    with pytest.raises(OSError, match="No space left on device.*tensorboard"):
        events.close()


def test_all_that_was_written_is_in_the_file_when_it_is_closed(tmp_path):
    events = Events(tmp_path, 0)
    for step in range(50):
        events.write(step, {f"name{step}": 1.0})
    events.close()
    (file,) = tmp_path.iterdir()
    assert all(b"name%d" % step in file.read_bytes() for step in range(50))
