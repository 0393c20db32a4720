"""Whole runs: stop and resume, several students, other meshes, starting points, refusals."""

import contextlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

import eupe_jax
from configs import common
from eupe_jax.distill.normalization import Statistics, StatisticsMismatch
from eupe_jax.models import interchange
from eupe_jax.sharding import rules
from eupe_jax.sharding.mesh import make_mesh
from eupe_jax.training import assemble, checkpoints, loop, pipeline, workdirs
from eupe_jax.training.integrity import CorruptCheckpoint
from eupe_jax.training.loop import Eval, train
from eupe_jax.training.measure import measure_statistics
from eupe_jax.training.metrics import read_metrics
from eupe_jax.training.watchdog import Watchdog
from tests.training.conftest import tiny_config


def leaves(tree):
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same(a, b, tolerance=0.0):
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=tolerance, err_msg=name)


@pytest.fixture(scope="module")
def whole_run(tiny_statistics, tmp_path_factory):
    config = tiny_config(steps=4)
    config.statistics = tiny_statistics
    workdir = tmp_path_factory.mktemp("whole")
    return config, workdir, jax.device_get(train(config, workdir))


def test_stopped_and_resumed_equals_never_stopped(whole_run, tmp_path):
    config, workdir, state = whole_run
    train(config, tmp_path, stop_at=1)
    train(config, tmp_path, stop_at=3, profile=(1, 2))
    resumed = train(config, tmp_path, profile=(1, 2))
    assert_same(resumed, state)
    whole, parts = (read_metrics(w / "metrics.jsonl") for w in (workdir, tmp_path))
    assert [line["step"] for line in parts] == [1, 2, 3, 4]
    assert whole == parts
    # how fast it went stands apart
    timings = read_metrics(tmp_path / "timings.jsonl")
    assert [line["step"] for line in timings] == [1, 2, 3, 4]
    assert all(line["performance/tflops_per_device"] > 0 and line["time/step_s"] > 0 for line in timings)
    (trace,) = (tmp_path / "profile" / "plugins" / "profile" / "steps_2_2").glob("*.xplane.pb")
    assert trace.stat().st_size > 1000
    with pytest.raises(ValueError, match="--profile=9:9: this run ends with step 4"):
        train(config, tmp_path, profile=(9, 9))


def test_training_moves_towards_the_teachers(whole_run):
    _, workdir, _ = whole_run
    losses = [line["vit/loss"] for line in read_metrics(workdir / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.05


def test_crash_loses_only_what_was_not_saved(whole_run, tmp_path, monkeypatch):
    config, _, state = whole_run

    def crash(step, state):
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train(config, tmp_path, evals=[Eval("crash", 3, crash)])
    assert checkpoints.step_directory(tmp_path).name == "3", "saved before it evaluates"

    # hosts that do not evaluate wait for the one that does, and none of them takes that for a stall
    waited, watchdogs = [], []
    monkeypatch.setattr(loop, "Watchdog", lambda *args: watchdogs.append(Watchdog(*args)) or watchdogs[-1])
    monkeypatch.setattr(loop, "sync_global_devices", lambda name: waited.append((name, watchdogs[-1]._began is None)))
    assert_same(train(config, tmp_path, evals=[Eval("calm", 4, lambda step, state: {"x": 1.0})]), state)
    assert waited[:-1] == [("evaluated step 4", True)]
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 4]


def test_another_mesh_gives_the_same_run(whole_run, tmp_path, monkeypatch):
    config, _, state = whole_run
    config = config.copy_and_resolve_references()
    train(config, tmp_path, stop_at=2)
    monkeypatch.setattr(rules, "MIN_ELEMENTS", 1)  # the real one leaves so small a model whole
    config.mesh.fsdp = 4
    resumed = train(config, tmp_path)
    cut = [x for x in jax.tree.leaves(resumed) if not x.is_fully_replicated]
    assert len(cut) > 20 and cut[0].addressable_shards[0].data.size * 4 == cut[0].size
    assert_same(resumed, state, tolerance=2e-5)


def test_workdir_may_be_relative(whole_run, tmp_path, monkeypatch):
    config, _, _ = whole_run
    monkeypatch.chdir(tmp_path)
    train(config, "runs/here", stop_at=1)
    assert eupe_jax.load_encoder("runs/here").manifest["step"] == 1


def test_load_encoder(whole_run):
    config, workdir, state = whole_run
    encoder = eupe_jax.load_encoder(workdir)
    assert (encoder.name, encoder.resolution, encoder.student) == ("eupe_vitt16", 32, "vit")
    assert_same(encoder.variables["params"], state["students"]["vit"]["params"]["backbone"])
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 56, 3), dtype=np.uint8)
    tokens = encoder(images)
    assert {k: v.shape for k, v in tokens.items()} == {"cls": (2, 32), "storage": (2, 4, 32), "patches": (2, 2, 2, 32)}
    np.testing.assert_allclose(encoder(images / 255.0)["cls"], tokens["cls"], atol=1e-5)
    with pytest.raises(ValueError, match="name one"):
        eupe_jax.load_encoder(workdir, student="vitb")
    with pytest.raises(FileNotFoundError, match="no such path"):
        eupe_jax.load_encoder(workdir / "nowhere")


