"""Micro-batches: the same gradients as the whole batch at once, without moving an image between devices."""

import jax
import numpy as np
import pytest

from tests.training.conftest import tiny_config
from tests.training.tiny_steps import TinyRun, first_moments


def tiny_run(devices, **augment):
    config = tiny_config(steps=4)
    del config.teachers["b"]
    config.augment.update(augment)
    return TinyRun(config, devices)


def compiled_step(run, accumulate):
    run.config.accumulate = accumulate
    ((_, step),) = run.steps().items()
    return step.lower(*run.arguments()).compile()


def taken(step, run):
    """(Adam's first moments, metrics) of one step."""
    state, metrics = step(*run.arguments())
    return first_moments(state, "vit"), jax.device_get(metrics)


def assert_same(found, expected):
    assert np.linalg.norm(found[0] - expected[0]) < 1e-5 * np.linalg.norm(expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-5, err_msg=name)


def test_two_micro_batches_are_the_whole_batch():
    run = tiny_run(devices=2)
    whole = taken(compiled_step(run, 1), run)
    step = compiled_step(run, 2)
    assert_same(taken(step, run), whole)
    text = step.as_text()
    assert "all-reduce" in text, "the batch is cut over two devices"
    assert not any(word in text for word in ("all-to-all", "collective-permute", "all-gather")), (
        "every device finds its share of a micro-batch among its own images"
    )
    image = run.batch["image"]
    run.batch["image"] = jax.device_put(np.roll(image, 1, axis=0), image.sharding)
    moved = taken(step, run)
    assert abs(moved[1]["vit/loss"] - whole[1]["vit/loss"]) > 1e-4, "an image's draws are those of its place"


@pytest.mark.slow
@pytest.mark.parametrize(("accumulate", "devices"), [(8, 1), (2, 4), (4, 2)])
def test_any_cut_is_the_whole_batch(accumulate, devices):
    strong = {"jitter_p": 0.8, "blur_p": 0.5}
    run, reference = tiny_run(devices, **strong), tiny_run(1, **strong)
    assert_same(taken(compiled_step(run, accumulate), run), taken(compiled_step(reference, 1), reference))
