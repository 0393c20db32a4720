"""PCA pictures: components equal scikit-learn's, and the grid shows what it says."""

import dataclasses

import numpy as np
import pytest
from sklearn.decomposition import PCA

from eupe_jax.evals import pca
from eupe_jax.evals.interface import DataError
from eupe_jax.evals.pca import Settings
from tests.evals.image_sets import jpeg, picture

SETTINGS = Settings(resolutions=(32, 64), images=3, cell=40, batch_size=2)


class Patches:
    """An encoder whose tokens are the pixels of each patch; `only` is the one size it takes, if any."""

    name, fingerprint, cls_dim, resolution = "patches", "patches-1", None, 32

    def __init__(self, patch_size=8, only=None):
        self.patch_size, self.patch_dim, self.only = patch_size, patch_size**2 * 3, only

    def __call__(self, images, *, key=None):
        b, height, width, _ = images.shape
        if self.only and height != self.only:
            raise ValueError(f"takes {self.only} pixels only, got {height}")
        p = self.patch_size
        x = np.asarray(images, np.float32).reshape(b, height // p, p, width // p, p, 3) / 255
        return {"patches": x.transpose(0, 1, 3, 2, 4, 5).reshape(b, height // p, width // p, -1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures")
    for i in range(7):
        (path / f"{i}.jpg").write_bytes(jpeg(picture(i % 2, i, (70, 50))))
    return path


def test_components_are_those_of_sklearn():
    rng = np.random.default_rng(0)
    tokens = (rng.normal(size=(4, 6, 5, 10)) * np.arange(10, 0, -1)).astype(np.float32)
    colours, share = pca.principal_colours(tokens)
    reference = PCA(3, svd_solver="full").fit(tokens.reshape(-1, 10).astype(np.float64))
    assert share == pytest.approx(reference.explained_variance_ratio_.sum(), abs=1e-6)
    y = reference.transform(tokens.reshape(-1, 10).astype(np.float64))
    for c in range(3):
        ours, theirs = colours[..., c].ravel(), y[:, c]
        inner = (ours > 0) & (ours < 1)
        assert 0.9 < inner.mean() < 0.97  # cut at the 2nd and 98th percentile
        assert abs(np.corrcoef(ours[inner], theirs[inner])[0, 1]) > 0.99999
    np.testing.assert_array_equal(colours, pca.pca_to_rgb(tokens))


def test_few_dimensions_and_constant_tokens_give_pictures_too():
    assert pca.pca_to_rgb(np.random.default_rng(0).normal(size=(1, 4, 4, 2)), 8).shape == (1, 8, 8, 3)
    assert np.isfinite(pca.pca_to_rgb(np.ones((1, 4, 4, 5)))).all()


def test_the_grid_holds_images_and_every_encoder_at_every_resolution(folder):
    data = pca.load(folder, SETTINGS)
    assert [record.name[-5:] for record in data.images] == ["0.jpg", "3.jpg", "6.jpg"]
    result = pca.run([Patches(), Patches(12)], data, SETTINGS)
    rows = result.tables["explained"]
    assert [(row["encoder"], row["resolution"]) for row in rows] == [
        ("patches", 32), ("patches", 64), ("patches (2)", 36), ("patches (2)", 60)
    ]  # fmt: skip
    assert all(0 < row["explained"] <= 1 for row in rows)
    assert result.metrics["explained_patches (2)_36"] == rows[2]["explained"]
    grid = result.images["pca"]
    assert grid.shape == (34 + 3 * 44 - 4, 5 * 44 - 4, 3) and grid.dtype == np.uint8
    first = grid[34:74, :40]
    expected = pca._crop(40)(data.images[0])
    np.testing.assert_array_equal(first, expected)
    assert len({grid[34:74, 44 * c : 44 * c + 40].tobytes() for c in range(5)}) == 5


def test_fitting_on_each_image_or_on_all(folder):
    data = pca.load(folder, SETTINGS)
    alone = pca.run(Patches(), data, SETTINGS)
    settings = dataclasses.replace(SETTINGS, fit="all")
    together = pca.run(Patches(), data, settings)
    assert not np.array_equal(alone.images["pca"], together.images["pca"])
    tokens = pca.extract(Patches(), data.images, 2, prepare=pca._crop(32))["patches"]
    expected = np.round(pca.pca_to_rgb(tokens, 40) * 255)
    np.testing.assert_array_equal(together.images["pca"][34:74, 44:84], expected[0])
    expected = np.round(pca.pca_to_rgb(tokens[2:], 40) * 255)
    np.testing.assert_array_equal(alone.images["pca"][122:162, 44:84], expected[0])


def test_sizes_that_are_not_taken_are_shown_and_told(folder):
    data = pca.load(folder, SETTINGS)
    result = pca.run([Patches(only=32), Patches(only=64)], data, SETTINGS)
    assert list(result.details["refused"]) == ["patches at 64", "patches (2) at 32"]
    assert (result.images["pca"][34:74, 88:128] == 128).all()
    with pytest.raises(ValueError, match="no encoder takes any .* 8 pixels only"):
        pca.run([Patches(only=8)], data, SETTINGS)


def test_features_are_kept(folder, tmp_path):
    data = pca.load(folder, SETTINGS)
    whole = pca.run(Patches(), data, SETTINGS, workdir=tmp_path)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    np.testing.assert_array_equal(
        pca.run(Patches(), data, SETTINGS, workdir=tmp_path).images["pca"], whole.images["pca"]
    )


def test_broken_folders_and_settings(folder, tmp_path):
    with pytest.raises(DataError, match="no such image folder"):
        pca.load(tmp_path / "none", SETTINGS)
    (tmp_path / "a.jpg").write_bytes(b"<html>")
    with pytest.raises(DataError, match="a.jpg"):
        pca.run(Patches(), pca.load(tmp_path, SETTINGS), SETTINGS)
    for wrong in ({"fit": "one"}, {"images": 0}, {"resolutions": ()}):
        with pytest.raises(ValueError):
            Settings(**wrong)
