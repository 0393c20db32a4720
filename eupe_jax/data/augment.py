"""Augmentation on device: flip, colour jitter, grayscale, blur, solarize; jitted, one key per image.

The set is DINOv3's second global crop; each operation follows torchvision's definition on float images in [0, 1]. The
draws of an image depend on its key alone, not on its batch, and switching one operation off moves no other's draws.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class AugmentConfig:
    """Probabilities and strengths; the defaults are DINOv3's second global crop.

    jitter_p: chance of colour jitter; brightness, contrast, saturation: factors are uniform in [1 - x, 1 + x], hue: a
    shift uniform in [-x, x] turns, in random order. blur: Gaussian, `blur_kernel` taps (odd), sigma uniform in pixels.
    blur_inverted: the authors' blur class hands 1 - p to its base class, so their blur really fires with 1 - blur_p;
    True reproduces that. solarize inverts values at or above the threshold. `preset` gives both global crops, as
    written and as they fire.
    """

    flip_p: float = 0.5
    jitter_p: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale_p: float = 0.2
    blur_p: float = 0.1
    blur_kernel: int = 9
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_inverted: bool = False
    solarize_p: float = 0.2
    solarize_threshold: float = 128 / 255

    def __post_init__(self):
        object.__setattr__(self, "blur_sigma", tuple(self.blur_sigma))
        for name in ("flip_p", "jitter_p", "grayscale_p", "blur_p", "solarize_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name} is a probability, got {getattr(self, name)}")
        for name in ("brightness", "contrast", "saturation"):
            if getattr(self, name) < 0:
                raise ValueError(f"augment.{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"augment.hue must be in [0, 0.5], got {self.hue}")
        if self.blur_kernel < 1 or self.blur_kernel % 2 == 0:
            raise ValueError(f"augment.blur_kernel must be odd and positive, got {self.blur_kernel}")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError(f"augment.blur_sigma must be 0 < low <= high, got {self.blur_sigma}")

    @classmethod
    def from_dict(cls, values: Mapping) -> "AugmentConfig":
        """From a plain dict; raises ValueError for a key that is no field."""
        if unknown := set(values) - {f.name for f in fields(cls)}:
            raise ValueError(f"augment has no {sorted(unknown)}; its fields are {[f.name for f in fields(cls)]}")
        return cls(**values)

    @classmethod
    def off(cls) -> "AugmentConfig":
        """Nothing happens: `augment` is the identity."""
        return cls(flip_p=0, jitter_p=0, grayscale_p=0, blur_p=0, solarize_p=0)

    @classmethod
    def preset(cls, name: str, *, as_fired: bool = False) -> "AugmentConfig":
        """DINOv3's "global_1" (blur with p = 1, no solarize) or "global_2" (blur with p = 0.1, solarize): with the
        probabilities that the authors wrote, or `as_fired` (blur 0 and 0.9). Raises ValueError for another name."""
        chosen = {"global_1": {"blur_p": 1.0, "solarize_p": 0.0}, "global_2": {}}
        if name not in chosen:
            raise ValueError(f"no augment preset {name!r}: use one of {sorted(chosen)}")
        return cls(**chosen[name], blur_inverted=as_fired)

    @property
    def blur_chance(self) -> float:
        """Probability with which blur really fires."""
        return 1 - self.blur_p if self.blur_inverted else self.blur_p


def sample_keys(key: jax.Array, step: int | jax.Array, positions: jax.Array) -> jax.Array:
    """Keys [B] of the images at `positions` (int [B]) of the global batch of `step`, from the run's key."""
    key = jax.random.fold_in(key, step)
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.asarray(positions))


class Draws(NamedTuple):
    """What happens to each of B images: whether an operation fires (bool [B]) and how strongly.

    factors: of brightness, contrast and saturation, [B, 3]. hue: turns, [B]. order: of 0 brightness, 1 contrast,
    2 saturation, 3 hue, int [B, 4]. sigma: of the blur in pixels, [B]. Strengths are drawn even where nothing fires.
    """

    flip: jax.Array
    jitter: jax.Array
    factors: jax.Array
    hue: jax.Array
    order: jax.Array
    grayscale: jax.Array
    blur: jax.Array
    sigma: jax.Array
    solarize: jax.Array


