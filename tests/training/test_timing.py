"""Times and speed by a clock of our own; ranges of steps to trace; what a run says of itself."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from eupe_jax.distill.resolutions import Resolutions
from eupe_jax.sharding import chips
from eupe_jax.sharding.mesh import make_mesh
from eupe_jax.training import loop, profiling, summary
from eupe_jax.training.timing import Timing
from tests.training.conftest import tiny_config

SMALL, LARGE = Resolutions(256, ()), Resolutions(512, ())


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def timed(clock, devices=2):
    return Timing(8, {SMALL: 10**12, LARGE: 4 * 10**12}, jax.devices()[:devices], clock=clock)


def spend(clock, timing, **seconds):
    for name, value in seconds.items():
        with timing.part(name):
            clock.now += value


def test_speed_is_that_of_training_without_pauses():
    clock = Clock()
    timing = timed(clock)
    assert timing.pop() == {}
    for chosen in (SMALL, LARGE):
        spend(clock, timing, data=0.5, dispatch=0.25, wait=1.0)
        timing.step(chosen)
    spend(clock, timing, save=3.0, eval=5.0)
    clock.now += 0.5  # what no part accounts for
    found = timing.pop()
    assert found == {
        "time/step_s": 2.0, "time/data_s": 0.5, "time/dispatch_s": 0.25, "time/wait_s": 1.0, "time/log_s": 0.0,
        "time/save_s": 3.0, "time/eval_s": 5.0, "performance/images_per_s": 4.0,
        "performance/tflops_per_device": 5.0,  # 8 x (1 + 4) TFLOP in 4 s on 2 devices
    }  # fmt: skip
    spend(clock, timing, wait=1.0)
    timing.step(SMALL)
    assert timing.pop()["time/step_s"] == 1.0, "each line starts afresh"


def test_mfu_where_the_peak_is_known(monkeypatch):
    monkeypatch.setattr("eupe_jax.training.timing.chip_of", lambda device: chips.CHIPS["v5e"])
    clock = Clock()
    timing = timed(clock)
    timing.step(SMALL)
    clock.now += 1.0
    found = timing.pop()
    np.testing.assert_allclose(found["performance/mfu"], 4e12 / 197e12)
    assert loop.in_short(found) == {"img/s": "8", "MFU": "2.0%"}


def test_a_part_counts_when_it_fails():
    clock = Clock()
    timing = timed(clock)
    timing.step(SMALL)
    with pytest.raises(OSError), timing.part("save"):
        clock.now += 2.0
        raise OSError
    assert timing.pop()["time/save_s"] == 2.0


@pytest.mark.parametrize(("text", "steps"), [("100:105", (100, 105)), ("7", (7, 7))])
def test_steps_to_trace(text, steps):
    assert profiling.parse_steps(text) == steps


@pytest.mark.parametrize("text", ["", "a:b", "5:3", "0:2", "1:101", "-1:2", "3:"])
def test_ranges_that_are_none(text):
    with pytest.raises(ValueError, match=re.escape(f"--profile={text}")):
        profiling.parse_steps(text)


def test_a_range_that_a_resumed_run_has_passed_is_left_out_and_one_it_is_in_is_cut(tmp_path, caplog):
    past = profiling.Profiler((2, 4), tmp_path, start=4, end=9)
    assert not any(past.begins(step) for step in range(10)) and "nothing to trace" in caplog.text
    inside = profiling.Profiler((2, 6), tmp_path, start=4, end=9)
    assert [step for step in range(10) if inside.begins(step)] == [5]
    assert not any(profiling.Profiler(None, tmp_path, start=0, end=9).begins(step) for step in range(10))


def test_only_resolutions_that_come_up_are_compiled():
    config = tiny_config(steps=400)
    config.student_resolutions = (32, 48)
    config.teachers.a.resolutions = (32, 48)
    assert len(loop.pairs_ahead(config, 0, 400)) == 4
    for start, end in ((0, 1), (7, 9), (5, 5)):
        drawn = {loop.drawn(config, step) for step in range(start, end)}
        assert set(loop.pairs_ahead(config, start, end)) == drawn


def test_sizes_are_those_on_a_device():
    mesh = make_mesh(fsdp=8)
    cut = jax.device_put(jnp.zeros((64, 10)), NamedSharding(mesh, PartitionSpec("fsdp")))
    whole = jax.ShapeDtypeStruct((5,), jnp.bfloat16)
    assert summary.size_of({"cut": cut, "whole": whole}) == (645, 64 * 10 * 4 // 8 + 10)


def test_memory_is_what_the_compiler_counts():
    compiled = jax.jit(lambda x: x * 2, donate_argnums=0).lower(jnp.zeros((1024, 1024))).compile()
    line = summary.describe_memory(compiled, jax.devices()[0])
    assert line.startswith("4.0 MiB a device: state, teachers and batch 4.0 MiB") and "results 0.0 MiB" in line
