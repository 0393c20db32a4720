"""Bad steps: written down once each, and a stop after some in a row."""

import json

import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from eupe_jax.training import pipeline
from eupe_jax.training.health import FILE, Diverged, Health
from tests.training.conftest import tiny_config

NAN = float("nan")


def watched(workdir, limit=3, students=("vit",), enabled=True):
    config = ConfigDict({"students": {name: {} for name in students}, "faults": {"max_skipped": limit}})
    return Health(workdir, config, lambda step: {"pair": "s32_t32", "records": {"a": [step, 7]}}, enabled=enabled)


def metrics(**norms):
    """Of one step: student=gradient norm; the loss is finite where the norm is."""
    found = {}
    for name, norm in norms.items():
        value = jnp.float32(norm)
        found |= {f"{name}/grad_norm": value, f"{name}/loss": value / 2, f"{name}/a/cls_cosine": value}
        found[f"{name}/skipped"] = 1.0 - jnp.isfinite(value).astype(jnp.float32)
    return found


def feed(health, norms, start=0):
    for step, norm in enumerate(norms, start):
        health.add(step, metrics(vit=norm))
        health.check()


def lines(workdir):
    return [json.loads(line) for line in (workdir / FILE).read_text().splitlines()]


def test_a_bad_step_is_written_down_a_step_late_and_the_run_goes_on(tmp_path):
    health = watched(tmp_path)
    feed(health, [1.0, NAN])
    assert not (tmp_path / FILE).exists(), "nobody has waited for the newest step"
    feed(health, [NAN, 1.0, float("inf"), NAN], start=2)
    health.check(final=True)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 4, 5]
    assert lines(tmp_path)[2] == {
        "step": 4, "students": {"vit": {"applied": False, "loss": "inf", "grad_norm": "inf"}},
        "pair": "s32_t32", "records": {"a": [4, 7]},
    }  # fmt: skip


def test_too_many_in_a_row_stop_the_run_and_name_the_student(tmp_path):
    health = watched(tmp_path, students=("vit", "convnext"))
    with pytest.raises(Diverged, match=r"3 steps in a row, up to step 3, .*convnext.*loss nan.*--step=3") as raised:
        for step in range(9):
            health.add(step, metrics(vit=1.0, convnext=NAN if step else 1.0))
            health.check()
    assert (raised.value.step, raised.value.students) == (3, ("convnext",))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_a_loss_that_is_not_finite_is_bad_even_if_the_step_says_that_it_was_applied(tmp_path):
    health = watched(tmp_path)
    health.add(0, metrics(vit=1.0) | {"vit/loss": jnp.float32("inf")})
    health.check(final=True)
    assert lines(tmp_path)[0]["students"] == {"vit": {"applied": True, "loss": "inf", "grad_norm": 1.0}}


def test_a_resumed_run_doubles_no_line_and_counts_on(tmp_path):
    feed(watched(tmp_path), [1.0, NAN, NAN, 1.0])
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step":3,"stud')  # killed while writing
    resumed = watched(tmp_path)
    feed(resumed, [NAN, 1.0, 1.0], start=2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    with pytest.raises(Diverged, match="up to step 3"):
        feed(watched(tmp_path), [NAN, 1.0], start=3)


def test_lines_past_the_step_that_a_run_goes_on_from_are_taken_off(tmp_path):
    feed(watched(tmp_path, limit=9), [1.0, NAN, 1.0, NAN, NAN, 1.0])
    feed(watched(tmp_path), [1.0] * 4, start=3)  # what was bad is good now: another number of devices
    assert [line["step"] for line in lines(tmp_path)] == [1]
    feed(watched(tmp_path), [NAN, NAN, 1.0], start=5)  # two in a row, not four
    assert [line["step"] for line in lines(tmp_path)] == [1, 5, 6]


def test_hosts_that_do_not_write_raise_alike(tmp_path):
    health = watched(tmp_path, enabled=False)
    with pytest.raises(Diverged):
        feed(health, [NAN] * 4)
    assert not (tmp_path / FILE).exists()


def test_a_step_is_described_by_its_records_and_pair():
    config = tiny_config()
    config.batch_size, config.student_resolutions = 6, (32, 48)
    config.data.sources.other = config.data.sources.synthetic.copy_and_resolve_references()
    config.data.mixing = "record"
    data = pipeline.Data(config)
    loader = data._loader
    described = [data.describe(step) for step in range(8)]
    assert {each["pair"] for each in described} == {"s32_ta=32,b=48", "s48_ta=32,b=48"}
    for step, each in enumerate(described):
        asked, first = loader.record_ids(step).tolist(), 0
        for name, source in loader.sources.items():
            assert each["records"][name] == [i - first for i in asked if first <= i < first + len(source)]
            first += len(source)
        assert json.loads(json.dumps(each)) == each and each["seed"] == config.seed
    assert described == [pipeline.Data(config).describe(step) for step in range(8)]


@pytest.mark.parametrize(("field", "value"), [("max_skipped", 0), ("spike_factor", 0.5), ("fingerprint_every", -1)])
def test_faults_that_cannot_be_followed_are_named(field, value):
    config = tiny_config()
    config.faults[field] = value
    with pytest.raises(ValueError, match=f"faults.{field} must be"):
        pipeline.check_config(config)