def test_family_trains_like_its_members_alone(whole_run, tmp_path):
    """The ViT as without the ConvNeXt; tests/training/test_family.py has every member of a family alone as well."""
    config, _, state = whole_run
    family = tiny_config(steps=4, students=("vit", "convnext"))
    family.statistics = config.statistics
    found = train(family, tmp_path)["students"]
    assert_same(found["vit"], state["students"]["vit"], tolerance=1e-5)
    for line in read_metrics(tmp_path / "metrics.jsonl"):
        assert line["convnext/skipped"] == 0 and line["convnext/grad_norm"] > 0
    assert eupe_jax.load_encoder(tmp_path, "convnext").name == "eupe_convnext_tiny"


def test_next_stage_starts_from_this_one(whole_run, tmp_path):
    config, workdir, state = whole_run
    following = config.copy_and_resolve_references()
    following.students.vit.init_from = str(workdir)
    following.statistics, following.statistics_from = "", str(workdir)
    following.student_resolutions = (32, 48)
    following.optimizer.learning_rate = 0.0
    moved = train(following, tmp_path / "next", stop_at=1)
    assert_same(moved["students"]["vit"]["params"], state["students"]["vit"]["params"])
    following.adapter.hidden_dim = 24
    with pytest.raises(ValueError, match="init_adapters=False"):
        train(following, tmp_path / "other")
    source = tmp_path / "damaged"
    shutil.copytree(checkpoints.step_directory(workdir), source)
    spoil(source / "vit.adapters")
    following.students.vit.init_from = str(source)
    with pytest.raises(CorruptCheckpoint, match="vit.adapters/"):
        train(following, tmp_path / "other")


def spoil(folder):
    """Another last byte in the largest file there."""
    file = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_a_damaged_checkpoint_stops_the_run_or_is_put_aside(whole_run, tmp_path):
    config, whole, state = whole_run
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    spoil(workdir / "checkpoints" / "4")
    with pytest.raises(ValueError, match="on_corrupt is 'ignore': use one of stop, fallback"):
        train(config, workdir, on_corrupt="ignore")
    with pytest.raises(CorruptCheckpoint, match="--on_corrupt=fallback"):
        train(config, workdir)
    assert_same(train(config, workdir, on_corrupt="fallback"), state)
    assert [p.name for p in (workdir / "damaged").iterdir()] == ["4"]
    assert read_metrics(workdir / "metrics.jsonl") == read_metrics(whole / "metrics.jsonl")


def test_errors_of_closing_do_not_hide_the_first(caplog):
    closed = []

    class Part:
        def __init__(self, name):
            self.name = name

        def close(self):
            closed.append(self.name)
            raise OSError(f"{self.name} does not close")

    def run(error=None):
        with contextlib.ExitStack() as opened:
            for name in ("saver", "batches"):
                loop._close_at_end(opened, Part(name))
            if error:
                raise error

    with pytest.raises(RuntimeError, match="lost"):
        run(RuntimeError("lost: connection reset"))  # a bucket's: there is no other process
    with pytest.raises(OSError, match="batches does not close"):
        run()
    assert closed == 2 * ["batches", "saver"] and "saver does not close" in caplog.text


