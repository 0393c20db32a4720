import dataclasses
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from eupe_jax.data import augment as A
from eupe_jax.data.augment import AugmentConfig, augment, host_augment, sample_keys
from eupe_jax.data.host import decode

colour_jitter = jax.jit(A.colour_jitter)
OFF = dataclasses.asdict(AugmentConfig.off())


def only(**on):
    return AugmentConfig.from_dict({**OFF, **on})


def keys(n, step=0, seed=0):
    return sample_keys(jax.random.key(seed), step, jnp.arange(n))


@pytest.fixture(scope="module")
def pictures(photos):
    """The eight photographs at 64 x 64."""
    images = [Image.fromarray(decode(photos[i])).resize((64, 64), Image.Resampling.BICUBIC) for i in range(len(photos))]
    return images


@pytest.fixture(scope="module")
def x_8x64x64x3(pictures):
    return jnp.stack([np.asarray(p) for p in pictures]).astype(jnp.float32) / 255


def close(x_BxHxWx3, pictures, levels):
    want = np.stack([np.asarray(p) for p in pictures]) / 255
    np.testing.assert_allclose(x_BxHxWx3, want, atol=levels / 255 + 1e-6)


def test_all_off_is_the_identity(x_8x64x64x3):
    np.testing.assert_array_equal(augment(keys(8), x_8x64x64x3, AugmentConfig.off()), x_8x64x64x3)


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
@pytest.mark.parametrize(
    "operation,pillow", [(0, ImageEnhance.Brightness), (1, ImageEnhance.Contrast), (2, ImageEnhance.Color)]
)
def test_jitter_against_pillow(x_8x64x64x3, pictures, operation, pillow, factor):
    factors = jnp.ones((8, 3)).at[:, operation].set(factor)
    got = colour_jitter(x_8x64x64x3, factors, jnp.zeros(8), jnp.tile(jnp.arange(4), (8, 1)))
    # Pillow rounds each grey value and truncates the blend: up to two levels.
    close(got, [pillow(p).enhance(factor) for p in pictures], 2)


@pytest.mark.parametrize("turns", [-0.5, -0.1, 0.03, 0.1])
def test_hue_against_the_standard_library(x_8x64x64x3, turns):
    import colorsys

    small = np.asarray(x_8x64x64x3)[:, ::8, ::8]

    def turned(pixel):
        h, s, v = colorsys.rgb_to_hsv(*map(float, pixel))
        return colorsys.hsv_to_rgb((h + turns) % 1, s, v)

    want = np.array([turned(p) for p in small.reshape(-1, 3)]).reshape(small.shape)
    np.testing.assert_allclose(A.shift_hue(jnp.asarray(small), jnp.full(8, turns)), want, atol=1e-5)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)])
def test_jitter_follows_each_images_order(x_8x64x64x3, order):
    factors = jnp.tile(jnp.array([1.3, 0.7, 1.2]), (8, 1))

    def one(x, operation):
        if operation == 3:
            return A.shift_hue(x, jnp.full(len(x), 0.08))
        grey = A.luma(x)
        target = [jnp.zeros_like(grey), grey.mean((1, 2), keepdims=True), grey][operation]
        f = float(factors[0, operation])
        return jnp.clip(f * x + (1 - f) * target, 0, 1)

    want = x_8x64x64x3
    for operation in order:
        want = one(want, operation)
    # Another order beside it in the same batch changes nothing.
    orders = jnp.concatenate([jnp.tile(jnp.array(order), (4, 1)), jnp.tile(jnp.arange(4), (4, 1))])
    got = colour_jitter(x_8x64x64x3, factors, jnp.full(8, 0.08), orders)
    np.testing.assert_allclose(got[:4], want[:4], atol=1e-5)


def test_flip_grayscale_and_solarize_against_pillow(x_8x64x64x3, pictures):
    close(augment(keys(8), x_8x64x64x3, only(flip_p=1.0)), [ImageOps.mirror(p) for p in pictures], 0)
    grey = [p.convert("L").convert("RGB") for p in pictures]
    close(augment(keys(8), x_8x64x64x3, only(grayscale_p=1.0)), grey, 1)
    close(augment(keys(8), x_8x64x64x3, only(solarize_p=1.0)), [ImageOps.solarize(p, 128) for p in pictures], 0)


def test_blur_is_the_nine_tap_gaussian(x_8x64x64x3):
    sigma = np.linspace(0.1, 2.0, 8).astype(np.float32)
    x = np.asarray(x_8x64x64x3, np.float64)
    want = np.empty_like(x)
    for i, s in enumerate(sigma):
        taps = np.exp(-0.5 * (np.arange(-4, 5) / s) ** 2)
        taps /= taps.sum()
        padded = np.pad(x[i], ((4, 4), (4, 4), (0, 0)), mode="reflect")
        rows = sum(t * padded[k : k + 64] for k, t in enumerate(taps))
        want[i] = sum(t * rows[:, k : k + 64] for k, t in enumerate(taps))
    np.testing.assert_allclose(A.gaussian_blur(x_8x64x64x3, jnp.asarray(sigma), 9), want, atol=1e-5)


def test_blur_against_pillow(x_8x64x64x3, pictures):
    # Pillow approximates the Gaussian by box blurs: alike on average, away from the border.
    got = np.asarray(A.gaussian_blur(x_8x64x64x3, jnp.full(8, 1.5), 9))[:, 8:-8, 8:-8]
    want = np.stack([np.asarray(p.filter(ImageFilter.GaussianBlur(1.5))) for p in pictures])[:, 8:-8, 8:-8] / 255
    assert np.abs(got - want).mean() < 1 / 255


