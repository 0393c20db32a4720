"""k-nearest-neighbour classification on frozen class tokens (EUPE App. C, IN1k-KNN).

The paper speaks of a majority vote by L2 distance; the released code weighs votes by a softmax of cosine similarities.
The code is the default here, `vote="majority"` is the paper's text.
"""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from eupe_jax.data.host import decode
from eupe_jax.evals import classification as shared
from eupe_jax.evals.interface import Encoder, Result
from eupe_jax.evals.labelled import LabelledImages, TrainTest, load_split, load_train_test
from eupe_jax.sharding.mesh import batch_sharding, make_mesh, replicated

Data = TrainTest

_NO_RANGE = 1e-6  # cosine similarities in float32 are good to some 1e-7


@dataclass(frozen=True)
class Settings:
    """The authors' protocol by default.

    ks: numbers of neighbours; those above the number of training images are replaced by it.
    reported_k: the one whose accuracies are the plain "top1", "top5" and "mean_per_class"; the paper's is 10.
    vote: "softmax": weights softmax(similarity / temperature) over the max(ks) nearest training images; the vote for k
      sums the first k of them, so for k < max(ks) the weights of a vote do not add up to 1 (a quirk without effect on
      the winner). "majority": every neighbour counts one, ties go to the lower label.
    temperature: of the softmax.
    normalize: features are scaled to unit length first. Only a majority vote can do without: its neighbours are then
      the nearest by L2 distance of the features as they are (on unit vectors both orders agree).
    token: what stands for an image: class token, mean patch token (encoders without class token), or both.
    resize, crop: short side after a bicubic resize, and side of the centre crop, in pixels. An encoder whose patches do
      not divide `crop` gets the nearest multiple.
    leave_one_out: classify the training images by one another, passing over the nearest of each (itself); no test
      split is needed.
    test_split: name of the split to measure on; "": whichever of "val", "validation" and "test" is there.
    batch_size, threads: of feature extraction (0: what suits the device); no effect on the result beyond rounding.
    train_block, query_block: rows of a block of similarities; bounds memory on the device.
    """

    ks: tuple[int, ...] = (10, 20, 100, 200)
    reported_k: int = 10
    vote: Literal["softmax", "majority"] = "softmax"
    temperature: float = 0.07
    normalize: bool = True
    token: shared.TokenChoice = "cls"
    resize: int = 256
    crop: int = 224
    leave_one_out: bool = False
    test_split: str = ""
    batch_size: int = 0
    threads: int = 4
    train_block: int = 16384
    query_block: int = 1024

    def __post_init__(self):
        if not self.ks or min(self.ks) < 1 or self.reported_k not in self.ks:
            raise ValueError(f"ks must be positive and hold reported_k={self.reported_k}, got {self.ks}")
        if self.vote not in ("softmax", "majority"):
            raise ValueError(f"vote must be 'softmax' or 'majority', got {self.vote!r}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.vote == "softmax" and not self.normalize:
            raise ValueError("vote='softmax' is defined on cosine similarities: set normalize=True or vote='majority'")


def load(folder: Path, settings: Settings) -> Data:
    """The splits of a labelled set (`labelled`); raises DataError where they are broken."""
    if settings.leave_one_out:
        train = load_split(folder, "train")
        return Data(train, train)
    return load_train_test(folder, settings.test_split)


def run(encoder: Encoder, data: Data, settings: Settings, *, workdir: Path | None = None) -> Result:
    """Top-1, top-5 and mean-per-class accuracy for every k.

    Raises:
      ValueError: an encoder without class token (the message says what to set), or one that does not take the crop.
    """
    crop, details = shared.fit_crop(settings.resize, settings.crop, encoder)
    options = dict(crop=crop, batch_size=settings.batch_size, threads=settings.threads, workdir=workdir)
    train = shared.image_features(encoder, data.train, settings.token, **options)
    test = train if settings.leave_one_out else shared.image_features(encoder, data.test, settings.token, **options)
    labels = data.test.labels

    ranked, similarity, index = classify(
        train, data.train.labels, test, len(data.train.classes), settings, progress=True
    )
    metrics, table = {}, []
    for k, predicted in ranked.items():
        found = shared.accuracies(predicted, labels)
        table.append({"k": k, **found})
        metrics |= {f"{name}_k{k}": value for name, value in found.items()}
    reported = ranked[min(settings.reported_k, max(ranked))]
    metrics = shared.accuracies(reported, labels) | metrics
    details |= {
        "settings": dataclasses.asdict(settings),
        "train_images": len(data.train),
        "test_images": len(data.test),
        "classes": len(data.train.classes),
        "ks_used": list(ranked),
        "median_similarity_range": float(np.median(similarity[:, 0] - similarity[:, -1])),
    }
    if settings.normalize and details["median_similarity_range"] < _NO_RANGE:
        details["range_note"] = "the features of all images are nearly the same: neighbours are decided by rounding"
    tables = {"by_k": table, "by_class": shared.class_table(reported[:, 0], labels, data.train.classes)}
    return Result(metrics, tables, {"neighbours": _picture(data, index, reported[:, 0])}, details)


def classify(
    train_NxD: np.ndarray,
    train_labels: np.ndarray,
    test_MxD: np.ndarray,
    classes: int,
    settings: Settings,
    progress: bool = False,
) -> tuple[dict[int, np.ndarray], np.ndarray, np.ndarray]:
    """({k: predicted labels, best first (`shared.rank`)}, similarity and index of `neighbours`); train_labels: [N]."""
    similarity, index = neighbours(train_NxD, test_MxD, settings, progress)
    parts: dict[int, list[np.ndarray]] = {}
    for start in range(0, len(test_MxD), settings.query_block):
        block = slice(start, start + settings.query_block)
        for k, votes in vote(similarity[block], train_labels[index[block]], classes, settings).items():
            parts.setdefault(k, []).append(shared.rank(votes))
    return {k: np.concatenate(x) for k, x in parts.items()}, similarity, index


def neighbours(
    train_NxD: np.ndarray, test_MxD: np.ndarray, settings: Settings, progress: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(similarity [M, K], row of `train` [M, K]) of the K = max(ks) nearest, nearest first; K <= N.

    Training features go over the device once, in blocks, beside a running list of the best of every test image; test
    rows are cut over all devices. Similarity is the dot product of unit vectors, or x . y - |y|^2 / 2, which orders as
    the L2 distance does.

    Raises:
      ValueError: fewer training images than that takes.
    """
    skip = int(settings.leave_one_out)
    count = min(max(settings.ks) + skip, len(train_NxD))
    if count <= skip:
        raise ValueError(f"{len(train_NxD)} training image(s) are too few to find neighbours among")
    if settings.normalize:
        train_NxD, test_MxD = _unit(train_NxD), _unit(test_MxD)
    mesh = make_mesh(devices=jax.local_devices())
    rows = -(-min(settings.query_block, len(test_MxD)) // mesh.size) * mesh.size
    queries, best = [], []
    for start in range(0, len(test_MxD), rows):
        queries.append(jax.device_put(_padded(test_MxD[start : start + rows], rows), batch_sharding(mesh)))
        empty = np.full((rows, count), -np.inf, np.float32), np.zeros((rows, count), np.int32)
        best.append(jax.device_put(empty, batch_sharding(mesh)))
    block = min(settings.train_block, len(train_NxD))
    with tqdm(total=len(train_NxD), desc="neighbours", unit="img", disable=not progress) as bar:
        for start in range(0, len(train_NxD), block):
            part = train_NxD[start : start + block]
            bank = jax.device_put(_padded(part, block), replicated(mesh))
            for i, query in enumerate(queries):
                best[i] = _merge(mesh, best[i], query, bank, start, len(part), not settings.normalize)
            bar.update(len(part))
    similarity, index = (np.concatenate(x)[: len(test_MxD), skip:] for x in zip(*jax.device_get(best), strict=True))
    return similarity, index


@functools.partial(jax.jit, static_argnames=("mesh", "euclidean"), donate_argnames="best")
def _merge(mesh: Mesh, best, query_BxD, bank_NxD, start, valid, euclidean: bool):
    """The best of the ones so far and a block of the bank, of which `valid` rows count.

    Every device keeps to its own rows. Left to the compiler, top_k would bring the similarities of all of them to each.
    """
    rows, whole = batch_sharding(mesh).spec, replicated(mesh).spec
    merge = jax.shard_map(
        functools.partial(_merge_rows, euclidean=euclidean),
        mesh=mesh,
        in_specs=(rows, rows, whole, whole, whole),
        out_specs=rows,
    )
    return merge(best, query_BxD, bank_NxD, start, valid)


def _merge_rows(best, query_BxD, bank_NxD, start, valid, *, euclidean: bool):
    best_similarity, best_index = best
    similarity = jnp.matmul(query_BxD, bank_NxD.T, precision=jax.lax.Precision.HIGHEST)
    if euclidean:
        similarity -= jnp.square(bank_NxD).sum(axis=1) / 2
    column = jnp.arange(len(bank_NxD), dtype=jnp.int32)
    similarity = jnp.where(column < valid, similarity, -jnp.inf)
    # Earlier rows come first and top_k keeps the order of equals: ties go to the lower row, however blocks are cut.
    similarity = jnp.concatenate([best_similarity, similarity], axis=1)
    top, at = jax.lax.top_k(similarity, best_similarity.shape[1])
    known = best_similarity.shape[1]
    older = jnp.take_along_axis(best_index, jnp.minimum(at, known - 1), axis=1)
    return top, jnp.where(at < known, older, start + at - known)


def vote(similarity_BxK: np.ndarray, labels_BxK: np.ndarray, classes: int, settings: Settings) -> dict[int, jax.Array]:
    """{k: votes for every class, float32 [B, classes]}, with k as used: never above the number of neighbours."""
    found = similarity_BxK.shape[1]
    ks = sorted({min(k, found) for k in settings.ks})
    votes = _votes(similarity_BxK, labels_BxK, classes, tuple(ks), settings.temperature, settings.vote)
    return dict(zip(ks, votes, strict=True))


@functools.partial(jax.jit, static_argnums=(2, 3, 5))
def _votes(similarity_BxK, labels_BxK, classes: int, ks: tuple[int, ...], temperature: float, kind: str):
    weights = jax.nn.softmax(similarity_BxK / temperature, axis=1)
    weights = weights if kind == "softmax" else jnp.ones_like(weights)
    row = jnp.arange(len(labels_BxK))[:, None]
    votes, total, done = [], jnp.zeros((len(labels_BxK), classes), jnp.float32), 0
    for k in ks:
        total = total.at[row, labels_BxK[:, done:k]].add(weights[:, done:k])
        votes.append(total)
        done = k
    return votes


def _unit(x_NxD: np.ndarray) -> np.ndarray:
    return x_NxD / np.maximum(np.linalg.norm(x_NxD, axis=1, keepdims=True), 1e-12)


def _padded(x_NxD: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(x_NxD, ((0, rows - len(x_NxD)), (0, 0)))


def _picture(data: Data, index: np.ndarray, predicted: np.ndarray, images: int = 8, nearest: int = 6) -> np.ndarray:
    """Test images, evenly spread, each beside its nearest training images; green frames are of the right class."""

    def cell(source: LabelledImages, i: int, right: int | None) -> tuple[np.ndarray, str, tuple[int, int, int]]:
        label = source.labels[i]
        colour = shared.GREY if right is None else shared.GREEN if label == right else shared.RED
        return decode(source[i]), source.classes[label], colour

    rows = []
    for i in np.linspace(0, len(data.test) - 1, min(images, len(data.test))).astype(int):
        right = data.test.labels[i]
        image, name, _ = cell(data.test, i, None)
        verdict = shared.GREEN if predicted[i] == right else shared.RED
        rows.append([(image, name, verdict)] + [cell(data.train, j, right) for j in index[i, :nearest]])
    return shared.captioned_grid(rows)
