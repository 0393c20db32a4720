"""Evaluations alone and inside training: same figures, no trace in what is trained, nothing lost by a kill."""

import io
import json
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from configs import common
from eupe_jax.evals import knn
from eupe_jax.sharding.mesh import AXES, replicated
from eupe_jax.training import checkpoints
from eupe_jax.training.loop import Eval, train
from eupe_jax.training.measure import measure_statistics
from eupe_jax.training.metrics import read_metrics
from launch.training_evals import training_evals
from tests.evals.image_sets import write_shards
from tests.launch.test_commands import ROOT, assert_one_line, run
from tests.training.conftest import tiny_config
from tests.training.test_loggers import values_of

SMALL = {"resize": 32, "crop": 32, "ks": (3,), "reported_k": 3, "batch_size": 6}


def evaluated_config(folder):
    """A tiny run with the statistics and the images in `folder`: kNN every second step, pictures every fourth."""
    config = tiny_config(steps=4)
    config.statistics = f"{folder}/statistics"
    config.evals.neighbours = common.evaluation("knn", f"{folder}/set", 2, **SMALL)
    config.evals.features = common.evaluation("pca", f"{folder}/set", 4, resolutions=(32,), images=2, cell=32)
    return config


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """The config and the run it makes."""
    folder = tmp_path_factory.mktemp("evaluated")
    measure_statistics(tiny_config(steps=4), folder / "statistics")
    write_shards(folder / "set")
    config = evaluated_config(folder)
    state = train(config, folder / "run", evals=training_evals(config, folder / "run"))
    return config, folder, state


def losses(workdir):
    return [line["vit/loss"] for line in read_metrics(workdir / "metrics.jsonl") if "vit/loss" in line]


def evaluated(workdir):
    return [line for line in read_metrics(workdir / "metrics.jsonl") if "neighbours/vit/top1" in line]


def test_evaluating_leaves_no_trace_in_what_is_trained(setting, tmp_path):
    config, folder, state = setting
    calm = config.copy_and_resolve_references()
    calm.evals = ConfigDict()
    plain = train(calm, tmp_path / "run", evals=training_evals(calm, tmp_path / "run"))
    assert losses(tmp_path / "run") == losses(folder / "run") and len(losses(folder / "run")) == 4
    jax.tree.map(np.testing.assert_array_equal, plain["students"], state["students"])
    rows = evaluated(folder / "run")
    assert [row["step"] for row in rows] == [2, 4] and all(0 <= row["neighbours/vit/top1"] <= 1 for row in rows)


def test_devices_may_stand_in_any_order(setting, tmp_path):
    """On a torus the run's mesh does not have them in the order of their numbers."""
    config, folder, state = setting
    devices = np.asarray(jax.devices())[::-1].reshape(-1, 1, 1)
    moved = jax.device_put(jax.device_get(state), replicated(Mesh(devices, AXES)))
    (each,) = [each for each in training_evals(config, tmp_path) if each.name == "neighbours"]
    found = {f"neighbours/{name}": value for name, value in each.run(4, moved).items() if not np.ndim(value)}
    assert {"step": 4, **found} == evaluated(folder / "run")[-1]


def test_pictures_and_statistics_are_shown_beside_the_figures(setting):
    """What TensorBoard shows of a run: curves of every teacher, targets' statistics, pictures of features over time."""
    config, folder, _ = setting
    shown = values_of(folder / "run" / "tensorboard")
    lines = [line for line in read_metrics(folder / "run" / "metrics.jsonl") if "vit/loss" in line]
    for teacher in config.teachers:
        for name in ("cls_cosine", "patch_cosine", "patch_smooth_l1"):
            curve = [shown[f"vit/{teacher}/{name}", line["step"]].simple_value for line in lines]
            assert curve == pytest.approx([line[f"vit/{teacher}/{name}"] for line in lines]) and len(curve) == 4
        for kind in ("cls", "patches"):
            for what in ("mean", "std"):
                assert shown[f"statistics/{teacher}/{kind}_{what}", 0].histo.num == 32
    stored = Image.open(folder / "run/evals/features/vit/4/pca.png")
    seen = Image.open(io.BytesIO(shown["features/vit/pca", 4].image.encoded_image_string))
    np.testing.assert_array_equal(np.asarray(seen), np.asarray(stored))
    assert ("neighbours/vit/top1", 2) in shown and ("config/text_summary", 0) in shown
    assert 0 < shown["features/vit/explained_vit_32", 4].simple_value <= 1
    alone = values_of(folder / "run/evals/neighbours/vit/4/tensorboard")
    assert alone["knn/top1", 4].simple_value == pytest.approx(evaluated(folder / "run")[-1]["neighbours/vit/top1"])
    assert any(value.HasField("image") for value in alone.values())


