"""What the quickstart measures on held-out images: agreement with each expert, a ridge read-out, and PCA panels."""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from configs import quickstart as recipes
from eupe_jax.data.feature_cache import FeatureCache
from eupe_jax.distill.host_teachers import load_host_teacher
from eupe_jax.distill.normalization import Statistics, normalize
from eupe_jax.evals import features, pca, readout, similarity
from eupe_jax.training.encoders import LoadedEncoder, load_encoder, load_statistics
from launch.quickstart_images import Corpus
from launch.quickstart_verdict import margins_of

READOUT_IMAGES = 200
PANEL_IMAGES, PANEL_RESOLUTION = 6, 192
WHAT = {
    "efficientnet": {
        "title": "EfficientNet-Lite0",
        "licence": "Apache-2.0",
        "what": "image content (ImageNet classifier)",
    },
    "ppocr": {"title": "PP-OCRv4 text detector", "licence": "Apache-2.0", "what": "text and fine strokes"},
}

Rows = dict[str, dict]


def load_student(out: Path) -> LoadedEncoder:
    """The student after stage 3."""
    return load_encoder(out / "stage3")


def evaluate(out: Path, stage1: ConfigDict, corpus: Corpus) -> tuple[dict, dict[str, np.ndarray]]:
    """Everything the summary says of quality, and the columns of the PCA figure.

    Everything is measured at the resolution of the exported file; the student's others are listed beside it.
    """
    student, proxy = load_student(out), load_encoder(out / "stage1")
    encoders = {
        "student": student,
        "proxy": proxy,
        "untrained": _untrained(student),
        "shuffled": load_encoder(out / "shuffled"),
    }
    chains = {
        "student": similarity.load_chain(out / "stage3"),
        "proxy": similarity.load_chain(out / "stage1"),
        "shuffled": similarity.load_chain(out / "shuffled"),
    }
    chains["untrained"] = chains["student"]
    experts = {
        name: load_host_teacher(entry.factory, **entry.kwargs, resolution=entry.resolutions[0])
        for name, entry in stage1.teachers.items()
    }
    statistics = load_statistics(out / "stage1")
    cache = FeatureCache(out / "features")
    position_maps = {name: _position_map(cache, name, statistics[name]) for name in experts}
    fit_images = _fit_images(corpus)
    fit_targets = _targets(experts, statistics, fit_images)
    side = student.resolution
    fit_tokens = {row: _extract(encoder, fit_images, side) for row, encoder in encoders.items()}

    agreement: Rows = {}
    by_resolution: Rows = {}
    readouts: Rows = {}
    for heldout, (images, _) in corpus.heldout.items():
        targets = _targets(experts, statistics, images)
        tokens = {row: _extract(encoder, images, side) for row, encoder in encoders.items()}
        agreement[heldout] = {row: _agreement(tokens[row], chains[row], targets) for row in encoders}
        agreement[heldout]["position_map"] = {
            name: similarity.agreement(_repeat(position_maps[name], len(images)), target)
            for name, target in targets.items()
        }
        by_resolution[heldout] = {
            str(r): _agreement(_extract(student, images, r), chains["student"], targets) for r in recipes.SCALES
        }
        readouts[heldout] = {
            row: {
                name: readout.patch_readout(
                    fit_tokens[row]["patches"], fit_targets[name]["patches"], tokens[row]["patches"], target["patches"]
                )
                for name, target in targets.items()
            }
            for row in encoders
        }
    figures = {
        "experts": {name: _describe_expert(name, teacher.spec) for name, teacher in experts.items()},
        "models": {"proxy": _describe_model(proxy), "student": _describe_model(student)},
        "agreement_resolution": side,
        "agreement": agreement,
        "student_by_resolution": by_resolution,
        "readout": readouts,
        "margins": margins_of(agreement),
    }
    images = next(iter(corpus.heldout.values()))[0][:PANEL_IMAGES]
    return figures, _panels(images, experts, statistics, encoders)


def _untrained(encoder: LoadedEncoder) -> LoadedEncoder:
    """The same architecture with fresh random weights."""
    images = jnp.zeros((1, encoder.resolution, encoder.resolution, 3))
    variables = jax.jit(encoder.module.init)(jax.random.key(1234), images)
    return LoadedEncoder(encoder.name, encoder.overrides, encoder.module, variables, encoder.manifest, "untrained")


def _extract(encoder: LoadedEncoder, images: np.ndarray, resolution: int) -> dict[str, np.ndarray]:
    return features.extract(lambda x: encoder(x, resolution), images)


def _targets(experts: Mapping, statistics: Mapping[str, Statistics], images: np.ndarray) -> dict[str, dict]:
    """Every expert's features in its normalised space."""
    targets = {}
    for name, expert in experts.items():
        raw, known = features.extract(expert, images), statistics[name]
        targets[name] = {k: np.asarray(normalize(raw[k], known.mean[k], known.std[k])) for k in known.mean}
    return targets


def _agreement(tokens: Mapping, chain: list[similarity.Hop], targets: Mapping) -> dict[str, dict[str, float]]:
    predicted = similarity.predict_experts(tokens, chain)
    return {name: similarity.agreement(predicted[name], target) for name, target in targets.items()}


def _position_map(cache: FeatureCache, name: str, statistics: Statistics) -> dict[str, np.ndarray]:
    """The mean of the training images' features at every position, in the normalised space."""
    batch = cache.entries(np.arange(len(cache)))["features"][name]
    tokens = {k: np.asarray(normalize(batch[k], statistics.mean[k], statistics.std[k])) for k in statistics.mean}
    return similarity.position_map(tokens)


def _repeat(tokens: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    return {kind: np.repeat(x, count, axis=0) for kind, x in tokens.items()}


def _fit_images(corpus: Corpus) -> np.ndarray:
    """Training images for the read-out, squashed like the held-out ones."""
    side = recipes.EXPERT_RESOLUTION
    paths = sorted(corpus.train.iterdir())[:READOUT_IMAGES]
    pictures = [Image.open(p).convert("RGB").resize((side, side), Image.Resampling.BICUBIC) for p in paths]
    return np.stack([np.asarray(p) for p in pictures])


def _describe_expert(name: str, spec) -> dict:
    return {
        **WHAT[name],
        "cls_dim": spec.cls_dim,
        "patch_dim": spec.patch_dim,
        "grid": spec.grid,
        "resolution": spec.resolution,
    }


def _describe_model(encoder: LoadedEncoder) -> dict:
    parameters = sum(x.size for x in jax.tree.leaves(encoder.variables["params"]))
    resolutions = encoder.manifest["resolutions"]
    return {"model": encoder.name, "overrides": encoder.overrides, "parameters": parameters, "resolutions": resolutions}


def _panels(images: np.ndarray, experts: Mapping, statistics: Mapping, encoders: Mapping) -> dict[str, np.ndarray]:
    """{column: [N, S, S, 3] in [0, 1]}: the images, then every model's PCA fitted alike."""
    side = images.shape[1]
    columns = {"image": images / 255.0}
    for name, target in _targets(experts, statistics, images).items():
        columns[WHAT[name]["title"]] = pca.pca_to_rgb(target["patches"], side)
    for row in ("proxy", "student", "untrained"):
        tokens = _extract(encoders[row], images, PANEL_RESOLUTION)
        columns[row if row == "proxy" else f"{row} ViT-T"] = pca.pca_to_rgb(tokens["patches"], side)
    return columns