def test_start_from_an_official_file(whole_run, tmp_path):
    config, _, state = whole_run
    student = state["students"]["vit"]
    variables = {"params": student["params"]["backbone"], "buffers": student["buffers"]}
    overrides = config.students.vit.overrides.to_dict()
    weights = interchange.to_state_dict("eupe_vitt16", variables, **overrides)
    safetensors.numpy.save_file(weights, tmp_path / "official.safetensors")
    starting = config.copy_and_resolve_references()
    starting.students.vit.init_from = str(tmp_path / "official.safetensors")
    starting.student_resolutions, starting.optimizer.learning_rate = (32, 48), 0.0  # as the next stage
    moved = train(starting, tmp_path / "run", stop_at=1)["students"]["vit"]
    assert_same(moved["params"]["backbone"], student["params"]["backbone"])
    del weights["norm.weight"]
    safetensors.numpy.save_file(weights, tmp_path / "official.safetensors")
    with pytest.raises(ValueError, match="norm.weight"):
        train(starting, tmp_path / "other")


def test_proxy_as_teacher_brings_its_chain(whole_run, tmp_path):
    config, workdir, state = whole_run
    config = tiny_config(steps=1)
    del config.teachers["a"], config.teachers["b"]
    config.teachers.proxy = common.encoder_teacher("eupe_vitt16", (32,), checkpoint=str(workdir))
    config.teachers.proxy.dtype = "float32"
    measure_statistics(config, tmp_path / "statistics")
    config.statistics = str(tmp_path / "statistics")
    train(config, tmp_path / "student")
    chain = checkpoints.restore_item(checkpoints.step_directory(tmp_path / "student"), "chain")
    assert_same(chain["proxy"]["adapters"], state["students"]["vit"]["params"]["adapters"])
    assert set(chain["proxy"]["statistics"]) == {"a", "b"}
    items = {p.name for p in checkpoints.step_directory(tmp_path / "student").iterdir()}
    assert not any("proxy" in item for item in items), "a teacher's backbone must not be in a checkpoint"


def test_statistics_of_another_teacher_are_refused(whole_run, tmp_path):
    config, _, _ = whole_run
    other = config.copy_and_resolve_references()
    other.teachers.a.overrides.layerscale_init = 0.25
    with pytest.raises(StatisticsMismatch, match="'a'.*another teacher"):
        train(other, tmp_path)
    other = config.copy_and_resolve_references()
    other.teachers.a.resolutions = (64,)
    with pytest.raises(StatisticsMismatch, match="resolution.*statistics_from"):
        train(other, tmp_path)
    other.statistics, other.statistics_from = "", config.statistics
    found = assemble.find_statistics(other, assemble.load_teachers(other, make_mesh()).by_name)
    for name, statistics in found.items():
        wanted = Statistics.load(epath.Path(config.statistics) / f"{name}.safetensors").arrays()
        jax.tree.map(np.testing.assert_array_equal, statistics.arrays(), wanted)
    assert set(found) == {"a", "b"}


def test_other_statistics_in_the_same_workdir_are_refused(whole_run):
    """They may have been measured again, into the same folder."""
    config, workdir, _ = whole_run
    step = checkpoints.step_directory(workdir)
    arrays = {name: Statistics.load(epath.Path(config.statistics) / f"{name}.safetensors").arrays() for name in "ab"}
    workdirs.check_statistics(step, arrays)
    arrays["b"]["std"]["patches"] = arrays["b"]["std"]["patches"] * np.float32(1.01)
    with pytest.raises(ValueError, match="the statistics of teacher.s. b are not those that .*/4 was trained with"):
        workdirs.check_statistics(step, arrays)


def test_a_run_is_set_aside_whole(whole_run, tmp_path):
    config, workdir, _ = whole_run
    run = epath.Path(shutil.copytree(workdir, tmp_path / "run"))
    (run / "train.log").write_text("of the shell")
    before = {str(path.relative_to(run)) for path in Path(run).rglob("*")}
    assert workdirs.set_aside(run) == run / "old.0"
    assert sorted(path.name for path in run.iterdir()) == ["old.0", "train.log"], "nothing of the run is left"
    assert {str(p.relative_to(run / "old.0")) for p in Path(run / "old.0").rglob("*")} == before - {"train.log"}
    assert workdirs.set_aside(run) is None
    (run / "config.json").write_text("{}")
    (run / "statistics").mkdir()
    assert workdirs.set_aside(run, keep=("statistics",)) == run / "old.1"
    assert (run / "statistics").exists(), "the next run takes it"


