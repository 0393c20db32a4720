"""Depth from bins, the scale-invariant loss, and the usual errors of monocular depth."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

# y1, y2, x1, x2 of the Eigen crop as fractions of 480 x 640
_EIGEN = (45 / 480, 471 / 480, 41 / 640, 601 / 640)
THRESHOLDS = {"d1": 1.25, "d2": 1.25**2, "d3": 1.25**3}


def eigen_box(height: int, width: int) -> tuple[int, int, int, int]:
    """(y1, y2, x1, x2) of the Eigen crop: rows 45:471 and columns 41:601 of 480 x 640, scaled to other sizes."""
    y1, y2, x1, x2 = _EIGEN
    return int(y1 * height), int(y2 * height), int(x1 * width), int(x2 * width)


def bin_centres(count: int, low: float, high: float, spacing: str = "linear") -> np.ndarray:
    """float32 [count] from `low` to `high` metres, "linear" or "log" spaced; raises ValueError for another spacing."""
    if spacing == "linear":
        return np.linspace(low, high, count).astype(np.float32)
    if spacing == "log":
        return np.geomspace(low, high, count).astype(np.float32)
    raise ValueError(f"bins are spaced 'linear' or 'log', not {spacing!r}")


def depth_from_bins(logits: jax.Array, centres: np.ndarray, weighting: str = "linear") -> jax.Array:
    """Expected depth [..., h, w] of bin logits [..., h, w, bins].

    `weighting` of bins: "linear" relu + 0.1, normalised (the authors'); "softmax"; "sigmoid", normalised.

    Raises:
      ValueError: unknown weighting.
    """
    if weighting == "softmax":
        weights = jax.nn.softmax(logits, axis=-1)
    elif weighting in ("linear", "sigmoid"):
        weights = jax.nn.relu(logits) + 0.1 if weighting == "linear" else jax.nn.sigmoid(logits)
        weights = weights / weights.sum(axis=-1, keepdims=True)
    else:
        raise ValueError(f"bins are weighted 'linear', 'softmax' or 'sigmoid', not {weighting!r}")
    return jnp.einsum("...c,c->...", weights, jnp.asarray(centres), precision=jax.lax.Precision.HIGHEST)


def scale_invariant_loss(
    prediction: jax.Array, target: jax.Array, valid: jax.Array, with_variance: jax.Array | bool, eps: float = 1e-3
) -> jax.Array:
    """sqrt(var(g) + 0.15 mean(g)^2) with g = log(prediction + eps) - log(target + eps) over the valid pixels.

    prediction, target and valid are [..., H, W]. The variance is the sample's (n - 1); `with_variance` false leaves it
    out, as at the start of training. Without a valid pixel the loss, and its gradient, are 0.
    """
    count = valid.sum()
    g = jnp.where(valid, jnp.log(prediction + eps) - jnp.log(jnp.where(valid, target, 1.0) + eps), 0.0)
    mean = g.sum() / jnp.maximum(count, 1)
    variance = jnp.where(valid, (g - mean) ** 2, 0.0).sum() / jnp.maximum(count - 1, 1)
    inside = 0.15 * mean**2 + jnp.where(with_variance, variance, 0.0)
    some = (count > 0) & (inside > 0)
    return jnp.where(some, jnp.sqrt(jnp.where(some, inside, 1.0)), 0.0)  # no infinite slope at 0


def errors(prediction: np.ndarray, target: np.ndarray, valid: np.ndarray) -> dict[str, float]:
    """Errors over the valid pixels of one map [H, W], in float64: metres, ratios, or fractions of pixels (d1, d2, d3).

    silog is 100 times the standard deviation of the log ratio. Predictions must be positive.

    Raises:
      ValueError: no valid pixel.
    """
    if not valid.any():
        raise ValueError("no valid depth to measure errors on")
    p, t = prediction[valid].astype(np.float64), target[valid].astype(np.float64)
    log_ratio, ratio = np.log(p) - np.log(t), np.maximum(p / t, t / p)
    return {
        "rmse": float(np.sqrt(np.mean((p - t) ** 2))),
        "abs_rel": float(np.mean(np.abs(p - t) / t)),
        "sq_rel": float(np.mean((p - t) ** 2 / t)),
        "rmse_log": float(np.sqrt(np.mean(log_ratio**2))),
        "log10": float(np.mean(np.abs(np.log10(p) - np.log10(t)))),
        "silog": float(100 * np.std(log_ratio)),
        "mae": float(np.mean(np.abs(p - t))),
        **{name: float(np.mean(ratio < bound)) for name, bound in THRESHOLDS.items()},
    }


def mean_errors(per_image: list[Mapping[str, float]]) -> dict[str, float]:
    """The authors' figures: every error per image, then the mean over images."""
    return {name: float(np.mean([row[name] for row in per_image])) for name in per_image[0]}
