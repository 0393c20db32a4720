"""Steps whose gradient is many times the usual one are not applied, student by student; by default there is no rule."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common
from eupe_jax.distill import spikes
from eupe_jax.distill import step as distill_step
from eupe_jax.distill.adapters import AdapterBank
from eupe_jax.distill.resolutions import Resolutions
from eupe_jax.distill.step import Loss, Student, make_step
from eupe_jax.distill.teacher_spec import TeacherSpec
from eupe_jax.distill.teachers import Teacher
from eupe_jax.training.optimizer import make_optimizer

WIDTH, SIDE = 4, 2


class Tiny(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        patches = nn.Dense(WIDTH, name="patch_embed")(images)
        return {"cls": patches.mean((1, 2)), "patches": patches}


def parts(factor, students=("small", "other")):
    """(state, step, batch of features at this scale) of students of a host teacher, with the rule at `factor`."""
    spec = TeacherSpec("t", WIDTH, WIDTH, 1, SIDE, (0.0,) * 3, (1.0,) * 3, "")
    teacher = Teacher(spec, "native")
    fields = {"learning_rate": 1e-3, "clip_norm": 1.0, "warmup_steps": 0}
    config = ConfigDict(common.base().optimizer.to_dict() | fields)
    optimizer = make_optimizer(config, 4, 1000, spike_factor=factor)
    bank = AdapterBank(WIDTH, {"t": teacher.out_dims})
    made = {name: Student(Tiny(), bank, optimizer, spec.mean, spec.std) for name in students}
    fresh = jax.jit(lambda key: {name: student.init(key, SIDE) for name, student in made.items()})
    state = {"step": jnp.int32(0), "students": fresh(jax.random.key(0))}
    step = make_step(
        made, {"t": teacher}, Resolutions(SIDE, (("t", SIDE),)), Loss(0.0, 1.0), seed=0, spike_factor=factor
    )
    statistics = {"t": {"mean": {k: np.zeros(WIDTH, np.float32) for k in teacher.out_dims},
                        "std": {k: np.ones(WIDTH, np.float32) for k in teacher.out_dims}}}  # fmt: skip

    def run(state, values=1.0):
        rng = np.random.default_rng(0)
        features = {
            "cls": rng.normal(size=(4, WIDTH)).astype(np.float32),
            "patches": rng.normal(size=(4, SIDE, SIDE, WIDTH)).astype(np.float32) * values,
        }
        batch = {"image": rng.integers(0, 255, (4, SIDE, SIDE, 3), dtype=np.uint8), "features": {"t": features}}
        return batch, {}, statistics

    return state, step, run


def averages(state, name):
    found = jax.tree.leaves(state["students"][name]["optimizer"], is_leaf=lambda x: isinstance(x, spikes.NormAverage))
    return [x for x in found if isinstance(x, spikes.NormAverage)]


def test_a_spike_is_not_applied_to_the_student_that_has_it_and_leaves_the_average_alone(monkeypatch):
    monkeypatch.setattr(spikes, "BEGINNING", 3)
    state, step, arguments = parts(factor=4.0)
    step = jax.jit(step)
    norms = []
    for _ in range(3):
        state, metrics = step(state, *arguments(state))
        norms.append(float(metrics["small/grad_norm"]))
        assert metrics["small/skipped"] == 0
    (average,) = averages(state, "small")
    assert average.count == 3 and float(average.average) == pytest.approx(np.mean(norms), rel=1e-5)

    # one student's gradient grows a hundredfold: its adapters multiply it
    steep = jax.tree_util.tree_map_with_path(
        lambda path, x: x * 100 if "small" in str(path) and "fc2" in str(path) and "params" in str(path) else x, state
    )
    after, metrics = step(steep, *arguments(state))
    assert metrics["small/grad_norm"] > 4 * np.mean(norms) and np.isfinite(metrics["small/grad_norm"])
    assert (metrics["small/skipped"], metrics["other/skipped"]) == (1, 0)
    jax.tree.map(
        np.testing.assert_array_equal, after["students"]["small"]["params"], steep["students"]["small"]["params"]
    )
    assert averages(after, "small")[0].count == 3 and averages(after, "other")[0].count == 4
    moved = jax.tree.map(
        lambda a, b: bool(np.any(a != b)), after["students"]["other"]["params"], steep["students"]["other"]["params"]
    )
    assert any(jax.tree.leaves(moved))
    _, metrics = step(state, *arguments(state))
    assert metrics["small/skipped"] == 0, "what is usual goes on"


def test_nothing_is_a_spike_at_the_beginning_and_the_average_forgets():
    transform = spikes.average_norm()
    state = transform.init({})
    for norm in (8.0, 4.0):
        gradients, state = transform.update({"a": jnp.float32(norm)}, state)
        assert gradients == {"a": norm}
    assert float(state.average) == 6.0
    assert not spikes.is_spike((state,), jnp.float32(1e9), 2.0)
    late = spikes.NormAverage(jnp.int32(spikes.BEGINNING), jnp.float32(6.0))
    assert spikes.is_spike((late,), jnp.float32(12.1), 2.0) and not spikes.is_spike((late,), jnp.float32(11.9), 2.0)
    assert not spikes.is_spike((late,), jnp.float32(jnp.nan), 2.0), "left to the other rule"
    old = spikes.NormAverage(jnp.int32(10**6), jnp.float32(6.0))
    _, moved = transform.update({"a": jnp.float32(56.0)}, old)
    assert float(moved.average) == pytest.approx(7.0)


def test_a_loss_that_is_not_finite_is_not_applied_though_its_gradients_are_finite_and_there_is_no_rule(monkeypatch):
    real = distill_step.distillation_loss

    def infinite(*args):
        value, found = real(*args)
        return value + jnp.inf, found

    monkeypatch.setattr(distill_step, "distillation_loss", infinite)
    state, step, arguments = parts(factor=0.0, students=("small",))
    after, metrics = jax.jit(step)(state, *arguments(state))
    assert np.isfinite(metrics["small/grad_norm"]) and metrics["small/grad_norm"] > 0
    assert not np.isfinite(metrics["small/loss"]) and metrics["small/skipped"] == 1
    before, after = (jax.tree.leaves(each["students"]["small"]["params"]) for each in (state, after))
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_switched_off_neither_state_nor_program_knows_of_it(monkeypatch):
    def never(*_):
        raise AssertionError("the rule is off")

    monkeypatch.setattr(distill_step, "is_spike", never)
    state, step, arguments = parts(factor=0.0)
    jax.eval_shape(step, state, *arguments(state))
    assert not averages(state, "small")
    kinds = [type(x).__name__ for x in state["students"]["small"]["optimizer"]]
    assert kinds == ["EmptyState", "tuple"], "clipping and AdamW"