def test_another_config_in_the_same_workdir_is_refused(whole_run):
    config, workdir, _ = whole_run
    other = config.copy_and_resolve_references()
    other.optimizer.weight_decay = 0.5
    other.data.max_broken_fraction = 0.5  # what stops a run may be changed to go on with it
    with pytest.raises(ValueError, match=r"go back to: optimizer.weight_decay=0.0001 \(now 0.5\)\n") as refused:
        train(other, workdir)
    assert "fields that a resumed run may change: log_every, loggers, checkpoint," in refused.value.__notes__[0]


def test_what_only_rounds_may_change_and_what_teachers_say_may_not(whole_run):
    config, workdir, _ = whole_run
    assert json.loads((workdir / "config.json").read_text())["compute"]["teacher_gelu"] == "exact"
    other = config.copy_and_resolve_references()
    other.students.vit.remat = "full"
    other.students.vit.overrides.scan_unroll = 2
    other.teachers.a.overrides.scan_unroll = 2
    loop.check_run(other, workdir, [])
    other.compute.teacher_gelu = "tanh"
    with pytest.raises(ValueError, match=r"go back to: compute.teacher_gelu='exact' \(now 'tanh'\)\n"):
        loop.check_run(other, workdir, [])


def test_a_run_whose_notes_are_gone_or_damaged_is_still_known(whole_run, tmp_path):
    config, workdir, _ = whole_run
    run = epath.Path(shutil.copytree(workdir, tmp_path / "run"))
    other = config.copy_and_resolve_references()
    other.optimizer.weight_decay = 0.5
    for name, check in (
        ("config.json", lambda: loop.check_run(config, run, [])),
        ("data.json", lambda: workdirs.check_data(run, json.loads((workdir / "data.json").read_text()))),
    ):
        for content in ("", '{"seed": 0, "stu', "[]"):
            (run / name).write_text(content)
            with pytest.raises(ValueError, match=f"run/{name} is damaged"):
                check()
        (run / name).unlink()
    loop.check_run(config, run, [])
    with pytest.raises(ValueError, match=r"go back to: optimizer.weight_decay=0.0001 \(now 0.5\)\n"):
        loop.check_run(other, run, [])
    with pytest.raises(ValueError, match="run/data.json is missing, but there is .*run/checkpoints/4"):
        train(config, run)
    assert not (run / "config.json").exists()


def test_micro_batches_are_no_free_choice_where_targets_are_shuffled_within_them(tiny_statistics, tmp_path):
    config = tiny_config(steps=4)
    config.batch_size = 16
    for shuffled in (False, True):
        config.loss.shuffle_targets, config.accumulate = shuffled, 1
        (tmp_path / "config.json").write_text(json.dumps(loop.check_run(config, tmp_path, [], fresh=True)[0].to_dict()))
        config.accumulate = 2
        if shuffled:
            with pytest.raises(ValueError, match=r"go back to: accumulate=1 \(now 2\)\n"):
                loop.check_run(config, tmp_path, [])
        else:
            loop.check_run(config, tmp_path, [])


@pytest.fixture
def folder_run(tiny_statistics, tmp_path):
    """Config of a run on a folder of ten pictures, two of them broken."""
    (tmp_path / "photos").mkdir()
    for i in range(10):
        Image.new("RGB", (50, 50), (20 * i, 90, 0)).save(tmp_path / "photos" / f"{i}.png")
    for i in (3, 4):
        (tmp_path / "photos" / f"{i}.png").write_bytes(b"")
    config = tiny_config(steps=4)
    del config.teachers["b"]  # quicker
    config.statistics_from = tiny_statistics
    config.data.sources = ConfigDict({"photos": common.source("images", str(tmp_path / "photos"))})
    return config


