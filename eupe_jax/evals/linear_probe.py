"""Linear probe: multinomial logistic regression on frozen features of whole images.

The features are taken once, from centre crops, and standardised. The regression minimises

    mean cross-entropy + penalty / 2 * |kernel|^2        (the bias is free)

by full-batch L-BFGS in float32, from the strongest penalty to the weakest, each started where the last one ended. The
penalty that does best on held-out training images is fitted again on all of them. The problem is convex: there is no
learning rate to tune and nothing random but the choice of the held-out images.
"""

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from eupe_jax.data.host import decode
from eupe_jax.evals import classification as shared
from eupe_jax.evals.features import load_arrays, save_arrays
from eupe_jax.evals.interface import Encoder, Result
from eupe_jax.evals.labelled import TrainTest, load_train_test
from eupe_jax.sharding.mesh import BATCH_AXES, make_mesh, replicated

Data = TrainTest


@dataclass(frozen=True)
class Settings:
    """EUPE reports no linear probe on ImageNet; these are the usual choices for one.

    token: what stands for an image: class token, mean patch token, or both side by side.
    resize, crop: short side after a bicubic resize, and side of the centre crop, in pixels. An encoder whose patches do
      not divide `crop` gets the nearest multiple.
    penalties: candidates of the L2 penalty, for standardised features; with a single one nothing is held out.
    holdout: part of every class's training images that chooses the penalty.
    iterations: at most so many L-BFGS steps a fit. tolerance: norm of the gradient at which a fit is done.
    seed: of the choice of held-out images.
    block: training images whose logits are in memory at a time.
    test_split: name of the split to measure on; "": whichever of "val", "validation" and "test" is there.
    batch_size, threads: of feature extraction (0: what suits the device); no effect on the result beyond rounding.
    """

    token: shared.TokenChoice = "cls"
    resize: int = 256
    crop: int = 224
    penalties: tuple[float, ...] = (1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 1e-4, 1e-5)
    holdout: float = 0.2
    iterations: int = 200
    tolerance: float = 1e-4
    seed: int = 0
    block: int = 65536
    test_split: str = ""
    batch_size: int = 0
    threads: int = 4

    def __post_init__(self):
        if not self.penalties or min(self.penalties) <= 0:
            raise ValueError(f"penalties must be positive, got {self.penalties}")
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout must be between 0 and 1, got {self.holdout}")


@dataclass(frozen=True)
class Probe:
    """A fitted classifier of raw features [M, D]: logits ((x - mean) / scale) @ kernel + bias."""

    penalty: float
    mean: np.ndarray
    scale: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray

    def __call__(self, features_MxD: np.ndarray) -> np.ndarray:
        return ((features_MxD - self.mean) / self.scale) @ self.kernel + self.bias


def load(folder: Path, settings: Settings) -> Data:
    """The splits of a labelled set (`labelled`); raises DataError where they are broken."""
    return load_train_test(folder, settings.test_split)


def run(encoder: Encoder, data: Data, settings: Settings, *, workdir: Path | None = None) -> Result:
    """Top-1, top-5 and mean-per-class accuracy of the probe on the test split.

    Raises:
      ValueError: an encoder without class token (the message says what to set), or one that does not take the crop.
    """
    crop, details = shared.fit_crop(settings.resize, settings.crop, encoder)
    options = dict(crop=crop, batch_size=settings.batch_size, threads=settings.threads, workdir=workdir)
    train = shared.image_features(encoder, data.train, settings.token, **options)
    test = shared.image_features(encoder, data.test, settings.token, **options)
    classes, labels = data.train.classes, data.test.labels

    probe, sweep = fit(train, data.train.labels, len(classes), settings, workdir=workdir, progress=True)
    logits = probe(test)
    ranked = shared.rank(logits)
    metrics = shared.accuracies(ranked, labels)
    metrics["train_top1"] = shared.accuracies(shared.rank(probe(train)), data.train.labels)["top1"]
    details |= {
        "settings": dataclasses.asdict(settings),
        "train_images": len(data.train),
        "test_images": len(data.test),
        "classes": len(classes),
        "penalty": probe.penalty,
    }
    if sweep and probe.penalty in (sweep[0]["penalty"], sweep[-1]["penalty"]):
        details["penalty_note"] = "the best penalty is at the end of the candidates: a wider sweep may do better"
    tables = {"by_class": shared.class_table(ranked[:, 0], labels, classes)} | ({"by_penalty": sweep} if sweep else {})
    return Result(metrics, tables, {"mistakes": _picture(data, logits, ranked[:, 0])}, details)


