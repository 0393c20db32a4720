"""Every recipe: complete, and exact in its parameter counts before a single array exists."""

import importlib
import pkgutil
import re

import jax
import jax.numpy as jnp
import pytest

import configs
from configs import common, direct_base, stage2_vitt
from eupe_jax.training import assemble, pipeline

RECIPES = [m.name for m in pkgutil.iter_modules(configs.__path__) if re.match(r"stage\d_(?!base)", m.name)]

BACKBONES = {
    "eupe_vitt16": 5_492_160,
    "eupe_vits16": 21_601_152,
    "eupe_vitb16": 85_669_632,
    "eupe_convnext_tiny": 27_820_128,
    "eupe_convnext_small": 49_454_688,
    "eupe_convnext_base": 87_566_464,
}
# two adapters into the proxy's width 1536, hidden 3072: 2 x (D x 3072 + 2 x 3072 + 3072 x 1536)
PROXY_WIDTH, HIDDEN = 1536, 3072


def load(name, mode=""):
    return importlib.import_module(f"configs.{name}").get_config(mode)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def abstract_student(config):
    ((model, shapes),) = abstract_students(config)
    return model, shapes


def abstract_students(config):
    students = assemble.make_students(config, assemble.describe_teachers(config))
    side = config.student_resolutions[0]
    for name, student in students.items():
        yield config.students[name].model, jax.eval_shape(lambda s=student: s.init(jax.random.key(0), side))


@pytest.mark.parametrize("recipe", [r for r in RECIPES if not r.startswith("stage1") and "family" not in r])
def test_student_and_adapter_parameters(recipe):
    model, shapes = abstract_student(load(recipe))
    assert count(shapes["params"]["backbone"]) == BACKBONES[model]
    width = {"eupe_vitt16": 192, "eupe_vits16": 384, "eupe_convnext_base": 1024}.get(model, 768)
    adapters = 2 * (width * HIDDEN + 2 * HIDDEN + HIDDEN * PROXY_WIDTH)
    assert count(shapes["params"]["adapters"]) == adapters


def test_stage1_parameters():
    config = load("stage1_proxy")
    teachers = assemble.describe_teachers(config)
    assert {n: t.out_dims for n, t in teachers.items()} == {
        "pecore": {"cls": 1536, "patches": 1536},
        "pelang": {"patches": 1536},
        "dinov3": {"cls": 1280, "patches": 1280},
    }
    model, shapes = abstract_student(config)
    assert model == "eupe_proxy"
    assert round(count(shapes["params"]["backbone"]) / 1e9, 3) == 1.851
    experts = {"pecore": 1_882_032_640, "pelang": 1_740_922_624, "dinov3": 840_633_600}
    for name, expected in experts.items():
        images = jnp.zeros((1, config.teachers[name].resolutions[0], config.teachers[name].resolutions[0], 3))
        variables = jax.eval_shape(teachers[name].module.init, jax.random.key(0), images)
        assert count(variables["params"]) == expected, name


@pytest.mark.parametrize("stage", [2, 3])
def test_figures_of_the_paper(stage):
    config = load(f"stage{stage}_vitb")
    paper = {2: (8192, 390_000, 2e-5, (256,)), 3: (4096, 100_000, 1e-5, (256, 384, 512))}[stage]
    assert (
        config.batch_size,
        config.total_steps,
        config.optimizer.learning_rate,
        tuple(config.student_resolutions),
    ) == paper
    assert tuple(config.teachers.proxy.resolutions) == paper[3]
    assert config.optimizer.weight_decay == 1e-4 and config.adapter.hidden_dim == 3072
    assert (config.loss.patch_cosine, config.loss.patch_smooth_l1) == (0.9, 0.1)


def test_every_pair_of_stage_3_can_be_given_a_factor():
    factors = load("stage3_vitb").loss.pair_scale.to_dict()
    assert factors == {f"s{student}_t{teacher}": 1.0 for student in (256, 384, 512) for teacher in (256, 384, 512)}
    assert not load("stage2_vitb").loss.pair_scale and not load("stage1_proxy").loss.pair_scale


def test_there_are_fifteen_recipes():
    assert len(RECIPES) == 15


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("mode", ["", "runlocal"])
def test_a_family_is_its_members(stage, mode):
    family = load(f"stage{stage}_family", mode).to_dict()
    assert {entry["model"] for entry in family["students"].values()} == set(BACKBONES)
    for name, entry in family["students"].items():
        alone = load(f"stage{stage}_{name}", mode).to_dict()
        assert alone.pop("students") == {name: entry}
        assert alone == {k: v for k, v in family.items() if k != "students"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_runlocal_is_small_and_complete(recipe):
    config = load(recipe, "runlocal")
    for _, shapes in abstract_students(config):
        assert count(shapes["params"]) < 200_000
    assert config.is_locked


def test_unknown_mode_is_named():
    with pytest.raises(ValueError, match="runlocl"):
        load("stage2_vitt", "runlocl")


def test_a_source_of_weight_0_need_not_be_there():
    config = stage2_vitt.get_config()
    with config.unlocked():
        config.data.sources.imagenet.weight = 0.0  # no data set of that name was made here
        config.data.sources.large = common.source("synthetic", "", weight=0.9, size=64)
    assert list(pipeline.make_loader(config).sources) == ["large"]


def test_a_teacher_on_the_host_has_no_small_version():
    experts = {"mine": common.host_teacher("some.module:Teacher", 128)}
    with pytest.raises(ValueError, match=r"teachers \['mine'\] run on the host and have no small version"):
        common.finish(direct_base.base({"vitt": "eupe_vitt16"}, experts), "runlocal")