def broken_of_steps(config, start, *befores):
    """What is counted between these steps, asked for one batch later, as the loop does."""
    data = pipeline.Data(config)
    batches, found = data.batches({}, make_mesh(), start_step=start), []
    taken = start
    for before in befores:
        while taken <= before:
            next(batches)
            taken += 1
        found.append(batches.broken(before=before))
    batches.close()
    assert batches.broken(before=befores[-1]) == {}, "each is told once"
    return found


def test_broken_records_are_counted_in_the_metrics_and_other_data_refused(folder_run, tmp_path):
    config, workdir, name = folder_run, tmp_path / "run", "data/broken/photos/empty"
    counted = broken_of_steps(config, 0, 1, 2, 3, 4)
    assert broken_of_steps(config, 2, 3, 4) == counted[2:], "a function of the steps, wherever a run began"
    assert broken_of_steps(config, 0, 4) == [{name: sum(c.get(name, 0) for c in counted)}]
    data = pipeline.Data(config)
    asked = np.concatenate([data._loader.record_ids(step) for step in range(4)])
    assert sum(c.get(name, 0) for c in counted) >= np.isin(asked, (3, 4)).sum() > 0

    train(config, workdir, stop_at=2)
    lines = read_metrics(workdir / "metrics.jsonl")
    assert [{k: v for k, v in line.items() if k.startswith("data/")} for line in lines] == counted[:2]

    before = (workdir / "metrics.jsonl").read_text()
    Image.new("RGB", (9, 9)).save(tmp_path / "photos" / "new.png")
    with pytest.raises(ValueError, match=r"other data.*data.sources.photos.digest was .*photos.records was 10, not 11"):
        train(config, workdir)
    assert (workdir / "metrics.jsonl").read_text() == before
    (tmp_path / "photos" / "new.png").unlink()
    (tmp_path / "photos" / "5.png").write_bytes(b"another size")
    with pytest.raises(ValueError, match="other data.*data.sources.photos.digest was '[0-9a-f]+', not '[0-9a-f]+'$"):
        train(config, workdir)


def test_hosts_that_see_other_data_are_named(tmp_path, monkeypatch):
    def gather(digest):
        return np.stack([digest, digest, digest ^ 1])

    monkeypatch.setattr(workdirs, "process_allgather", gather)
    with pytest.raises(ValueError, match=r"hosts \[2\] see other data than host 0: .*'records': 3"):
        workdirs.check_data(tmp_path, {"sources": {"a": {"records": 3, "digest": "x"}}})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("total_steps", 0, "total_steps must be at least 1"),
        ("student_resolutions", (), "student_resolutions"),
        ("statistics", "", "exactly one"),
        ("statistics", "nowhere", "no statistics at"),
        ("optimizer.lr_scaling", "cube", "lr_scaling"),
        ("optimizer.warmup_steps", 99, "warmup_steps"),
        ("teachers.a.checkpoint", "", "teachers.a.checkpoint is empty"),
        ("teachers.a.checkpoint", "/nowhere", "no checkpoint at /nowhere"),
        ("teachers.a.class_token", "sum", "teachers.a.class_token"),
        ("students.vit.model", "eupe_vitt61", "did you mean"),
        ("mesh.fsdp", 3, "does not divide"),
    ],
)
def test_bad_fields_are_named(tiny_statistics, tmp_path, field, value, message):
    config = tiny_config()
    config.statistics = tiny_statistics
    with config.ignore_type():
        config.update_from_flattened_dict({field: value})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(config, tmp_path)
    assert not (tmp_path / "config.json").exists() and not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(("field", "value"), [("total_steps", 0), ("mesh.fsdp", 3)])
def test_what_is_refused_at_once_leaves_no_folder(tmp_path, field, value):
    config = tiny_config()
    config.update_from_flattened_dict({field: value})
    for begin in (train, measure_statistics):
        with pytest.raises(ValueError, match=field):
            begin(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_sizes_that_do_not_fit_the_patch_are_refused_before_anything_is_loaded():
    config = tiny_config()
    config.student_resolutions = (32, 40)
    with pytest.raises(ValueError, match=r"students.vit .* multiples of 16 pixels, not \[40\]; nearest: \[32, 48\]"):
        pipeline.check_config(config)
