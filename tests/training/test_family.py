"""Several students, one teacher pass: each trains as if it were alone."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from eupe_jax.training.loop import train
from eupe_jax.training.measure import measure_statistics
from eupe_jax.training.metrics import read_metrics
from tests.training.conftest import tiny_config
from tests.training.tiny_steps import TinyRun


def test_a_student_with_broken_gradients_stands_still_alone():
    config = tiny_config(steps=4)
    config.students.broken = config.students.vit.copy_and_resolve_references()
    del config.teachers["b"]
    run = TinyRun(config, devices=1)
    ((_, step),) = run.steps().items()
    healthy, _ = step(*run.arguments())
    _, *rest = run.arguments()

    state = run.state()
    params = state["students"]["broken"]["params"]
    params["backbone"]["norm"]["bias"] = params["backbone"]["norm"]["bias"].at[0].set(jnp.nan)
    before = jax.device_get(state["students"]["broken"])
    state, metrics = step(state, *rest)
    assert (metrics["broken/skipped"], metrics["vit/skipped"]) == (1.0, 0.0)
    assert np.isnan(metrics["broken/loss"]) and np.isfinite(metrics["vit/loss"])
    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))  # noqa: E731
    # but for the schedule, which is at the step that the others are at
    scheduled = lambda x: isinstance(x, optax.ScaleByScheduleState)  # noqa: E731
    moved = [x for x in jax.tree.leaves(state["students"]["broken"], is_leaf=scheduled) if scheduled(x)]
    assert [int(x.count) for x in moved] == [1]
    counted = jax.tree.map(lambda x: x._replace(count=1) if scheduled(x) else x, before, is_leaf=scheduled)
    same(state["students"]["broken"], counted)
    same(state["students"]["vit"], healthy["students"]["vit"])
    assert int(state["step"]) == 1
    with pytest.raises(AssertionError):
        same(state["students"]["vit"]["params"], run.state()["students"]["vit"]["params"])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["stage2_family", "stage3_family"])
def test_each_of_the_six_trains_as_in_a_run_of_its_own(recipe, tmp_path):
    """Parameters after four steps agree to 1e-5 of their norm, logged losses to 1e-5."""
    config = importlib.import_module(f"configs.{recipe}").get_config("runlocal")
    config.teachers.proxy.resolutions = (32, 64)[: len(config.teachers.proxy.resolutions)]
    config.student_resolutions = (32, 64)[: len(config.student_resolutions)]
    config.total_steps = 4
    measure_statistics(config, tmp_path / "statistics")
    config.statistics = str(tmp_path / "statistics")
    family = jax.device_get(train(config, tmp_path / "family"))["students"]
    lines = read_metrics(tmp_path / "family" / "metrics.jsonl")
    assert set(family) == set(common.FAMILY)
    for name in common.FAMILY:
        alone = config.copy_and_resolve_references()
        with alone.unlocked():
            for other in set(common.FAMILY) - {name}:
                del alone.students[other]
        state = jax.device_get(train(alone, tmp_path / name))["students"][name]
        a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(s["params"])]) for s in (family[name], state))
        print(name, np.linalg.norm(a - b) / np.linalg.norm(b))
        assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b), name
        for ours, theirs in zip(lines, read_metrics(tmp_path / name / "metrics.jsonl"), strict=True):
            for key, value in theirs.items():
                np.testing.assert_allclose(ours[key], value, rtol=1e-5, atol=1e-7, err_msg=key)
