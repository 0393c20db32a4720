import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from eupe_jax.training.optimizer import decay_mask, make_optimizer, make_schedule, peak_learning_rate


def optimizer_config(**values):
    config = common.base().optimizer
    config.learning_rate = 2e-5
    config.update(values)
    return config


@pytest.mark.parametrize(("rule", "peak"), [("none", 2e-5), ("sqrt", 2.263e-4), ("linear", 6.4e-4)])
def test_lr_scaling_at_batch_8192(rule, peak):
    assert peak_learning_rate(optimizer_config(lr_scaling=rule), 8192) == pytest.approx(peak, rel=1e-3)


def test_schedule_warms_up_and_ends():
    schedule = make_schedule(optimizer_config(warmup_steps=10, min_learning_rate=1e-6), 8192, 100)
    rates = np.array([schedule(i) for i in range(101)])
    assert rates[0] == pytest.approx(2e-6, rel=1e-4) and rates.argmax() == 10
    assert rates[10] == pytest.approx(2e-5) and rates[100] == pytest.approx(1e-6)
    assert np.all(np.diff(rates[10:]) < 0)


def test_only_kernels_decay_also_when_stacked():
    params = {
        "blocks": {
            "attn": {"qkv": {"kernel": jnp.ones((2, 3, 9)), "bias": jnp.ones((2, 9))}},
            "ls1": {"gamma": jnp.ones((2, 3))},
        },
        "cls_token": jnp.ones((1, 1, 3)),
        "norm": {"scale": jnp.ones(3)},
    }
    mask = decay_mask(params)
    assert mask["blocks"]["attn"]["qkv"] == {"kernel": True, "bias": False}
    assert not mask["blocks"]["ls1"]["gamma"] and not mask["cls_token"] and not mask["norm"]["scale"]
    optimizer = make_optimizer(optimizer_config(learning_rate=0.1, weight_decay=0.5, warmup_steps=0), 8, 10)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["blocks"]["attn"]["qkv"]["kernel"], -0.05, rtol=1e-6)
    assert not np.any(updates["blocks"]["attn"]["qkv"]["bias"]) and not np.any(updates["norm"]["scale"])


def test_clipping_bounds_the_gradient_norm():
    params = {"kernel": jnp.zeros(4)}
    grads = {"kernel": jnp.full(4, 1e6)}
    clipped = make_optimizer(optimizer_config(clip_norm=1.0, eps=1.0, learning_rate=1.0, weight_decay=0.0), 8, 10)
    updates, _ = clipped.update(grads, clipped.init(params), params)
    # each coordinate is 0.5 after clipping, so Adam's first step is 0.5 / (0.5 + eps)
    np.testing.assert_allclose(updates["kernel"], -1 / 3, rtol=1e-4)
