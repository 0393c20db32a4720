"""Position tables at other grids, against PyTorch's own interpolation."""

import jax.numpy as jnp
import numpy as np
import pytest

from eupe_jax.models.resize import resize_positions

torch = pytest.importorskip("torch")
SIZES = [(5, 5), (7, 4), (2, 3), (11, 1), (1, 1), (10, 9)]
TABLE = np.random.default_rng(0).standard_normal((25, 6)).astype(np.float32)


def theirs(**options):
    image = torch.from_numpy(TABLE).reshape(1, 5, 5, 6).permute(0, 3, 1, 2)
    return torch.nn.functional.interpolate(image, **options).permute(0, 2, 3, 1).reshape(-1, 6).numpy()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize("option", ["plain", "antialias", "align_corners"])
def test_every_way_of_pytorch(size, method, option):
    options = {} if option == "plain" else {option: True}
    found = resize_positions(jnp.asarray(TABLE), size, method, **options)
    np.testing.assert_allclose(found, theirs(size=size, mode=method, **options), atol=2e-6)


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("antialias", [False, True])
def test_offset_is_a_scale_factor_of_pytorch(size, antialias):
    factor = tuple((length + 0.1) / 5 for length in size)
    expected = theirs(scale_factor=factor, mode="bicubic", antialias=antialias)
    found = resize_positions(jnp.asarray(TABLE), size, "bicubic", antialias=antialias, offset=0.1)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    without = resize_positions(jnp.asarray(TABLE), size, "bicubic", antialias=antialias)
    assert float(jnp.abs(found - without).max()) > 1e-3


def test_the_native_grid_is_the_table_itself():
    for options in ({}, {"offset": 0.1}, {"align_corners": True}, {"antialias": True}):
        np.testing.assert_array_equal(resize_positions(jnp.asarray(TABLE), (5, 5), "bicubic", **options), TABLE)


def test_bad_tables_and_methods_are_named():
    with pytest.raises(ValueError, match="24 rows is not square"):
        resize_positions(jnp.asarray(TABLE[:24]), (3, 3), "bilinear")
    with pytest.raises(ValueError, match="unknown resize method 'nearest'"):
        resize_positions(jnp.asarray(TABLE), (3, 3), "nearest")
