"""Which part of a step was first not finite: one thing is spoilt in real parts, and the words must name it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eupe_jax.distill import losses
from eupe_jax.sharding.mesh import make_mesh
from eupe_jax.training import assemble, pipeline, program
from eupe_jax.training.diagnosis import first_not_finite
from tests.training.conftest import tiny_config


class Run:
    """What a step of a run takes, on one device: small random weights, so that nothing need be compiled for them."""

    def __init__(self):
        self.config, self.mesh = tiny_config(), make_mesh(devices=jax.devices()[:1])
        del self.config.teachers["b"]
        abstract, rng = program.abstract_run(self.config, self.mesh), np.random.default_rng(0)
        self.teachers = abstract.teachers

        def fill(x):
            floats = jnp.issubdtype(x.dtype, jnp.floating)
            value = rng.normal(0, 0.02, x.shape) if floats else rng.integers(0, 60, x.shape)
            return jax.device_put(value.astype(x.dtype), x.sharding)

        self.state, self.batch, self.variables, statistics = jax.tree.map(fill, abstract.arguments)
        self.statistics = {name: {"mean": each["mean"], "std": jax.tree.map(jnp.ones_like, each["std"])}
                           for name, each in statistics.items()}  # fmt: skip


@pytest.fixture(scope="module")
def run():
    return Run()


def diagnose(run, *, state=None, variables=None, batch=None, statistics=None, step=3):
    teachers = assemble.Teachers(run.teachers, variables or run.variables, {}, {}, {})
    return first_not_finite(
        run.config, state or run.state, step, batch or run.batch, teachers, statistics or run.statistics, run.mesh
    )


def spoilt(tree, path, change):
    """The tree with one leaf changed."""

    def each(keys, leaf):
        return change(leaf) if jax.tree_util.keystr(keys, simple=True, separator="/") == path else leaf

    changed = jax.tree_util.tree_map_with_path(each, tree)
    assert any(a is not b for a, b in zip(jax.tree.leaves(changed), jax.tree.leaves(tree), strict=True)), path
    return changed


def test_weights_and_statistics_are_named_with_their_blocks(run):
    qkv = "params/blocks/attn/qkv/kernel"
    variables = spoilt(run.variables, f"a/{qkv}", lambda x: x.at[1, 0, 0].set(jnp.nan))
    assert diagnose(run, variables=variables) == (
        f"teacher 'a': its weights are not finite: {qkv} (NaN, layers 1 of 2)"
    )
    statistics = spoilt(run.statistics, "a/std/cls", lambda x: np.full_like(x, np.inf))
    assert diagnose(run, statistics=statistics) == "statistics of teacher 'a': not finite: std/cls (infinite)"
    path = "students/vit/params/adapters/a_cls/fc1/kernel"
    state = spoilt(run.state, path, lambda x: x.at[0, 0].set(-jnp.inf))
    assert diagnose(run, state=state) == (
        "student 'vit': its parameters are not finite before the step: params/adapters/a_cls/fc1/kernel (infinite)"
    )


def overflow(tree, blocks):
    """The tree with finite weights of which block 1 makes infinities."""
    tree = spoilt(tree, f"{blocks}/mlp/fc2/bias", lambda x: x.at[1].set(1e38))
    return spoilt(tree, f"{blocks}/ls2/gamma", lambda x: x * 1e3)


@pytest.mark.slow
def test_a_layer_of_a_teacher_is_named_with_the_images(run):
    words = diagnose(run, variables=overflow(run.variables, "a/params/blocks"))
    assert words.startswith("teacher 'a': its class tokens are NaN for 8 of 8 images: places 0, 1, 2, 3, 4, 5, 6, 7 of")
    assert words.endswith("; first infinite in blocks/ls2, layer 1 of 2") and "records" in words


@pytest.mark.slow
def test_a_layer_of_a_student_and_a_gradient_are_named(run, monkeypatch):
    words = diagnose(run, state=overflow(run.state, "students/vit/params/backbone/blocks"))
    assert words.startswith("student 'vit': the tokens that its adapters give (a/cls (NaN), a/patches (NaN))")
    assert words.endswith("; first infinite in blocks/ls2, layer 1 of 2")

    def rough(x, y, beta=1.0):
        return jnp.mean(jnp.sqrt(jnp.abs(x - x)))  # nothing, with a slope that is none

    monkeypatch.setattr(losses, "smooth_l1_loss", rough)
    words = diagnose(run)
    assert words.startswith("student 'vit': gradients of adapters/a_patches/fc1/kernel (NaN)")
    assert words.endswith("more; first infinite outside of all modules")


def test_features_of_a_host_teacher_and_pixels(run, monkeypatch):
    features = {"a": {"cls": np.ones((8, 4), np.float32), "patches": np.ones((8, 2, 2, 4), np.float32)}}
    features["a"]["patches"][5, 0, 1] = np.nan
    batch = run.batch | {"features": jax.tree.map(jnp.asarray, features), "index": jnp.arange(100, 108)}
    words = diagnose(run, batch=batch)
    assert words == (
        "teacher 'a': its patch tokens are NaN for 1 of 8 images: places 5 of the batch, records 105, as the batch "
        "brings them (feature cache)"
    )

    def divide(step, images, places):
        return images / jnp.float32(places != 2)[:, None, None, None]

    monkeypatch.setattr(pipeline, "device_augment", lambda *_: divide)
    words = diagnose(run, batch=run.batch | {"index": jnp.arange(100, 108)})
    assert "input images are" in words and "places 2 of the batch, records 102, after augmentation" in words


@pytest.mark.slow
def test_a_healthy_step_is_said_to_be_one(run):
    assert diagnose(run, step=7).startswith("every value of step 7 is finite when it is computed again")