def fit(
    features_NxD: np.ndarray,
    labels_N: np.ndarray,
    classes: int,
    settings: Settings,
    *,
    workdir: Path | None = None,
    progress: bool = False,
) -> tuple[Probe, list[dict[str, float]]]:
    """The probe with the best penalty, and a row a penalty: "penalty", "heldout_top1", "loss", "iterations".

    With a single candidate there is no sweep and no row. Ties go to the stronger penalty. With `workdir` every finished
    fit is kept there, and a later call goes on after it.

    Raises:
      ValueError: too few training images to hold any out.
    """
    mean, scale = features_NxD.mean(0, dtype=np.float64), features_NxD.std(0, dtype=np.float64)
    mean, scale = mean.astype(np.float32), np.where(scale > 1e-6, scale, 1.0).astype(np.float32)
    x = (features_NxD - mean) / scale
    kept = _Kept(workdir, features_NxD, labels_N, settings)
    solve = _Solver(x, labels_N, settings)
    start = {"kernel": np.zeros((x.shape[1], classes), np.float32), "bias": np.zeros(classes, np.float32)}
    penalties, sweep, fitted = sorted(settings.penalties, reverse=True), [], []
    if len(penalties) > 1:
        held = _held_out(labels_N, settings)
        for penalty in tqdm(penalties, desc="penalties", disable=not progress):
            start, facts = kept(f"penalty_{penalty:g}", lambda p=penalty, s=start: solve(~held, p, s))
            logits = x[held] @ start["kernel"] + start["bias"]
            top1 = shared.accuracies(shared.rank(logits), labels_N[held])["top1"]
            sweep.append({"penalty": penalty, "heldout_top1": top1, **facts})
            fitted.append(start)
        best = max(range(len(sweep)), key=lambda i: (sweep[i]["heldout_top1"], -i))
        start, penalties = fitted[best], [penalties[best]]
    params, _ = kept("final", lambda: solve(np.ones(len(x), bool), penalties[0], start))
    return Probe(penalties[0], mean, scale, params["kernel"], params["bias"]), sweep


def _held_out(labels_N: np.ndarray, settings: Settings) -> np.ndarray:
    """bool [N]: `holdout` of every class's images, rounded down."""
    generator = np.random.default_rng(settings.seed)
    held = np.zeros(len(labels_N), bool)
    for label in np.unique(labels_N):
        rows = generator.permutation(np.flatnonzero(labels_N == label))
        held[rows[: int(settings.holdout * len(rows))]] = True
    if not held.any():
        raise ValueError(
            f"{len(labels_N)} training images are too few to hold out {settings.holdout:g} of every class: "
            "give a single penalty or a larger holdout"
        )
    return held


