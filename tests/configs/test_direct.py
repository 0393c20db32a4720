"""Recipes without a proxy: what they teach, what they cost as docs/direct.md says it, and that they train."""

import importlib
import json
import math
import os
import subprocess
import sys

import jax
import pytest

from eupe_jax.distill.resolutions import every
from eupe_jax.training import assemble
from eupe_jax.training.model_flops import BACKWARD, step_flops
from tests.docs.pages import ROOT, tables

PAGE = (ROOT / "docs" / "direct.md").read_text()
DIRECT = ["direct_vitb", "direct_large_vitb", "direct_dinov3l_vitt"]


def load(name, mode=""):
    return importlib.import_module(f"configs.{name}").get_config(mode)


def costs(name):
    """(TFLOPs an image of experts, of what is trained with its gradients, millions of images) of one resolution."""
    config = load(name)
    ((pair,)) = [every(config.student_resolutions, {n: t.resolutions for n, t in config.teachers.items()})]
    flops = step_flops(config, pair[0])
    images = config.total_steps * config.batch_size / 1e6
    return sum(flops.teachers.values()) / 1e12, BACKWARD * flops.trained / 1e12, images


def test_the_costs_of_the_page():
    ((_, rows),) = [t for t in tables(PAGE) if t[0][:2] == ["recipe", "experts"] and "an image" in t[0]]
    assert [row[0].strip("`") for row in rows] == ["stage1_proxy", "stage2_vitb", *DIRECT]
    runs = {}
    for name, *cells, share in [[row[0].strip("`"), *row[1:]] for row in rows]:
        experts, trained, images = costs(name)
        runs[name] = (experts + trained) * images * 1e6 * 1e12 / 1e21
        want = [f"{experts:.3f}", f"{trained:.3f}", f"{experts + trained:.3f}", f"{images:.0f}", f"{runs[name]:.2f}"]
        assert cells == want, name
        part = 100 * runs[name] / (runs["stage1_proxy"] + runs.get("stage2_vitb", math.inf))
        assert share == (f"{part:.0f}%" if part > 10 else f"{part:.1f}%") * name.startswith("direct")
    large, small = (runs[name] * 1e21 / (8 * 0.4 * 989e12) / 86400 for name in DIRECT[1:])
    sentence = f"`{DIRECT[1]}` takes {large:.1f} days on eight of them, `{DIRECT[2]}` {small:.1f}."
    assert sentence in PAGE.replace("\n", " ")


@pytest.mark.parametrize("name", DIRECT)
def test_experts_are_those_that_are_named(name):
    teachers = assemble.describe_teachers(load(name))
    widths = {n: t.out_dims for n, t in teachers.items()}
    large = {"cls": 1024, "patches": 1024}
    wanted = {
        "direct_vitb": {
            "pecore": {"cls": 1536, "patches": 1536},
            "pelang": {"patches": 1536},
            "dinov3": {"cls": 1280, "patches": 1280},
        },
        "direct_large_vitb": {"dinov3": large, "pecore": large},
        "direct_dinov3l_vitt": {"dinov3": large},
    }
    assert widths == wanted[name]


def test_stage_2_only_is_stage_2_with_the_experts_of_stage_1():
    direct, stage1, stage2 = load("direct_vitb"), load("stage1_proxy"), load("stage2_vitb")
    assert direct.teachers.to_dict() == stage1.teachers.to_dict()
    direct, stage2 = direct.copy_and_resolve_references().unlock(), stage2.copy_and_resolve_references().unlock()
    for config in (direct, stage2):
        del config.teachers
    stage2.data.image_size = stage1.data.image_size  # the experts' input
    assert direct.to_dict() == stage2.to_dict()


@pytest.mark.parametrize("name", DIRECT)
def test_runlocal_is_small_and_complete(name):
    config = load(name, "runlocal")
    students = assemble.make_students(config, assemble.describe_teachers(config))
    for student in students.values():
        shapes = jax.eval_shape(lambda s=student: s.init(jax.random.key(0), config.student_resolutions[0]))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) < 200_000
    assert config.is_locked and set(config.teachers) == set(load(name).teachers)


@pytest.mark.slow  # a compilation each
@pytest.mark.parametrize("name", DIRECT)
def test_runlocal_trains(name, tmp_path):
    command = [sys.executable, "launch/train.py", f"--config=configs/{name}.py:runlocal", f"--workdir={tmp_path}/run"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    config = load(name, "runlocal")
    assert lines[-1]["step"] == config.total_steps
    (student,) = config.students
    parts = {f"{student}/{n}/patch_cosine" for n in config.teachers}
    parts |= {f"{student}/{n}/cls_cosine" for n, entry in config.teachers.items() if entry.class_token != "none"}
    assert {key for key in lines[-1] if key.endswith("_cosine")} == parts
    assert all(math.isfinite(line[f"{student}/loss"]) and line[f"{student}/skipped"] == 0 for line in lines)
