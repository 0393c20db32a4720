import threading

import pytest

from eupe_jax.data.shard_files import BusyError, alone
from launch.clock import Clock


def test_parts_add_up_over_starts_however_they_end(tmp_path, capsys):
    path = tmp_path / "seconds.json"
    path.write_text('{"a": 10.0}')
    with pytest.raises(ValueError), Clock(path).part("a"):
        raise ValueError
    with Clock(path).part("b"):
        pass
    seconds = Clock(path).seconds
    assert 10.0 <= seconds["a"] < 11 and 0 <= seconds["b"] < 1 and len(seconds) == 2
    assert "== a" in capsys.readouterr().out


def test_a_lock_that_is_held_is_waited_for_unless_somebody_has_words_for_it(tmp_path):
    lock, order = tmp_path / "lock", []

    def later():
        with alone(lock):
            order.append("second")

    with alone(lock):
        with pytest.raises(BusyError, match="somebody else"), alone(lock, "somebody else"):
            pass
        thread = threading.Thread(target=later)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
