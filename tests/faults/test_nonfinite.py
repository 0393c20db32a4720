"""NaN and infinities put into every part of real runs: no step with them is applied, each is written down with its
records, too many in a row stop the run, and the words name the part that was first. A replay says the same."""

import contextlib
import json
import signal
import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from configs import common
from eupe_jax.data import feature_cache, feature_codec
from eupe_jax.distill import losses
from eupe_jax.distill.normalization import Statistics
from eupe_jax.sharding.mesh import make_mesh
from eupe_jax.training import assemble, loop, pipeline
from eupe_jax.training.health import FILE, Diverged
from eupe_jax.training.loop import Eval
from eupe_jax.training.measure import measure_statistics
from eupe_jax.training.metrics import read_metrics
from eupe_jax.training.precompute import precompute
from eupe_jax.training.preemption import RESUME_ME
from eupe_jax.training.replay import arrays_of, in_lines, replay
from tests.faults.commands import RECIPE, Command
from tests.training.conftest import tiny_config
from tests.training.test_diagnosis import overflow, spoilt

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]

KIND = "not a number"
LIMIT, STEPS = 3, 6
QKV = "params/blocks/attn/qkv/kernel"


def encoder_config():
    config = tiny_config(STEPS)
    del config.teachers["b"]
    config.faults.max_skipped = LIMIT
    return config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run with one teacher in the graph."""
    config = encoder_config()
    folder = tmp_path_factory.mktemp("statistics")
    measure_statistics(config, folder)
    config.statistics = str(folder)
    return config


def bad_steps(workdir):
    """{step: line} of what was written down; every step stands there once."""
    lines = [json.loads(line) for line in (workdir / FILE).read_text().splitlines()]
    found = {line["step"]: line for line in lines}
    assert len(found) == len(lines)
    return found


def files_of(workdir):
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in workdir.rglob("*")}


def assert_replayed(workdir, step, words):
    """The replay of a bad step gives the values that were written down, and these words; it writes nothing."""
    before = files_of(workdir)
    found = replay(workdir, step)
    written = bad_steps(workdir)[step]
    assert found.described == {key: written[key] for key in ("pair", "seed", "records")}
    for name, values in written["students"].items():
        for what in ("loss", "grad_norm"):
            np.testing.assert_equal(found.metrics[f"{name}/{what}"], float(values[what]))
    assert words in found.first and f"first not finite: {found.first}" in list(in_lines(found))
    assert files_of(workdir) == before
    return found


def stopped(config, workdir):
    """The words that a run ends with, whose every step is bad."""
    with pytest.raises(Diverged) as raised:
        loop.train(config, workdir)
    assert raised.value.step == LIMIT - 1 and raised.value.students == ("vit",)
    written = bad_steps(workdir)
    assert list(written) == list(range(LIMIT))
    data = pipeline.Data(config)
    for step, line in written.items():
        assert not line["students"]["vit"]["applied"] and line["records"] == data.describe(step)["records"]
    return str(raised.value)


@pytest.mark.parametrize(
    ("phase", "change", "words"),
    [
        (
            "weights of a teacher",
            lambda v: spoilt(v, QKV, lambda x: x.at[1, 3, 2].set(jnp.nan)),
            f"teacher 'a': its weights are not finite: {QKV} (NaN, layers 1 of 2)",
        ),
        (
            "layer of a teacher",
            lambda v: overflow(v, "params/blocks"),
            "teacher 'a': its class tokens are NaN for 8 of 8 images",
        ),
    ],
)
def test_a_teacher_in_the_graph(config, tmp_path, monkeypatch, record, phase, change, words):
    real = assemble.load_teachers

    def load(*args):
        loaded = real(*args)
        loaded.variables["a"] = change(loaded.variables["a"])  # in memory: what was read was good
        return loaded

    monkeypatch.setattr(assemble, "load_teachers", load)
    said = stopped(config, tmp_path / "run")
    assert f"; first: {words}" in said
    if phase == "layer of a teacher":
        assert said.endswith("; first infinite in blocks/ls2, layer 1 of 2")
        assert_replayed(tmp_path / "run", 1, words)
    record(KIND, phase=phase, injected=LIMIT, detected=LIMIT, accepted=0)


def test_a_student(config, tmp_path, monkeypatch, record):
    real = assemble.init_state
    kernel = "params/adapters/a_cls/fc1/kernel"
    cases = {
        "parameters of a student": (
            lambda s: spoilt(s, f"students/vit/{kernel}", lambda x: x.at[0, 0].set(-jnp.inf)),
            f"student 'vit': its parameters are not finite before the step: {kernel} (infinite)",
        ),
        "layer of a student": (
            lambda s: overflow(s, "students/vit/params/backbone/blocks"),
            "student 'vit': the tokens that its adapters give (a/cls (NaN), a/patches (NaN)); first infinite in "
            "blocks/ls2, layer 1 of 2",
        ),
    }
    for phase, (change, words) in cases.items():
        monkeypatch.setattr(assemble, "init_state", lambda *args, change=change: change(real(*args)))
        assert stopped(config, tmp_path / phase).endswith(f"; first: {words}")
        record(KIND, phase=phase, injected=LIMIT, detected=LIMIT, accepted=0)


def test_a_gradient_alone(config, tmp_path, monkeypatch, record):
    def rough(x, y, beta=1.0):
        return jnp.mean(jnp.sqrt(jnp.abs(x - x)))  # nothing, with a slope that is none

    monkeypatch.setattr(losses, "smooth_l1_loss", rough)
    said = stopped(config, tmp_path)
    assert "vit: loss 0." in said or "vit: loss 1." in said, "the loss is finite"
    assert "first: student 'vit': gradients of adapters/a_patches/fc1/kernel (NaN)" in said
    record(KIND, phase="gradient", injected=LIMIT, detected=LIMIT, accepted=0)


def test_input_at_some_steps_and_the_run_goes_on(config, tmp_path, monkeypatch, record):
    real, bad = pipeline.device_augment, (1, 2, 4)

    def augment(*args):
        inner = real(*args)

        def run(step, images, places):
            wrong = jnp.isin(step, jnp.asarray(bad)) & (places == 5)
            return jnp.where(wrong[:, None, None, None], jnp.nan, inner(step, images, places))

        return run

    monkeypatch.setattr(pipeline, "device_augment", augment)
    workdir = tmp_path / "run"
    config = config.copy_and_resolve_references()
    config.checkpoint.keep_best, config.checkpoint.best_metric = 1, "eval/score"  # replays run no evaluation
    evals = [Eval("eval", STEPS, lambda step, state: {"score": 1.0})]
    loop.train(config, workdir, evals=evals, stop_at=2)
    state = loop.train(config, workdir, evals=evals)  # one of the bad steps was the last before it was stopped
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state)))
    assert list(bad_steps(workdir)) == list(bad)
    lines = {line["step"]: line for line in read_metrics(workdir / "metrics.jsonl")}
    assert [step for step, line in lines.items() if line.get("vit/skipped")] == [step + 1 for step in bad]
    found = assert_replayed(workdir, 4, "input images are NaN for 1 of 8 images: places 5 of the batch, records ")
    seen = arrays_of(found.batch)
    assert found.first.split("records ")[1].split(",")[0] == str(seen["index"][5]) and seen["image"].shape[0] == 8
    good = replay(workdir, 3)
    assert good.first is None and {f: lines[4][f] for f in good.metrics} == good.metrics, "the very bits"
    total = np.sqrt(sum(norm**2 for norm in good.gradients["vit"].values()))
    assert total == pytest.approx(good.metrics["vit/grad_norm"], rel=1e-4)
    record(KIND, phase="input", injected=len(bad), detected=len(bad), accepted=0)
    assert good.start == 2
    with other_statistics(config), pytest.raises(ValueError, match="statistics of teacher.s. a are not those that"):
        replay(workdir, 3)


@contextlib.contextmanager
def other_statistics(config):
    """Those of the teacher measured again, into the same folder, with other results."""
    file = epath.Path(config.statistics) / "a.safetensors"
    held, found = file.read_bytes(), Statistics.load(file)
    found.std["patches"][:] *= 1.01
    found.save(file)
    try:
        yield
    finally:
        file.write_bytes(held)


def steps_that_bring_it(config):
    """{step: places of images whose features are not finite}, from the batches themselves."""
    found = {}
    data = pipeline.Data(config)
    loaded, mesh = assemble.load_teachers(config, make_mesh()), make_mesh()
    with contextlib.closing(data.batches(loaded.hosts, mesh, start_step=0)) as batches:
        for step in range(STEPS):
            patches = np.asarray(next(batches)["features"]["cells"]["patches"])
            if len(places := np.flatnonzero(~np.isfinite(patches).all((1, 2, 3)))):
                found[step] = places.tolist()
    return found


def test_a_host_teacher_and_a_feature_cache(tmp_path, monkeypatch, record):
    config = encoder_config()
    del config.teachers["a"]
    config.teachers.cells = common.host_teacher("tests.faults.spoilt_teacher:Cells", 48, spoilt=0, value="nan")
    config.statistics = str(tmp_path / "statistics")
    config.faults.max_skipped = STEPS + 1
    measure_statistics(config, config.statistics)
    cached = config.copy_and_resolve_references()
    precompute(cached, tmp_path / "cache", views=1, shards=1, progress=False)
    cached.data.feature_cache = str(tmp_path / "cache")
    config.teachers.cells.kwargs.spoilt = 14
    with pytest.raises(ValueError, match="cells.patches: features are not finite"):
        precompute(config, tmp_path / "other", views=1, shards=1, progress=False)
    record(KIND, phase="feature cache that is built", injected=1, detected=1, accepted=0)

    def decode(key, arrays, out):
        feature_codec.decode_features(key, arrays, out)
        if key == "cells.patches" and arrays["index"] % 11 == 0:
            out[2, 1, 3] = np.inf  # in memory: what is stored is checked

    monkeypatch.setattr(feature_cache, "decode_features", decode)
    for phase, each in (("host teacher", config), ("feature cache", cached)):
        bad, workdir = steps_that_bring_it(each), tmp_path / phase
        assert 0 < len(bad) < STEPS, "some steps, not all"
        state = loop.train(each, workdir)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state)))
        assert list(bad_steps(workdir)) == list(bad)
        step, places = list(bad.items())[-1]
        kind = {"host teacher": "NaN", "feature cache": "infinite"}[phase]
        words = (
            f"teacher 'cells': its patch tokens are {kind} for {len(places)} of 8 images: places "
            f"{', '.join(map(str, places))} of the batch, records "
        )
        found = assert_replayed(workdir, step, words)
        assert found.first.endswith(f", as the batch brings them ({phase})")
        record(KIND, phase=phase, injected=len(bad), detected=len(bad), accepted=0)


def test_a_learning_rate_that_is_too_large_ends_a_command_and_is_replayed_by_one(tmp_path, cache, record):
    """Nothing is put in: the first update itself makes weights of which the next forward pass overflows."""
    workdir = tmp_path / "run"
    fields = ["--config.optimizer.learning_rate=1e37", "--config.optimizer.warmup_steps=0", "--config.total_steps=9"]
    fields += ["--config.faults.max_skipped=3", "--config.checkpoint.save_every=2"]
    train = Command(["launch/train.py", f"--workdir={workdir}", RECIPE, *fields], tmp_path / "train.log", cache)
    assert train.end() == 2, train.printed[-3000:]
    (line,) = [line for line in train.printed.splitlines() if line.startswith("error: ")]
    assert "3 steps in a row, up to step 3, did student(s) vitt no good" in line and "; first: student 'vitt': " in line
    assert "Traceback" not in train.printed
    saved = tmp_path / "batch.npz"
    flags = [f"--workdir={workdir}", "--step=3", f"--save_batch={saved}"]
    replayed = Command(["launch/replay.py", *flags], tmp_path / "replay.log", cache).succeed()
    assert "step 3, run again from step 2" in replayed and line.split("; first: ")[1].split(" [")[0] in replayed
    assert np.load(saved)["index"].tolist() == [i for r in bad_steps(workdir)[3]["records"].values() for i in r]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        place = f"--coordinator=127.0.0.1:{s.getsockname()[1]}"
    joined = [f"--workdir={workdir}", "--step=3", place, "--num_processes=1", "--process_id=0"]
    left = Command(["launch/replay.py", *joined], tmp_path / "left.log", cache)
    assert left.wait_for(lambda: "1 processes" in left.printed), left.printed[-3000:]
    left.process.send_signal(signal.SIGTERM)  # JAX hears it now
    assert left.end() == RESUME_ME, left.printed[-3000:]
    none = Command(["launch/replay.py", f"--workdir={workdir}", "--step=99"], tmp_path / "none.log", cache)
    assert none.end() == 2 and "error: --step=99 is no step of" in none.printed
    record(KIND, phase="learning rate", injected=3, detected=3, accepted=0)
