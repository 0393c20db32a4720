"""Micro-batches: the same gradients as the whole batch at once, without moving an image between devices."""

import jax
import numpy as np
import pytest

from tests.training.conftest import tiny_config
from tests.training.tiny_steps import TinyRun, first_moments


def stepped(accumulate, devices, **augment):
    """(Adam's first moments, metrics, text of the program) of one step."""
    config = tiny_config(steps=4)
    del config.teachers["b"]
    config.accumulate = accumulate
    config.augment.update(augment)
    run = TinyRun(config, devices)
    ((_, step),) = run.steps().items()
    arguments = run.arguments()
    compiled = step.lower(*arguments).compile()
    state, metrics = compiled(*arguments)
    return first_moments(state, "vit"), jax.device_get(metrics), compiled.as_text()


def assert_same(found, expected):
    moments, metrics, _ = found
    assert np.linalg.norm(moments - expected[0]) < 1e-5 * np.linalg.norm(expected[0])
    assert metrics.keys() == expected[1].keys()
    for name, value in expected[1].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_two_micro_batches_are_the_whole_batch():
    whole, parts = stepped(1, 2), stepped(2, 2)
    assert_same(parts, whole)
    assert "all-reduce" in parts[2], "the batch is cut over two devices"
    assert not any(word in parts[2] for word in ("all-to-all", "collective-permute", "all-gather")), (
        "every device finds its share of a micro-batch among its own images"
    )
    mirrored = stepped(2, 2, flip_p=1.0)
    assert abs(mirrored[1]["vit/loss"] - whole[1]["vit/loss"]) > 1e-4, "the loss would tell another draw"


@pytest.mark.slow
@pytest.mark.parametrize(("accumulate", "devices"), [(8, 1), (2, 4), (4, 2)])
def test_any_cut_is_the_whole_batch(accumulate, devices):
    strong = {"jitter_p": 0.8, "blur_p": 0.5}
    assert_same(stepped(accumulate, devices, **strong), stepped(1, 1, **strong))
