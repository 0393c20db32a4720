"""Metrics: what is not finite spoils neither averages nor files, and damaged files are not mended in silence."""

import json
import math

import jax.numpy as jnp
import pytest

from eupe_jax.training.metrics import MetricWriter, RunningMetrics, read_metrics


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
