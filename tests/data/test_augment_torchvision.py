"""Augmentation against torchvision's definitions on float tensors, written anew with torch operations.

Tolerances: 1e-5 for one operation and 1e-4 for the whole chain, of values in [0, 1] (float32 rounding). torchvision's
other backend works on Pillow's bytes: there, up to 2 of 255 levels for blends (Pillow truncates), and hue in Pillow's
8-bit HSV, off by 2 levels on average.
"""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from eupe_jax.data import augment as A
from eupe_jax.data.augment import AugmentConfig
from eupe_jax.data.host import decode
from eupe_jax.data.sources import Record

torch = pytest.importorskip("torch", reason="torch is not installed")


@pytest.fixture(scope="module")
def pictures(photos):
    """Sixteen real photographs at 96 x 96, uint8: of the user's folder where there is one, else the packaged ones."""
    folder = Path(os.environ.get("EUPE_DATA_DIR", Path(__file__).parents[3] / "shared" / "data")) / "photos"
    files = sorted(folder.glob("*.jpg"))[:16]
    records = [Record(f.read_bytes(), f.name) for f in files] or [photos[i % len(photos)] for i in range(16)]
    return np.stack([np.asarray(Image.fromarray(decode(r)).resize((96, 96), Image.BICUBIC)) for r in records])


@pytest.fixture(scope="module")
def x(pictures):
    return pictures.astype(np.float32) / 255


def tensor(images):
    return torch.from_numpy(np.array(images, np.float32)).permute(0, 3, 1, 2)


def grey(t):
    return (0.2989 * t[:, 0] + 0.587 * t[:, 1] + 0.114 * t[:, 2])[:, None]


def blend(t, other, factor):
    return (factor * t + (1 - factor) * other).clamp(0, 1)


def brightness(t, factor):
    return blend(t, torch.zeros_like(t), factor)


def contrast(t, factor):
    return blend(t, grey(t).mean(dim=(1, 2, 3), keepdim=True), factor)


def saturation(t, factor):
    return blend(t, grey(t).expand_as(t), factor)


def hue(t, turns):
    """RGB to HSV by the three distances from the maximum, add, and back by the six sectors' table."""
    high, low = t.amax(1), t.amin(1)
    span = high - low
    flat = span == 0
    s = span / torch.where(flat, torch.ones_like(high), high)
    r, g, b = ((high - t[:, c]) / torch.where(flat, torch.ones_like(span), span) for c in range(3))
    is_r, is_g = t[:, 0] == high, (t[:, 1] == high) & (t[:, 0] != high)
    is_b = ~(t[:, 0] == high) & ~(t[:, 1] == high)
    h = ((is_r * (b - g) + is_g * (2 + r - b) + is_b * (4 + g - r)) / 6 + 1) % 1
    h = torch.where(flat, torch.zeros_like(h), h)
    h = (h + turns) % 1
    sector = torch.floor(h * 6)
    f = h * 6 - sector
    p, q, u = high * (1 - s), high * (1 - s * f), high * (1 - s * (1 - f))
    sector = sector.long() % 6
    table = [(high, u, p), (q, high, p), (p, high, u), (p, q, high), (u, p, high), (high, p, q)]
    out = torch.zeros_like(t)
    for k, channels in enumerate(table):
        out = torch.where((sector == k)[:, None], torch.stack(channels, 1), out)
    return out.clamp(0, 1)


def blur(t, sigma, taps=9):
    offsets = torch.linspace(-(taps - 1) / 2, (taps - 1) / 2, taps)
    line = torch.exp(-0.5 * (offsets / sigma) ** 2)
    line = line / line.sum()
    kernel = torch.outer(line, line).expand(3, 1, taps, taps)
    padded = torch.nn.functional.pad(t, [taps // 2] * 4, mode="reflect")
    return torch.nn.functional.conv2d(padded, kernel, groups=3)


OPERATIONS = (brightness, contrast, saturation, hue)


def as_images(t):
    return t.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("factor", [0.6, 0.95, 1.4])
@pytest.mark.parametrize("operation", [0, 1, 2])
def test_blends(x, operation, factor):
    factors = jnp.ones((len(x), 3)).at[:, operation].set(factor)
    order = jnp.tile(jnp.arange(4), (len(x), 1))
    got = jax.jit(A.colour_jitter)(x, factors, jnp.zeros(len(x)), order)
    np.testing.assert_allclose(got, as_images(OPERATIONS[operation](tensor(x), factor)), atol=1e-5)


@pytest.mark.parametrize(
    "turns", [-0.1, 0.1, *(pytest.param(turns, marks=pytest.mark.slow) for turns in (-0.02, 0.05, 0.5))]
)
def test_hue(x, pictures, turns):
    got = np.asarray(jax.jit(A.shift_hue)(x, jnp.full(len(x), turns)))
    np.testing.assert_allclose(got, as_images(hue(tensor(x), turns)), atol=1e-5)
    # The same in Pillow's HSV of bytes.
    want = []
    for picture in pictures:
        hsv = np.array(Image.fromarray(picture).convert("HSV"))
        hsv[..., 0] += np.uint8(int(turns * 255) % 256)
        want.append(np.asarray(Image.fromarray(hsv, "HSV").convert("RGB")))
    difference = np.abs(got * 255 - np.stack(want))
    assert difference.mean() < 2 and np.quantile(difference, 0.99) < 12


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur(x, sigma):
    got = jax.jit(A.gaussian_blur, static_argnums=2)(x, jnp.full(len(x), sigma), 9)
    np.testing.assert_allclose(got, as_images(blur(tensor(x), sigma)), atol=1e-5)


def test_the_whole_chain(x):
    """Every image with its own draws, in its own order, operation after operation."""
    config = AugmentConfig(blur_p=0.5)
    keys = A.sample_keys(jax.random.key(7), 5, jnp.arange(len(x)))
    drawn = jax.tree.map(np.asarray, A.draws(keys, config))
    assert 0 < drawn.jitter.sum() < len(x) and 0 < drawn.blur.sum() < len(x) and 0 < drawn.solarize.sum()
    got = np.asarray(A.augment(keys, x, config))
    for i in range(len(x)):
        t = tensor(x[i : i + 1])
        t = t.flip(-1) if drawn.flip[i] else t
        if drawn.jitter[i]:
            strengths = (*drawn.factors[i], drawn.hue[i])
            for operation in drawn.order[i]:
                t = OPERATIONS[operation](t, float(strengths[operation]))
        t = grey(t).expand_as(t) if drawn.grayscale[i] else t
        t = blur(t, float(drawn.sigma[i])) if drawn.blur[i] else t
        decided = np.ones(x[i].shape, bool)
        if drawn.solarize[i]:
            decided = np.abs(as_images(t)[0] - 128 / 255) > 1e-4  # rounding tips what lies at the threshold
            t = torch.where(t >= 128 / 255, 1 - t, t)
        assert decided.mean() > 0.99
        np.testing.assert_allclose(got[i][decided], as_images(t)[0][decided], atol=1e-4, err_msg=f"image {i}")
