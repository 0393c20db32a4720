"""From a config to a feature cache, and what trains from one whose teachers are gone."""

import itertools
import sys
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from eupe_jax.data.teacher_stage import run_teachers
from eupe_jax.distill import resolutions
from eupe_jax.distill.adapters import AdapterBank
from eupe_jax.distill.step import Loss, Student, make_step
from eupe_jax.distill.teachers import view
from eupe_jax.sharding.mesh import make_mesh
from eupe_jax.training import assemble, pipeline, program
from eupe_jax.training.measure import measure_statistics
from eupe_jax.training.precompute import precompute
from tests.training.conftest import tiny_config

STEPS = 4
# How much a loss of about 1 may differ where features are stored in two bytes, or in one.
TOLERANCES = {"bf16": 2e-3, "int8": 4e-3}

HOST_TEACHER = '''
import numpy as np
from eupe_jax.distill.teacher_spec import TeacherSpec

class Cells:
    """Means of 16x16 cells and their squares."""

    def __init__(self, resolution=48):
        self.spec = TeacherSpec("cells", None, 6, 16, resolution, (0.0,) * 3, (1.0,) * 3, "cells")

    def __call__(self, images):
        x = images.reshape(-1, 3, 16, 3, 16, 3).mean((2, 4), dtype=np.float32) / 255
        return {"patches": np.concatenate([x, x**2], -1)}
'''


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run with an in-graph teacher and a host teacher out of a file."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "some_cells.py").write_text(HOST_TEACHER)
    sys.path.insert(0, str(folder))
    config = tiny_config(STEPS)
    del config.teachers["b"]
    config.teachers.cells = common.host_teacher("some_cells:Cells", 48, class_token="patch_mean")
    config.data.sources.synthetic.options.count = 12
    config.optimizer.learning_rate = 1e-3
    yield config
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def caches(config, tmp_path_factory):
    """name -> the config that trains from that cache, built when it is first asked for: "bf16", "int8", or "cells",
    which holds one of the two teachers."""
    folder = tmp_path_factory.mktemp("caches")

    @cache
    def build(name):
        precision, chosen = (name, []) if name in TOLERANCES else ("bf16", [name])
        precompute(config, folder / name, views=2, precision=precision, shards=2, teachers=chosen, progress=False)
        trains = config.copy_and_resolve_references()
        trains.data.feature_cache = str(folder / name)
        return trains

    return build


@pytest.fixture(scope="module")
def running(config):
    return assemble.load_teachers(config, make_mesh())