@pytest.mark.parametrize(
    "field,share",
    [("flip_p", 0.5), ("jitter_p", 0.8), ("grayscale_p", 0.2), ("blur_p", 0.1), ("solarize_p", 0.2)],
)
def test_operations_fire_as_often_as_asked(field, share):
    x = jnp.broadcast_to(jax.random.uniform(jax.random.key(1), (8, 8, 3)), (2000, 8, 8, 3))
    changed = np.asarray(jnp.any(augment(keys(2000), x, only(**{field: share})) != x, axis=(1, 2, 3)))
    assert abs(changed.mean() - share) < 5 * np.sqrt(share * (1 - share) / 2000)


def test_the_blur_quirk_fires_with_one_minus_p():
    x = jax.random.uniform(jax.random.key(1), (400, 8, 8, 3))
    config = only(blur_p=0.1, blur_inverted=True, blur_sigma=(1.0, 2.0))
    changed = np.asarray(jnp.any(augment(keys(400), x, config) != x, axis=(1, 2, 3)))
    assert abs(changed.mean() - 0.9) < 0.08
    np.testing.assert_array_equal(augment(keys(400), x, only(blur_p=1.0, blur_inverted=True)), x)


def test_strengths_are_uniform_in_their_range():
    grey = jnp.full((4000, 2, 2, 3), 0.5)
    level = np.asarray(augment(keys(4000), grey, only(jitter_p=1.0, contrast=0.0, saturation=0.0, hue=0.0)))[:, 0, 0, 0]
    assert 0.3 <= level.min() < 0.302 and 0.698 < level.max() <= 0.7
    assert abs(level.mean() - 0.5) < 0.01 and abs(level.std() - 0.4 / np.sqrt(12)) < 0.005


def test_an_image_depends_on_its_own_key_alone(x_8x64x64x3):
    config = AugmentConfig()
    whole = augment(keys(8), x_8x64x64x3, config)
    parts = [augment(keys(8)[i : i + 2], x_8x64x64x3[i : i + 2], config) for i in range(0, 8, 2)]
    np.testing.assert_allclose(whole, jnp.concatenate(parts), atol=2e-6)
    other = augment(keys(8, step=1), x_8x64x64x3, config)
    # Nothing at all may happen to an image in both steps, but that is rare.
    assert sum(float(jnp.abs(a - b).max()) > 0.01 for a, b in zip(whole, other, strict=True)) >= 6
    assert float(whole.min()) >= 0 and float(whole.max()) <= 1


def test_switching_one_operation_off_moves_no_other(x_8x64x64x3):
    full, no_flip = AugmentConfig(), AugmentConfig(flip_p=0.0)
    a, b = (np.asarray(augment(keys(8), x_8x64x64x3, c)) for c in (full, no_flip))
    alike = [np.allclose(x, y, atol=1e-5) or np.allclose(x, y[:, ::-1], atol=1e-5) for x, y in zip(a, b, strict=True)]
    assert all(alike)


def test_the_host_makes_the_same_pixels_as_the_device(x_8x64x64x3):
    pixels = np.asarray(A.to_uint8(x_8x64x64x3))
    config = AugmentConfig()
    device = augment(sample_keys(jax.random.key(9), 4, jnp.arange(8)), x_8x64x64x3, config)
    run = host_augment(config, 9)
    host = run(4, pixels, 0)
    assert host.dtype == np.uint8
    assert np.abs(host - np.asarray(device) * 255).max() <= 0.51
    np.testing.assert_array_equal(run(4, pixels[6:], 6), host[6:])  # another host's part
    big_seed = host_augment(config, 2**40 + 1)(0, pixels, 0)
    assert not np.array_equal(big_seed, run(0, pixels, 0))


def test_defaults_are_the_published_facts():
    path = Path(os.environ.get("EUPE_GOLDEN_DIR", Path(__file__).parents[3] / "shared" / "golden"))
    if not (path / "augmentation_facts.json").is_file():
        pytest.skip(f"no augmentation facts in {path}")
    facts = json.loads((path / "augmentation_facts.json").read_text())["dinov3_global_crop"]
    colour, grey = facts["colour"]
    blur, solarize = facts["global_2_extra"]
    c = AugmentConfig()
    inner = colour["inner"]
    assert (c.jitter_p, c.grayscale_p) == (colour["p"], grey["p"])
    assert (c.brightness, c.contrast, c.saturation, c.hue) == tuple(
        inner[k] for k in ("brightness", "contrast", "saturation", "hue")
    )
    assert (c.blur_kernel, list(c.blur_sigma), c.blur_p) == (blur["kernel"], blur["sigma"], blur["nominal_p"])
    quirk = dataclasses.replace(c, blur_inverted=True)
    assert quirk.blur_chance == pytest.approx(blur["effective_p"])
    assert (c.solarize_threshold * 255, c.solarize_p) == (solarize["threshold"], solarize["p"])


@pytest.mark.parametrize(
    "bad", [{"flip_p": 2}, {"hue": 0.7}, {"blur_kernel": 8}, {"blur_sigma": [2, 1]}, {"contrast": -1}]
)
def test_config_errors_name_the_field(bad):
    with pytest.raises(ValueError, match=f"augment.{next(iter(bad))}"):
        AugmentConfig.from_dict(bad)
    with pytest.raises(ValueError, match="no .*'blurr'"):
        AugmentConfig.from_dict({"blurr": 1})