@partial(jax.jit, static_argnames="config")
def draws(keys: jax.Array, config: AugmentConfig) -> Draws:
    """What `augment` draws with these keys [B]."""
    u = jax.vmap(lambda key: jax.random.uniform(key, (16,)))(keys)
    strengths = jnp.array([config.brightness, config.contrast, config.saturation])
    low, high = jnp.maximum(0, 1 - strengths), 1 + strengths  # zero is the lowest factor that torchvision draws
    sigma_low, sigma_high = config.blur_sigma
    return Draws(
        flip=u[:, 0] < config.flip_p,
        jitter=u[:, 1] < config.jitter_p,
        factors=low + (high - low) * u[:, 2:5],
        hue=config.hue * (2 * u[:, 5] - 1),
        order=jnp.argsort(u[:, 6:10], axis=1),
        grayscale=u[:, 10] < config.grayscale_p,
        blur=u[:, 11] < config.blur_chance,
        sigma=sigma_low + (sigma_high - sigma_low) * u[:, 12],
        solarize=u[:, 13] < config.solarize_p,
    )


@partial(jax.jit, static_argnames="config")
def augment(keys: jax.Array, images: jax.Array, config: AugmentConfig) -> jax.Array:
    """Augments float32 RGB [B, H, W, 3] in [0, 1] with one key per image (`sample_keys`); the same shape and range."""
    drawn = draws(keys, config)
    x = images
    if config.flip_p:
        x = _where(drawn.flip, x[:, :, ::-1], x)
    if config.jitter_p:
        x = _if_any(drawn.jitter, lambda x: colour_jitter(x, drawn.factors, drawn.hue, drawn.order), x)
    if config.grayscale_p:
        x = _where(drawn.grayscale, jnp.broadcast_to(luma(x), x.shape), x)
    if config.blur_chance:
        x = _if_any(drawn.blur, lambda x: gaussian_blur(x, drawn.sigma, config.blur_kernel), x)
    if config.solarize_p:
        # A level that is exactly at the threshold counts as reaching it, whichever way its division by 255 rounded.
        reached = x >= config.solarize_threshold - 1e-6
        x = _where(drawn.solarize, jnp.where(reached, 1 - x, x), x)
    return x


def _where(chosen_B: jax.Array, yes: jax.Array, no: jax.Array) -> jax.Array:
    return jnp.where(chosen_B[:, None, None, None], yes, no)


def _if_any(chosen_B: jax.Array, change: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`change(x)` for the chosen images, for nothing where there are none.

    A branch is compiled by itself, so that no later operation computes this one again for every pixel it reads; on a
    CPU that makes the whole four times as fast.
    """
    return jax.lax.cond(jnp.any(chosen_B), lambda x: _where(chosen_B, change(x), x), lambda x: x, x)


def luma(x_BxHxWx3: jax.Array) -> jax.Array:
    """Grey value [B, H, W, 1] (ITU-R 601)."""
    r, g, b = jnp.split(x_BxHxWx3, 3, axis=-1)  # no matmul: an accelerator would round it to bfloat16
    return 0.2989 * r + 0.587 * g + 0.114 * b


def colour_jitter(x: jax.Array, factors_Bx3: jax.Array, hue_B: jax.Array, order_Bx4: jax.Array) -> jax.Array:
    """Brightness, contrast, saturation (factors) and hue (turns) of x [B, H, W, 3], in each image's own order.

    order: a permutation of 0 brightness, 1 contrast, 2 saturation, 3 hue for every image. The first three are one kind
    of operation, a blend with black, with the mean grey or with the grey image. So each image gets the blends that
    come before its hue shift, the hue shift, and the blends after it, and hue, the dear one, is computed once.
    """
    slot_of_hue = jnp.argmax(order_Bx4 == 3, axis=1)
    computed_once = jax.lax.optimization_barrier  # a mean needs the whole picture, which is not to be made twice
    for slot in range(3):
        x = computed_once(_blend(x, factors_Bx3, order_Bx4[:, slot], slot < slot_of_hue))
    x = computed_once(shift_hue(x, hue_B))
    for slot in range(1, 4):
        x = computed_once(_blend(x, factors_Bx3, order_Bx4[:, slot], slot > slot_of_hue))
    return x


def _blend(x, factors_Bx3, operation_B, active_B):
    factor = jnp.take_along_axis(factors_Bx3, jnp.minimum(operation_B, 2)[:, None], axis=1)[:, 0]
    factor = jnp.where(active_B, factor, 1.0)[:, None, None, None]
    grey = luma(x)
    operation = operation_B[:, None, None, None]
    target = jnp.where(operation == 1, grey.mean(axis=(1, 2), keepdims=True), jnp.where(operation == 2, grey, 0.0))
    return jnp.clip(factor * x + (1 - factor) * target, 0, 1)


def shift_hue(x: jax.Array, turns_B: jax.Array) -> jax.Array:
    """Rotates the hue of every pixel of x [B, H, W, 3] in HSV by its image's turns (1 = the whole circle)."""
    r, g, b = x[..., 0], x[..., 1], x[..., 2]
    value = x.max(axis=-1)
    chroma = value - x.min(axis=-1)
    safe = jnp.where(chroma == 0, 1.0, chroma)
    sextant = jnp.where(value == r, (g - b) / safe, jnp.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4))
    sextant = sextant + 6 * turns_B[:, None, None]
    sextant = sextant - 6 * jnp.floor(sextant / 6)  # a remainder costs more than all else here
    # How much of the chroma each channel has: a trapezoid around its own hue, at 0, 2 and 4 sixths.
    parts = (jnp.abs(sextant - 3) - 1, 2 - jnp.abs(sextant - 2), 2 - jnp.abs(sextant - 4))
    return jnp.stack([value - chroma * (1 - jnp.clip(part, 0, 1)) for part in parts], axis=-1)