def load_without_package(config):
    """A config's teachers, where the package of the host teacher is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "some_cells", raising=False)
        patch.setattr(sys, "path", [p for p in sys.path if "package" not in p])
        teachers = assemble.load_teachers(config, make_mesh())
        assert "some_cells" not in sys.modules
    return teachers


class Patches(nn.Module):
    """The least that a student can be, so that the step compiles in a moment."""

    @nn.compact
    def __call__(self, images, train=False):
        patches = nn.gelu(nn.Conv(32, (16, 16), (16, 16))(images))
        return {"cls": patches.mean((1, 2)), "patches": patches}


def first_batches(config, teachers):
    batches = pipeline.batches(config, teachers.hosts, make_mesh(), start_step=0)
    taken = [jax.device_get(batch) for batch in itertools.islice(batches, STEPS)]
    batches.close()
    return taken


@partial(jax.jit, static_argnums=0)
def apply(module, variables, x):
    return module.apply(variables, x)


def run_live(teachers, images):
    """Features of the pixels, float32."""
    teacher = teachers.by_name["a"]
    x = view(images / np.float32(255), teacher.spec.resolution, teacher.spec.mean, teacher.spec.std)
    tokens = apply(teacher.module, teachers.variables["a"], x)
    return {"a": {kind: tokens[kind] for kind in ("cls", "patches")}} | run_teachers(teachers.hosts, images)


def test_a_cache_stands_for_its_teachers(caches, running):
    teachers = load_without_package(caches("bf16"))
    assert not teachers.variables and not teachers.hosts
    assert {n: t.spec for n, t in teachers.by_name.items()} == {n: t.spec for n, t in running.by_name.items()}
    for batch in first_batches(caches("bf16"), teachers)[:2]:
        want = run_live(running, batch["image"])
        np.testing.assert_allclose(batch["features"]["a"]["cls"], want["a"]["cls"], rtol=2**-7, atol=1e-3)
        np.testing.assert_allclose(batch["features"]["a"]["patches"], want["a"]["patches"], rtol=2**-7, atol=1e-3)
        np.testing.assert_allclose(batch["features"]["cells"]["patches"], want["cells"]["patches"], rtol=2**-8)


@pytest.mark.slow
def test_losses_are_those_of_teachers_that_run(caches, running, tmp_path):
    cached = {name: load_without_package(caches(name)) for name in TOLERANCES}
    batches = {name: first_batches(caches(name), teachers) for name, teachers in cached.items()}
    for a, b in zip(*batches.values(), strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["index"], b["index"])
    batches["live"] = [batch | {"features": run_live(running, batch["image"])} for batch in batches["int8"]]

    config, teachers = caches("bf16"), cached["bf16"]
    statistics = {name: s.arrays() for name, s in measure_statistics(config, tmp_path).items()}
    adapters = AdapterBank(16, {t: teacher.out_dims for t, teacher in teachers.by_name.items()})
    student = Student(Patches(), adapters, optax.adamw(1e-3), (0.5,) * 3, (0.25,) * 3)
    chosen = resolutions.choose(config.seed, 0, config.student_resolutions, pipeline.teacher_sizes(config))
    step = jax.jit(make_step({"it": student}, teachers.by_name, chosen, Loss(), seed=config.seed))
    start = {"step": jnp.int32(0), "students": {"it": jax.jit(student.init, static_argnums=1)(jax.random.key(0), 32)}}
    losses = {}
    for name, stream in batches.items():
        state, losses[name] = start, []
        for batch in stream:
            state, metrics = step(state, batch, {}, statistics)
            losses[name].append({k: float(v) for k, v in metrics.items() if "grad" not in k})
    for precision, tolerance in TOLERANCES.items():
        for got, want in zip(losses[precision], losses["live"], strict=True):
            assert len(want) == 8  # three parts a teacher, their sum, and whether the step was skipped
            for part, value in want.items():
                assert abs(got[part] - value) < tolerance * max(1, value), (precision, part)
    assert losses["int8"] != losses["bf16"] != losses["live"]


def test_a_teacher_that_is_not_cached_runs_on_the_pixels_of_the_cache(caches, running):
    config = caches("cells")
    teachers = assemble.load_teachers(config, make_mesh())
    assert not teachers.hosts and set(teachers.variables) == {"a"}
    batch, *_ = first_batches(config, teachers)
    targets = pipeline.TeacherForward(config, teachers)(0, batch)
    want = run_live(running, batch["image"])
    np.testing.assert_allclose(targets["a"]["patches"], want["a"]["patches"], atol=1e-4)
    np.testing.assert_allclose(targets["cells"]["patches"], want["cells"]["patches"], rtol=2**-8)
    np.testing.assert_allclose(targets["cells"]["cls"], want["cells"]["patches"].mean((1, 2)), rtol=2**-7)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("teachers.cells.class_token", "none", "teachers.cells.class_token was 'patch_mean', not 'none'"),
        ("data.crop_scale", (0.5, 1.0), "data.crop_scale was"),
        ("augment.flip_p", 0.0, "augment.flip_p was 0.5, not 0.0"),
    ],
)
def test_a_cache_of_other_settings_is_refused(caches, field, value, words):
    config = caches("bf16").copy_and_resolve_references()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=words):
        assemble.load_teachers(config, make_mesh())


def test_a_cache_without_any_teacher_of_the_run_gives_its_pixels(caches):
    config = caches("cells").copy_and_resolve_references()
    batch, *_ = first_batches(config, assemble.load_teachers(config, make_mesh()))
    del config.teachers["cells"]
    teachers = assemble.load_teachers(config, make_mesh())
    assert set(teachers.by_name) == {"a"}
    alone, *_ = first_batches(config, teachers)
    np.testing.assert_array_equal(alone["image"], batch["image"])
    assert alone.keys() == program.abstract_batch(config, teachers.by_name, make_mesh()).keys()  # nothing of others
    assert pipeline.device_augment(config, teachers.by_name) is None  # it was augmented when it was cached


def test_what_cannot_be_cached_is_said(config, tmp_path):
    several = config.copy_and_resolve_references()
    several.teachers.a.resolutions = (32, 48)
    with pytest.raises(ValueError, match=r"teachers.a.resolutions lists \(32, 48\)"):
        precompute(several, tmp_path, views=1)
    several = config.copy_and_resolve_references()
    several.data.sources.more = common.source("synthetic", "", size=48)
    with pytest.raises(ValueError, match="data.sources names .*'more'.* exactly one"):
        precompute(several, tmp_path, views=1)
    with pytest.raises(ValueError, match=r"no teachers \['nobody'\]"):
        precompute(config, tmp_path, views=1, teachers=["nobody"])
    assert not list(tmp_path.iterdir())
