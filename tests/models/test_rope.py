"""Rotary positions: periods, coordinates and the train-time draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eupe_jax.models import rope


def test_periods_by_range_end_at_both_periods():
    np.testing.assert_allclose(rope.rope_periods(16, None, 0.5, 32.0), [0.5, 2.0, 8.0, 32.0], rtol=1e-6)


@pytest.mark.parametrize("periods", [{"base": None}, {"min_period": 1.0, "max_period": 2.0}, {"min_period": 1.0}])
def test_periods_want_a_base_or_a_range(periods):
    with pytest.raises(ValueError, match="rope_base or both"):
        rope.rope_periods(16, **periods)
    with pytest.raises(ValueError, match="multiple of 4"):
        rope.rope_periods(18)


def test_unknown_normalisation_is_named():
    with pytest.raises(ValueError, match="'area'"):
        rope.patch_coords(2, 2, "area")


def test_draws_stay_in_their_ranges_and_fill_them():
    bounds = {"shift": 0.25, "jitter": 1.5, "rescale": 2.0}
    keys = jax.random.split(jax.random.key(0), 2000)

    def draw(**only):
        return jax.vmap(lambda key: rope.draw_augmentation(key, **only))(keys)

    factor, offset = draw(shift=bounds["shift"])
    assert (factor == 1).all() and -0.25 <= offset.min() < -0.24 and 0.24 < offset.max() <= 0.25
    assert not np.allclose(offset[:, 0], offset[:, 1])
    for part, bound in (("jitter", 1.5), ("rescale", 2.0)):
        factor, offset = draw(**{part: bound})
        log = np.log(factor) / np.log(bound)
        assert (offset == 0).all() and -1.001 <= log.min() < -0.98 and 0.98 < log.max() <= 1.001
        assert abs(np.mean(log)) < 0.06, "log-uniform draws are centred on one"
        assert np.allclose(log[:, 0], log[:, 1]) == (part == "rescale")


def test_rope_is_a_rotation_that_spares_the_prefix():
    x = jax.random.normal(jax.random.key(1), (2, 3 + 6, 2, 8))
    sin, cos = rope.rope_table(jnp.asarray(rope.rope_periods(8)), jnp.asarray(rope.patch_coords(2, 3)))
    y = rope.apply_rope(x, sin, cos)
    np.testing.assert_array_equal(y[:, :3], x[:, :3])
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    assert float(jnp.abs(y[:, 3:] - x[:, 3:]).max()) > 0.1