def gaussian_blur(x: jax.Array, sigma_B: jax.Array, taps: int) -> jax.Array:
    """Separable Gaussian of `taps` taps, reflected borders and its own sigma (pixels) for every image of [B, H, W, C].

    A sum of shifted pictures, along one axis after the other. The barrier keeps compilers from fusing it with whatever
    made the picture, which they would compute anew for every tap.
    """
    offsets = jnp.arange(taps, dtype=x.dtype) - taps // 2
    weights = jnp.exp(-0.5 * (offsets / sigma_B[:, None]) ** 2)
    weights = weights / weights.sum(axis=1, keepdims=True)
    for axis in (1, 2):
        edges = [(0, 0)] * 4
        edges[axis] = (taps // 2, taps // 2)
        wide, n = jax.lax.optimization_barrier(jnp.pad(x, edges, mode="reflect")), x.shape[axis]
        shifted = (jax.lax.slice_in_dim(wide, t, t + n, axis=axis) for t in range(taps))
        x = sum(weights[:, t, None, None, None] * part for t, part in enumerate(shifted))
    return x


def to_uint8(x: jax.Array) -> jax.Array:
    """[0, 1] to the nearest of 0..255."""
    return jnp.round(jnp.clip(x, 0, 1) * 255).astype(jnp.uint8)


@partial(jax.jit, static_argnames="config")
def augment_uint8(
    key: jax.Array, step: jax.Array, positions: jax.Array, images: jax.Array, config: AugmentConfig
) -> tuple[jax.Array, jax.Array]:
    """(augmented pixels uint8 [B, S, S, 3], each image's key words uint32 [B, 2]) of uint8 images that stand at
    `positions` (int [B]) of the global batch of `step`, with the run's key."""
    keys = sample_keys(key, step, positions)
    return to_uint8(augment(keys, images.astype(jnp.float32) / 255, config)), jax.random.key_data(keys)


def host_augment(config: AugmentConfig, seed: int) -> Callable[[int, np.ndarray, np.ndarray | None], np.ndarray]:
    """The same augmentation on this machine's CPU, for pixels that host teachers must see before the batch leaves.

    Returns f(step, images uint8 [b, S, S, 3], positions) -> uint8 [b, S, S, 3]; the images stand at `positions` (int
    [b], None: from 0 on) of the global batch of `step`, and their keys are those of the device's augmentation.
    """
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.default_device(cpu):
        key = jax.random.key(seed)

    def augment_on_cpu(step: int, images: np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
        positions = np.arange(len(images)) if positions is None else np.asarray(positions)
        with jax.default_device(cpu):
            return np.asarray(augment_uint8(key, step, positions, images, config)[0])

    return augment_on_cpu
