"""Metrics: what is not finite spoils neither averages nor files, and damaged files are not mended in silence."""

import json
import math

import jax.numpy as jnp
import pytest
from etils import epath
from etils.epath import backend
from ml_collections import ConfigDict

from eupe_jax.training import metrics
from eupe_jax.training.health import FILE, Health
from eupe_jax.training.metrics import MetricWriter, RunningMetrics, read_metrics
from tests.buckets import running_emulator


def test_a_skipped_step_is_told_and_left_out_of_the_averages():
    running = RunningMetrics()
    for loss, skipped in ((1.0, 0.0), (math.nan, 1.0), (4.0, 0.0), (8.0, 0.0)):
        running.add({"s/loss": jnp.float32(loss), "s/skipped": jnp.float32(skipped)})
    assert running.pop() == {"s/loss": 2.5, "s/skipped": pytest.approx(1 / 3)}, "the newest is not read"
    assert running.pop(final=True) == {"s/loss": 8.0, "s/skipped": 0.0}
    running.add({"s/loss": jnp.float32(math.inf), "s/skipped": jnp.float32(1)})
    found = running.pop(final=True)
    assert math.isnan(found["s/loss"]) and found["s/skipped"] == 1


def test_lines_are_json_without_nan_and_written_once(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    for _ in range(2):  # the second run resumes where the first one ended
        writer = MetricWriter(tmp_path, resume_step=3)
        writer.write(3, {"s/loss": math.nan, "s/skipped": 1.0})
        writer.close()
        text = (tmp_path / "metrics.jsonl").read_text()
        assert [json.loads(line, parse_constant=refuse) for line in text.splitlines()] == [
            {"step": 3, "s/loss": None, "s/skipped": 1.0}
        ]
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "s/loss": NaN, "s/skipped": 1.0}\n')  # as once was written
    MetricWriter(tmp_path, resume_step=3).close()
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_only_a_last_line_may_be_cut_short(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_metrics(file) == [{"step": 1}, {"step": 2}]
    damaged = '{"step": 1}\n{"st\n{"step": 3}\n'
    file.write_text(damaged)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is damaged .*mend or remove that line"):
        MetricWriter(tmp_path, resume_step=3)
    assert file.read_text() == damaged


@pytest.fixture(scope="module")
def bucket():
    """An empty one, of an emulator, as epath's paths reach it."""
    core = pytest.importorskip("gcsfs.core", reason="gcsfs is not installed")
    pytest.importorskip("gcp_storage_emulator", reason="gcp-storage-emulator is not installed")
    with running_emulator() as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", address)  # of TensorBoard's events
        patch.setenv("GOOGLE_CLOUD_PROJECT", "none")
        reached = core.GCSFileSystem(token="anon", endpoint_url=address, skip_instance_cache=True)
        # fsspec's own choice asks Google's servers for the kind of the bucket first
        patch.setattr(backend._FileSystemSpecBackend, "_get_filesystem", lambda self, name: reached)
        yield epath.Path("gs://data")


def computed(workdir, name="metrics.jsonl"):
    """Steps of the lines in the bucket."""
    return [line["step"] for line in read_metrics(workdir / name)]


def test_lines_in_a_bucket_are_there_before_a_save_and_outlive_a_kill_and_a_resume(bucket, monkeypatch):
    workdir = bucket / "run"
    config = ConfigDict({"students": {"vit": {}}, "faults": {"max_skipped": 9}})

    def session(start, steps):
        """What a run does up to a save; then it is killed: nothing is closed."""
        writer = MetricWriter(workdir, resume_step=start)
        health = Health(workdir, config, lambda step: {"records": [step]}, enabled=True)
        for step in steps:
            norm = jnp.float32(math.nan if step % 2 else 1)
            health.add(step, {"vit/loss": norm, "vit/grad_norm": norm, "vit/skipped": jnp.isnan(norm)})
            health.check()
            writer.write(step + 1, {"vit/loss": 1.0})
            writer.write_timings(step + 1, {"time/step_s": 1.0})
        health.check(final=True)
        return writer

    written = session(0, range(4))
    assert computed(workdir) == computed(workdir, "timings.jsonl") == [1, 2, 3, 4]
    written.write(5, {"vit/loss": 1.0})
    assert computed(workdir) == [1, 2, 3, 4], "what is past the save waits"
    monkeypatch.setattr(metrics, "UPLOAD_SECONDS", 0.0)
    written.write(6, {"vit/loss": 1.0})
    assert computed(workdir) == [1, 2, 3, 4, 5, 6], "but not for ever"
    monkeypatch.undo()
    metrics._WAITING.discard(written._metrics)  # it is killed here
    metrics._WAITING.discard(written._timings)
    written = session(2, range(2, 6))
    assert computed(workdir) == computed(workdir, "timings.jsonl") == [1, 2, 3, 4, 5, 6]
    assert computed(workdir, FILE) == [1, 3, 5]
    written.write(7, {"vit/loss": 1.0})
    written.close()
    assert computed(workdir) == [1, 2, 3, 4, 5, 6, 7]
