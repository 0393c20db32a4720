"""Loggers: what is logged can be read again, and nobody else's machine stops or holds up a run."""

import json
import logging
import struct
import threading
import time

import numpy as np
import pytest
from etils import epath
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from eupe_jax.training import loggers
from eupe_jax.training.events import Events
from eupe_jax.training.metrics import MetricWriter, read_metrics

PICTURE = np.random.default_rng(0).integers(0, 255, (6, 9, 3)).astype(np.uint8)
VALUES = np.random.default_rng(1).normal(3.0, 2.0, 500).astype(np.float32)


def events_of(folder):
    """The events in the one file of a folder: records of a length, its checksum, the bytes and theirs."""
    (file,) = folder.glob("events.out.tfevents.*")
    data, found, at = file.read_bytes(), [], 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        found.append(Event.FromString(data[at + 12 : at + 12 + length]))
        at += length + 16
    return found


def values_of(folder):
    """{(tag, step): summary value}."""
    return {(value.tag, event.step): value for event in events_of(folder) for value in event.summary.value}


def show(logger):
    logger.write(5, {"vit/loss": 0.25})
    logger.histogram(0, "statistics/t/cls_mean", VALUES)
    logger.image(5, "pca/vit/pca", PICTURE)
    logger.text(0, "config", "*all* of it")


def test_tensorboard_holds_scalars_histograms_pictures_and_text(tmp_path):
    events = Events(epath.Path(tmp_path), 0)
    show(events)
    events.close()
    found = values_of(tmp_path)
    assert found["vit/loss", 5].simple_value == 0.25
    histogram = found["statistics/t/cls_mean", 0].histo
    assert (histogram.num, sum(histogram.bucket)) == (500, 500)
    assert (histogram.min, histogram.max) == (VALUES.min(), VALUES.max()) and histogram.sum == pytest.approx(
        VALUES.sum()
    )
    (tmp_path / "picture.png").write_bytes(found["pca/vit/pca", 5].image.encoded_image_string)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "picture.png")), PICTURE)
    assert found["config/text_summary", 0].tensor.string_val == [b"*all* of it"]


def test_tensorboard_itself_reads_them(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = Events(epath.Path(tmp_path), 0)
    show(events)
    events.close()
    read = accumulator.EventAccumulator(str(tmp_path))
    read.Reload()
    tags = read.Tags()
    assert tags["scalars"] == ["vit/loss"] and tags["images"] == ["pca/vit/pca"]
    assert tags["histograms"] == ["statistics/t/cls_mean"] and tags["tensors"] == ["config/text_summary"]
    (image,) = read.Images("pca/vit/pca")
    assert (image.step, image.width, image.height) == (5, 9, 6)


def test_a_run_begins_with_its_config_and_the_distribution_of_its_statistics(tmp_path):
    writer = MetricWriter(epath.Path(tmp_path), config={"seed": 3})
    writer.begin({"seed": 3}, {"t": {"mean": {"cls": VALUES}, "std": {"cls": VALUES**2}}})
    writer.pictures(2, {"pca/vit/pca": PICTURE})
    writer.write(2, {"vit/loss": float("nan"), "vit/skipped": 1.0})
    writer.close()
    found = values_of(tmp_path / "tensorboard")
    names = {("config/text_summary", 0), ("statistics/t/cls_mean", 0), ("statistics/t/cls_std", 0), ("vit/skipped", 2)}
    assert set(found) == names | {("pca/vit/pca", 2)}
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 2, "vit/loss": None, "vit/skipped": 1.0}]


class Far:
    """Somebody else's machine, which takes what it is given as told."""

    def __init__(self, fails=()):
        self.fails, self.got, self.asked, self.closed = fails, [], 0, False

    def write(self, step, scalars):
        self.asked += 1
        if self.asked in self.fails:
            raise ConnectionError("no route\nto host")
        self.got.append((step, scalars))

    def close(self):
        self.closed = True