class _Solver:
    """Fits on any subset of the rows; all fits share one compiled program, and rows are cut over all devices."""

    def __init__(self, x_NxD: np.ndarray, labels_N: np.ndarray, settings: Settings):
        self._settings, self._mesh = settings, make_mesh(devices=jax.local_devices())
        self._count, devices = len(x_NxD), self._mesh.size
        self._rows = -(-min(settings.block, len(x_NxD)) // devices) * devices
        self._blocks = -(-len(x_NxD) // self._rows)
        self._x, self._labels = self._place(x_NxD), self._place(labels_N)

    def _place(self, values: np.ndarray) -> jax.Array:
        """[N, ...] -> [blocks, rows, ...], padded with zeros, rows over the devices."""
        padding = self._blocks * self._rows - self._count
        padded = np.pad(values, [(0, padding)] + [(0, 0)] * (values.ndim - 1))
        blocks = padded.reshape(self._blocks, self._rows, *values.shape[1:])
        return jax.device_put(blocks, NamedSharding(self._mesh, PartitionSpec(None, BATCH_AXES)))

    def __call__(self, used_N: np.ndarray, penalty: float, start: dict) -> tuple[dict, dict[str, float]]:
        """(parameters, {"loss", "iterations"}) of a fit on the rows `used`, begun at `start`."""
        weights = self._place((used_N / used_N.sum()).astype(np.float32))
        start = jax.device_put(start, replicated(self._mesh))
        limits = (self._settings.iterations, self._settings.tolerance)
        params, loss, steps = jax.device_get(_minimise(start, self._x, self._labels, weights, penalty, *limits))
        return params, {"loss": float(loss), "iterations": int(steps)}


@jax.jit
def _minimise(params, x_BxRxD, labels_BxR, weights_BxR, penalty, iterations, tolerance):
    """L-BFGS on the weighted cross-entropy and the penalty: (parameters, loss, steps)."""

    @jax.checkpoint  # logits of one block at a time, in the backward pass too
    def block_loss(params, x_RxD, labels_R, weights_R):
        logits = jnp.matmul(x_RxD, params["kernel"], precision=jax.lax.Precision.HIGHEST) + params["bias"]
        return jnp.sum(weights_R * optax.softmax_cross_entropy_with_integer_labels(logits, labels_R))

    def loss(params):
        blocks = (x_BxRxD, labels_BxR, weights_BxR)
        total, _ = jax.lax.scan(lambda sum_, block: (sum_ + block_loss(params, *block), None), jnp.zeros(()), blocks)
        return total + penalty / 2 * jnp.sum(jnp.square(params["kernel"]))

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)  # the line search has computed both already

    def step(carry):
        params, state, steps, _ = carry
        value, gradient = value_and_grad(params, state=state)
        updates, state = optimizer.update(gradient, state, params, value=value, grad=gradient, value_fn=loss)
        norm = optax.tree.norm(optax.tree.get(state, "grad"))
        return optax.apply_updates(params, updates), state, steps + 1, norm

    def unfinished(carry):
        _, _, steps, norm = carry
        return (steps < iterations) & (norm > tolerance)

    start = (params, optimizer.init(params), jnp.zeros((), jnp.int32), jnp.inf)
    params, state, steps, _ = jax.lax.while_loop(unfinished, step, start)
    return params, loss(params), steps


class _Kept:
    """Runs fits, or reads them where an earlier run finished them on the same features with the same settings."""

    def __init__(self, workdir: Path | None, features_NxD: np.ndarray, labels_N: np.ndarray, settings: Settings):
        self._folder = None
        if workdir is not None:
            digest = hashlib.sha256(np.ascontiguousarray(features_NxD).data)
            digest.update(np.ascontiguousarray(labels_N).data)
            digest.update(repr((features_NxD.shape, settings)).encode())
            self._fingerprint = digest.hexdigest()
            self._folder = Path(workdir) / "linear_probe" / self._fingerprint[:16]

    def __call__(self, name: str, solve) -> tuple[dict, dict[str, float]]:
        if self._folder is None:
            return solve()
        path = self._folder / f"{name}.safetensors"
        found = load_arrays(path, self._fingerprint)
        if found is None:
            params, facts = solve()
            found = {**params, "loss": np.float64(facts["loss"]), "iterations": np.int64(facts["iterations"])}
            save_arrays(path, {key: np.asarray(value) for key, value in found.items()}, self._fingerprint)
        facts = {"loss": float(found["loss"]), "iterations": int(found["iterations"])}
        return {"kernel": found["kernel"], "bias": found["bias"]}, facts


def _picture(data: Data, logits_MxC: np.ndarray, predicted: np.ndarray, columns: int = 6, rows: int = 3) -> np.ndarray:
    """The most confident mistakes, each captioned with truth > prediction; with none, the least confident hits."""
    labels, classes = data.test.labels, data.test.classes
    z = logits_MxC - logits_MxC.max(axis=1, keepdims=True)
    confidence = 1.0 / np.exp(z).sum(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    order = (
        wrong[np.argsort(-confidence[wrong], kind="stable")] if len(wrong) else np.argsort(confidence, kind="stable")
    )
    cells = []
    for i in order[: columns * rows]:
        right = predicted[i] == labels[i]
        caption = classes[labels[i]] if right else f"{classes[labels[i]]}\n> {classes[predicted[i]]}"
        cells.append((decode(data.test[i]), caption, shared.GREEN if right else shared.RED))
    return shared.captioned_grid([cells[i : i + columns] for i in range(0, len(cells), columns)])
