"""Programs of a run: described without arrays, compiled before they are needed, one for every pair of resolutions."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from eupe_jax.sharding.mesh import make_mesh
from eupe_jax.training import pipeline, program
from tests.training.conftest import tiny_config
from tests.training.tiny_steps import TinyRun


def described(tree):
    return {
        jax.tree_util.keystr(path): (x.shape, str(x.dtype), getattr(x, "sharding", None))
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def one_teacher(sizes):
    config = tiny_config(steps=4)
    del config.teachers["b"]
    config.teachers.a.resolutions = sizes
    return config


def test_a_run_is_described_as_it_is():
    config = one_teacher((32,))
    config.teachers.a.dtype = "bfloat16"
    config.mesh.fsdp = 2
    run = TinyRun(config)
    state, batch, variables, _ = program.abstract_run(config, run.mesh).arguments
    assert described(state) == described(run.state())
    assert described(batch) == described(run.batch)
    assert described(variables) == described(run.variables)
    types = {str(x.dtype) for x in jax.tree.leaves(variables)}
    assert types == {"bfloat16", "float32"}, "kernels in the compute type, the rest as it is"


@pytest.mark.parametrize(
    ("recipe", "parameters", "teachers"),
    [("stage1_proxy", 1.9e9, 4.46e9), ("stage2_vitb", 0.1e9, 1.85e9)],
)
def test_full_size_runs_are_described_without_a_single_array(recipe, parameters, teachers):
    config = importlib.import_module(f"configs.{recipe}").get_config()
    config.mesh.fsdp = 8
    before = sum(x.nbytes for x in jax.live_arrays())
    state, batch, variables, _ = program.abstract_run(config, make_mesh(**config.mesh)).arguments
    assert sum(x.nbytes for x in jax.live_arrays()) - before < 2**20
    (student,) = state["students"].values()
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    np.testing.assert_allclose(count(student["params"]), parameters, rtol=0.03)
    np.testing.assert_allclose(count(variables), teachers, rtol=0.01)
    assert batch["image"].shape == (config.batch_size, *(config.data.image_size,) * 2, 3)
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    whole = [jax.tree_util.keystr(p) for p, x in leaves if x.size > 2**21 and x.sharding.is_fully_replicated]
    assert all("qkv" in name for name in whole), "teachers are cut as students are, but for their joint projections"
    assert {x.dtype for x in jax.tree.leaves(variables) if x.size > 2**21} == {jnp.dtype(jnp.bfloat16)}


def test_every_pair_is_compiled_and_logged_and_scaled_by_itself():
    config = one_teacher((32, 48))
    config.loss.pair_scale = ConfigDict({"s32_t48": 0.5})
    run = TinyRun(config, devices=1)
    compiled = program.compile_steps(run.steps(), run.arguments(), progress=False)
    metrics = {str(pair): step(*run.arguments())[1] for pair, step in compiled.items()}
    assert set(metrics) == {"s32_t32", "s32_t48"}
    for pair, values in metrics.items():
        assert [k for k in values if k.startswith("pair/")] == [f"pair/{pair}/vit/loss"]
        assert values[f"pair/{pair}/vit/loss"] == values["vit/loss"]
    config.loss.pair_scale = ConfigDict()
    pair = next(pair for pair in compiled if str(pair) == "s32_t48")
    _, plain = run.steps()[pair](*run.arguments())
    assert plain["vit/loss"] == metrics["s32_t48"]["vit/loss"], "losses are told before the scale"
    np.testing.assert_allclose(metrics["s32_t48"]["vit/grad_norm"] * 2, plain["vit/grad_norm"], rtol=1e-6)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("accumulate", 0, "accumulate must be at least 1, got 0"),
        ("loss.pair_scale", {"s32_t64": 2.0}, "pair_scale.s32_t64 is no pair of resolutions of this run; .*s32_t32"),
        ("loss.pair_scale", {"s32_t32": 0.0}, "loss.pair_scale.s32_t32 must be a positive number, got 0.0"),
        ("compute.attention", "flashy", "compute.attention is 'flashy': use one of"),
    ],
)
def test_bad_fields_are_named(field, value, message):
    config = one_teacher((32,))
    with config.ignore_type():
        config.update_from_flattened_dict({field: ConfigDict(value) if isinstance(value, dict) else value})
    with pytest.raises(ValueError, match=message):
        pipeline.check_config(config)