def test_what_fails_far_away_is_said_once_and_the_next_call_is_tried(caplog):
    far, tries = Far(fails=(2, 3)), []

    def connect():
        tries.append(1)
        if len(tries) == 1:
            raise OSError("not there yet")
        return far

    remote = loggers.Remote("far", connect)
    with caplog.at_level(logging.WARNING):
        for step in range(6):
            remote.write(step, {"loss": 1.0})
        remote.close()
    assert [step for step, _ in far.got] == [1, 4, 5] and len(tries) == 2 and far.closed
    (record,) = caplog.records
    assert record.getMessage() == (
        "logger 'far' failed, figures are lost (OSError: not there yet); the run goes on, and this is said once"
    )


def test_what_hangs_far_away_holds_nothing_up(caplog, monkeypatch):
    monkeypatch.setattr(loggers, "WAITING", 4)
    monkeypatch.setattr(loggers, "PATIENCE", 0.2)
    hangs = threading.Event()
    remote = loggers.Remote("far", lambda: hangs.wait(20))
    start = time.monotonic()
    with caplog.at_level(logging.WARNING):
        for step in range(100):
            remote.image(step, "picture", PICTURE)
        remote.close()
    assert time.monotonic() - start < 5
    assert "'far' has 4 figures waiting: the next ones are lost" in caplog.text and len(caplog.records) == 1
    hangs.set()


def test_pictures_are_copied_before_they_are_sent():
    """The caller may use its array again."""
    seen, picture = [], PICTURE.copy()
    far, ready = Far(), threading.Event()
    far.image = lambda step, name, given: seen.append(given)
    remote = loggers.Remote("far", lambda: ready.wait(10) and far)
    remote.image(0, "picture", picture)
    picture[:] = 0
    ready.set()
    remote.close()
    np.testing.assert_array_equal(seen[0], PICTURE)


def test_wrong_and_missing_loggers_are_refused_before_training(monkeypatch):
    with pytest.raises(ValueError, match="loggers holds 'wandbb': use tensorboard, wandb, mlflow"):
        loggers.check(["tensorboard", "wandbb"])
    monkeypatch.setattr(loggers.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="'wandb', which is not installed: pip install 'wandb>=0.31'"):
        loggers.check(["wandb"])
    loggers.check([loggers.TENSORBOARD])


def test_wandb_offline_and_resumed(tmp_path, monkeypatch, caplog):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    workdir = epath.Path(tmp_path / "run")
    workdir.mkdir()
    for start in (0, 5):  # a run, and its resume
        writer = MetricWriter(workdir, resume_step=start, names=("wandb",), config={"seed": 3})
        writer.begin({"seed": 3}, {"t": {"mean": {"cls": VALUES}}})
        writer.pictures(start + 1, {"pca/vit/pca": PICTURE})
        for step in range(start, start + 5):
            writer.write(step, {"vit/loss": 1.0 / (1 + step)})
        writer.close()
    assert not caplog.records
    name = (workdir / "loggers/wandb.id").read_text().strip()
    folders = sorted((tmp_path / "run/loggers/wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(name) for folder in folders), "two parts of one run"
    assert all(list(folder.rglob("*.png")) and list(folder.glob("*.wandb")) for folder in folders)
    assert not (tmp_path / "run/tensorboard").exists()


def test_mlflow_in_a_file_and_resumed(tmp_path, monkeypatch, caplog):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "small")
    workdir = epath.Path(tmp_path / "run")
    workdir.mkdir()
    for start in (0, 5):
        writer = MetricWriter(workdir, resume_step=start, names=("mlflow",), config={"seed": 3})
        if not start:
            writer.begin({"seed": 3}, {"t": {"mean": {"cls": VALUES}}})
        writer.pictures(start + 1, {"pca/vit/pca": PICTURE})
        for step in range(start, start + 5):
            writer.write(step, {"vit/loss": 1.0 / (1 + step)})
        writer.close()
    assert not caplog.records
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("small")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == (workdir / "loggers/mlflow.id").read_text().strip() and run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "vit/loss")
    assert [point.step for point in history] == list(range(10))
    kept = {path.path for path in client.list_artifacts(run.info.run_id)}
    assert kept == {"config.json", "histograms", "images", "texts"}
    local = client.download_artifacts(run.info.run_id, "histograms/statistics/t/cls_mean/0.json", str(tmp_path))
    assert sum(json.loads(open(local).read())["counts"]) == 500
