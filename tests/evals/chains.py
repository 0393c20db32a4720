"""Checkpoints of distilled encoders whose adapters are known exactly."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from eupe_jax.training.checkpoints import Checkpoints
from eupe_jax.training.encoders import LoadedEncoder

LINEAR = 1e8  # an adapter's LayerNorm with this eps divides by a constant

Hop = tuple[str, Mapping[str, Mapping], Mapping, str]  # teacher, {kind: adapter}, its statistics, its fingerprint


def linear_adapter(weights_DxE: np.ndarray, offset_E: np.ndarray) -> dict:
    """The parameters of an adapter that computes x @ weights + offset: gelu(u) - gelu(-u) = u."""
    width = len(offset_E)
    identity = np.eye(width, dtype=np.float32)
    return {
        "fc1": {"kernel": np.concatenate([weights_DxE, -weights_DxE], axis=1).astype(np.float32)},
        "norm": {
            "scale": np.full(2 * width, LINEAR**0.5, np.float32),
            "bias": np.concatenate([offset_E, -offset_E]).astype(np.float32),
        },
        "fc2": {"kernel": np.concatenate([identity, -identity])},
    }


def statistics_of(**tokens: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """{"mean": {kind: [D]}, "std": {kind: [D]}} of tokens [..., D]."""
    flat = {kind: x.reshape(-1, x.shape[-1]) for kind, x in tokens.items()}
    return {"mean": {k: x.mean(0) for k, x in flat.items()}, "std": {k: x.std(0) for k, x in flat.items()}}


def write_checkpoint(folder: Path, loaded: LoadedEncoder, hops: Sequence[Hop]) -> str:
    """A checkpoint with one student, "s", and one or two hops to its teachers; all adapters of a hop are as wide."""

    def described(hop: Hop) -> dict:
        shapes = {kind: adapter["fc2"]["kernel"].shape for kind, adapter in hop[1].items()}
        ((hidden),) = {hidden for hidden, _ in shapes.values()}
        return {"hidden_dim": hidden, "eps": LINEAR, "out_dims": {hop[0]: {k: n for k, (_, n) in shapes.items()}}}

    def arrays(hop: Hop) -> dict:
        teacher, adapters, statistics, _ = hop
        return {
            "adapters": {f"{teacher}_{kind}": adapter for kind, adapter in adapters.items()},
            "statistics": {teacher: statistics},
        }

    def headers(hop: Hop) -> dict:
        return {hop[0]: {"provenance": {"teacher": hop[3]}}}

    first, chain, chain_headers = hops[0], {}, {}
    if len(hops) == 2:
        chain = {first[0]: arrays(hops[1])}
        chain_headers = {first[0]: {"adapters": described(hops[1]), "statistics": headers(hops[1])}}
    student = {
        "params": {"backbone": loaded.variables["params"], "adapters": arrays(first)["adapters"]},
        "buffers": loaded.variables["buffers"],
        "optimizer": {"count": np.int32([0])},
    }
    manifest = {
        "students": {"s": {**loaded.manifest, "adapters": described(first)}},
        "statistics": headers(first),
        "chain": chain_headers,
    }
    checkpoints = Checkpoints(folder, ConfigDict({"save_every": 1, "keep": 1, "keep_every": 0}))
    checkpoints.save(1, {"students": {"s": student}}, arrays(first)["statistics"], chain, manifest, force=True)
    checkpoints.close()
    return str(folder)
