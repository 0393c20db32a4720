import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy import stats

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


@pytest.mark.slow
@pytest.mark.parametrize("turns", [-0.5, -0.1, 0.03, 0.1])
def test_hue_against_the_standard_library(x_8x64x64x3, turns):
    import colorsys

    small = np.asarray(x_8x64x64x3)[:, ::8, ::8]

    def turned(pixel):
        h, s, v = colorsys.rgb_to_hsv(*map(float, pixel))
        return colorsys.hsv_to_rgb((h + turns) % 1, s, v)

    want = np.array([turned(p) for p in small.reshape(-1, 3)]).reshape(small.shape)
    np.testing.assert_allclose(A.shift_hue(jnp.asarray(small), jnp.full(8, turns)), want, atol=1e-5)


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_the_blur_quirk_fires_with_one_minus_p():
    x = jax.random.uniform(jax.random.key(1), (400, 8, 8, 3))
    config = only(blur_p=0.1, blur_inverted=True, blur_sigma=(1.0, 2.0))
    changed = np.asarray(jnp.any(augment(keys(400), x, config) != x, axis=(1, 2, 3)))
    assert abs(changed.mean() - 0.9) < 0.08
    np.testing.assert_array_equal(augment(keys(400), x, only(blur_p=1.0, blur_inverted=True)), x)


def test_an_image_depends_on_its_own_key_alone(x_8x64x64x3):
    """However a batch is split and over however many devices it is cut, but for the order of a mean's sum (2e-7)."""
    config = AugmentConfig(blur_p=0.5)
    whole = np.asarray(augment(keys(8), x_8x64x64x3, config))
    parts = [augment(keys(8)[i : i + 2], x_8x64x64x3[i : i + 2], config) for i in range(0, 8, 2)]
    np.testing.assert_allclose(whole, np.concatenate(parts), atol=1e-6)
    assert len(jax.devices()) == 8
    cut = NamedSharding(Mesh(np.array(jax.devices()), "data"), PartitionSpec("data"))
    sharded = augment(*jax.device_put((keys(8), x_8x64x64x3), cut), config)
    assert len(sharded.sharding.device_set) == 8
    np.testing.assert_allclose(whole, sharded, atol=1e-6)
    other = augment(keys(8, step=1), x_8x64x64x3, config)
    # Nothing at all may happen to an image in both steps, but that is rare.
    assert sum(float(jnp.abs(a - b).max()) > 0.01 for a, b in zip(whole, other, strict=True)) >= 6
    assert float(whole.min()) >= 0 and float(whole.max()) <= 1


@pytest.mark.slow
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
    host = run(4, pixels)
    assert host.dtype == np.uint8
    assert np.abs(host - np.asarray(device) * 255).max() <= 0.51
    np.testing.assert_array_equal(run(4, pixels[6:], np.array([6, 7])), host[6:])  # another host's part
    big_seed = host_augment(config, 2**40 + 1)(0, pixels)
    assert not np.array_equal(big_seed, run(0, pixels))


@pytest.fixture(scope="module")
def drawn():
    """Draws of 48,000 images: of 6,000 steps, 8 positions each."""
    steps, positions = np.divmod(np.arange(48_000), 8)
    every = jax.vmap(lambda step, position: sample_keys(jax.random.key(11), step, position[None])[0])(steps, positions)
    return jax.tree.map(np.asarray, A.draws(every, AugmentConfig()))


@pytest.mark.parametrize(
    "name,share", [("flip", 0.5), ("jitter", 0.8), ("grayscale", 0.2), ("blur", 0.1), ("solarize", 0.2)]
)
def test_operations_fire_as_often_as_asked(drawn, name, share):
    fired = getattr(drawn, name)
    assert abs(fired.mean() - share) < 4 * np.sqrt(share * (1 - share) / fired.size)
    # Neither its neighbour in the batch nor the same place one step later knows of it.
    for lag in (1, 8):
        assert abs(np.corrcoef(fired[lag:], fired[:-lag])[0, 1]) < 4 / np.sqrt(fired.size)


def test_operations_fire_independently(drawn):
    fired = np.stack([drawn.flip, drawn.jitter, drawn.grayscale, drawn.blur, drawn.solarize, drawn.hue > 0])
    assert np.abs(np.corrcoef(fired) - np.eye(6)).max() < 4.5 / np.sqrt(fired.shape[1])


@pytest.mark.parametrize(
    "name,low,high",
    [("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("saturation", 0.8, 1.2), ("hue", -0.1, 0.1), ("sigma", 0.1, 2)],
)
def test_strengths_are_uniform(drawn, name, low, high):
    columns = ("brightness", "contrast", "saturation")
    values = drawn.factors[:, columns.index(name)] if name in columns else getattr(drawn, name)
    assert low <= values.min() and values.max() <= high + 1e-6
    assert stats.kstest(values, "uniform", args=(low, high - low)).pvalue > 1e-3


def test_all_24_orders_are_alike(drawn):
    counts = np.unique(drawn.order, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3


def test_draws_are_what_augment_does(x_8x64x64x3):
    found = A.draws(keys(8), only(flip_p=0.5))
    assert 0 < found.flip.sum() < 8
    want = np.where(np.asarray(found.flip)[:, None, None, None], x_8x64x64x3[:, :, ::-1], x_8x64x64x3)
    np.testing.assert_array_equal(augment(keys(8), x_8x64x64x3, only(flip_p=0.5)), want)


def test_presets_are_both_crops_as_written_and_as_they_fire():
    chances = {
        (name, fired): AugmentConfig.preset(name, as_fired=fired).blur_chance
        for name in ("global_1", "global_2")
        for fired in (False, True)
    }
    assert chances == pytest.approx(
        {("global_1", False): 1, ("global_1", True): 0, ("global_2", False): 0.1, ("global_2", True): 0.9}
    )
    assert AugmentConfig.preset("global_1").solarize_p == 0 and AugmentConfig.preset("global_2") == AugmentConfig()
    with pytest.raises(ValueError, match="'local'.*global_1"):
        AugmentConfig.preset("local")


def test_solarize_takes_every_level_from_128_on():
    """As Pillow does with bytes: through each way that bytes become floats here."""
    levels = np.arange(256, dtype=np.uint8)
    image = np.broadcast_to(levels[:, None, None], (1, 256, 2, 3))
    want = np.where(levels >= 128, 255 - levels, levels)
    config = only(solarize_p=1.0)
    got, _ = A.augment_uint8(jax.random.key(0), 0, np.arange(1), image, config)
    np.testing.assert_array_equal(got[0, :, 0, 0], want)
    for x in (image / np.float32(255), image * np.float32(1 / 255)):
        np.testing.assert_array_equal(A.to_uint8(augment(keys(1), jnp.asarray(x), config))[0, :, 0, 0], want)


@pytest.mark.parametrize(
    "bad", [{"flip_p": 2}, {"hue": 0.7}, {"blur_kernel": 8}, {"blur_sigma": [2, 1]}, {"contrast": -1}]
)
def test_config_errors_name_the_field(bad):
    with pytest.raises(ValueError, match=f"augment.{next(iter(bad))}"):
        AugmentConfig.from_dict(bad)
    with pytest.raises(ValueError, match="no .*'blurr'"):
        AugmentConfig.from_dict({"blurr": 1})