KILLED_RUN = """
import os, signal, sys
import tests.conftest
from eupe_jax.evals import knn
from eupe_jax.training.loop import Eval, train
from launch.training_evals import training_evals
from tests.launch.test_evaluations import evaluated_config

knn.run = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
config = evaluated_config(sys.argv[1])
train(config, sys.argv[2], evals=training_evals(config, sys.argv[2]))
"""


def test_a_run_killed_while_it_evaluates_goes_on_as_if_never_killed(setting, tmp_path, monkeypatch):
    config, folder, state = setting
    command = [sys.executable, "-c", KILLED_RUN, str(folder), str(tmp_path / "run")]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoints.step_directory(tmp_path / "run").name == "2"

    real, calls = knn.run, []

    def counted(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(knn, "run", counted)
    resumed = train(config, tmp_path / "run", evals=training_evals(config, tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, resumed["students"], state["students"])
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == read_metrics(folder / "run" / "metrics.jsonl")
    assert len(calls) == 2, "of the step it was killed at, and of the last"
    train(config, tmp_path / "run", evals=training_evals(config, tmp_path / "run"))
    assert len(calls) == 2, "a finished evaluation is not run again"


def test_evaluate_gives_the_figures_of_the_training_run(setting, tmp_path):
    _, folder, _ = setting
    command = ["launch/evaluate.py", f"--checkpoint={folder / 'run'}", "--eval=knn", f"--data={folder / 'set'}"]
    command += [f"--out={tmp_path / 'out'}", *(f"--set={k}={v}" for k, v in SMALL.items())]
    first = run(*command)
    assert first.returncode == 0, first.stderr
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    inside = json.loads((folder / "run" / "evals" / "neighbours" / "vit" / "4" / "metrics.json").read_text())
    assert found["metrics"] == inside["metrics"] and found["fingerprint"] == inside["fingerprint"]
    assert (tmp_path / "out" / "metrics.csv").read_text().startswith("metric,value")
    Image.open(next((tmp_path / "out").glob("*.png"))).verify()
    assert list((tmp_path / "out" / "tensorboard").iterdir())

    again = run(*command)
    assert again.returncode == 0 and "complete already" in again.stdout
    assert_one_line(run(*command, "--set=k=3"), "no setting 'k'")
    assert_one_line(run(*command, "--set=temperature=0.1"), "another evaluation", "out")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--eval=knnn"], ["'knnn'", "did you mean knn"]),
        (["--set=ks=a"], ["knn.ks"]),
        (["--set=ks"], ["NAME=VALUE"]),
        (["--checkpoint=/nowhere"], ["/nowhere"]),
        (["--checkpoint=random:eupe_vitt"], ["'eupe_vitt'", "eupe_vitt16"]),
        (["--checkpoint=a.pte"], ["a.pte"]),
        (["--checkpoint=host:nothing:Here"], ["nothing"]),
        (["--data=/nowhere"], ["--data /nowhere"]),
        (["--out=gs://bucket/out"], ["--out gs://bucket/out", "mounted"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_evaluate_refuses(flags, words, tmp_path):
    defaults = {"--checkpoint": "random:eupe_vitt16", "--eval": "knn", "--data": str(tmp_path), "--out": "out"}
    given = {flag.partition("=")[0] for flag in flags}
    command = [f"{flag}={value}" for flag, value in defaults.items() if flag not in given]
    assert_one_line(run("launch/evaluate.py", *command, *flags), *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"eval": "knnn"}, "did you mean knn"),
        ({"data": "/nowhere"}, "evals.bad: no such folder"),
        ({"settings": {"kk": 3}}, "no setting 'kk'"),
        ({"evry": 3}, "takes the fields"),
    ],
)
def test_training_refuses_a_wrong_evaluation_before_it_starts(change, words, tmp_path):
    config = tiny_config()
    entry = {"eval": "knn", "data": str(write_shards(tmp_path / "set")), "every": 2} | change
    config.evals.bad = ConfigDict(entry)
    with pytest.raises(ValueError, match=words):
        training_evals(config, tmp_path / "run")


@pytest.mark.parametrize("every", [0, 2])
def test_evaluations_fall_on_steps_that_are_logged(every, tmp_path):
    """Otherwise they would cut a line of the loss curve in two."""
    config = tiny_config()
    config.log_every, config.statistics = 3, str(tmp_path)
    with pytest.raises(ValueError, match=r"evals.bad.every must be a multiple of log_every \(3\)"):
        train(config, tmp_path / "run", evals=[Eval("bad", every, lambda step, state: {})])
