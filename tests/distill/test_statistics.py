"""Statistics as files: atomic, overwritten by a new measurement, and refused when they are something else."""

import numpy as np
import pytest

from eupe_jax.distill.normalization import Accumulator, Provenance, Statistics, denormalize, normalize

PROVENANCE = Provenance("a", "digest", (0.5,) * 3, (0.25,) * 3, (64,), "recipe")


def measured(offset=0.0):
    accumulator = Accumulator()
    rng = np.random.default_rng(0)
    accumulator.add({"cls": rng.normal(offset, 2.0, (8, 5)), "patches": rng.normal(offset, 1.0, (8, 2, 3, 4))})
    return accumulator.finish(PROVENANCE)


def test_save_and_load_again_and_again(tmp_path):
    for offset in (0.0, 100.0):
        statistics = measured(offset)
        statistics.save(tmp_path / "a.safetensors")
        loaded = Statistics.load(tmp_path / "a.safetensors")
        assert loaded.header() == statistics.header() and loaded.count == {"cls": 8, "patches": 48}
        np.testing.assert_array_equal(loaded.mean["patches"], statistics.mean["patches"])
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_normalise_and_back():
    x = np.random.default_rng(1).normal(3.0, 5.0, (2, 4)).astype(np.float32)
    mean, std = np.arange(4.0, dtype=np.float32), np.array([0.0, 1.0, 2.0, 3.0], np.float32)
    y = normalize(x, mean, std)
    np.testing.assert_allclose(y[:, 0], x[:, 0] / 1e-3, rtol=1e-5)  # a dead coordinate is floored, not infinite
    np.testing.assert_allclose(denormalize(y, mean, std), x, rtol=1e-5, atol=1e-5)


def test_files_that_are_no_statistics(tmp_path):
    with pytest.raises(FileNotFoundError, match="measure_statistics"):
        Statistics.load(tmp_path / "missing.safetensors")
    for content in (b"", b"\x80\x04pickle", b"\xff" * 64):
        (tmp_path / "bad.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="bad.safetensors is not a statistics file"):
            Statistics.load(tmp_path / "bad.safetensors")


def test_a_teacher_that_gives_nan_is_named():
    accumulator = Accumulator()
    accumulator.add({"cls": np.array([[1.0, np.nan], [2.0, 1.0]])})
    with pytest.raises(ValueError, match="'a' gives non-finite values in cls coordinates"):
        accumulator.finish(PROVENANCE)
