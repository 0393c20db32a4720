"""What the fixtures of both dense evaluations share: a backbone that normalises nothing, and the head's weights."""

from typing import Any

from eupe_jax.evals import linear_head
from eupe_jax.evals.encoders import FlaxEncoder
from eupe_jax.models import interchange, zoo
from eupe_jax.training.encoders import LoadedEncoder
from tests.golden_kinds.common import Fixture


def plain_encoder(fixture: Fixture, prefix: str, overrides: dict[str, Any]) -> FlaxEncoder:
    """The ViT below `prefix`, for images that are normalised already."""
    name = "eupe_vitt16"
    weights = {k.removeprefix(prefix): v for k, v in fixture.weights.items() if k.startswith(prefix)}
    variables = interchange.from_state_dict(name, weights, **overrides)
    manifest = {"resolution": 256, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    return FlaxEncoder(LoadedEncoder(name, overrides, zoo.build(name, **overrides), variables, manifest))


def head_from(fixture: Fixture, prefix: str, convolution: str) -> linear_head.Head:
    """Batch norm and convolution below `prefix`; the fixture's batch norm must be the one we have."""
    norm, conv = f"{prefix}batchnorm_layer.", f"{prefix}{convolution}."
    for key, ours in (("batchnorm_eps", linear_head.BN_EPS), ("batchnorm_momentum", linear_head.BN_MOMENTUM)):
        assert fixture.meta.get(key, ours) == ours, f"{key} is {fixture.meta[key]}"
    weights = fixture.weights
    return {
        "params": {
            "scale": weights[f"{norm}weight"],
            "shift": weights[f"{norm}bias"],
            "kernel": weights[f"{conv}weight"][:, :, 0, 0].T,
            "bias": weights[f"{conv}bias"],
        },
        "stats": {"mean": weights[f"{norm}running_mean"], "var": weights[f"{norm}running_var"]},
    }
