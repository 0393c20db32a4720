"""Agreement with the experts: cosine in each expert's normalised space, through the chain of adapters.

A proxy predicts its experts with its own adapters. A student predicts the proxy, is de-normalised with the proxy's
statistics, and goes on through the proxy's adapters to the experts: the chain that zero-shot evaluation uses too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from eupe_jax.distill.adapters import AdapterBank
from eupe_jax.distill.losses import cosine, match_grids
from eupe_jax.distill.normalization import denormalize
from eupe_jax.training import checkpoints

Tokens = Mapping[str, jax.Array]


@dataclass(frozen=True)
class Hop:
    """The adapters of one distilled encoder to its teachers, and those teachers' statistics.

    statistics: {teacher: {"mean": {kind: [D]}, "std": {kind: [D]}}}.
    fingerprints: {teacher: digest of its weights, token choice and pixel normalisation}, as the statistics record it.
    """

    bank: AdapterBank
    params: Mapping
    statistics: Mapping
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, description: Mapping, params: Mapping, statistics: Mapping, headers: Mapping | None = None) -> "Hop":
        """From a manifest's "adapters" entry, the arrays that belong to it and the headers of the statistics."""
        bank = AdapterBank(description["hidden_dim"], description["out_dims"], description["eps"])
        fingerprints = {name: header["provenance"]["teacher"] for name, header in (headers or {}).items()}
        return cls(bank, params, statistics, fingerprints)

    @property
    def widths(self) -> dict[str, dict[str, int]]:
        """{teacher: {kind: width}} of its predictions."""
        return {teacher: dict(kinds) for teacher, kinds in self.bank.out_dims.items()}

    def only(self, *kinds: str) -> "Hop":
        """The same for some token kinds; teachers that have none of them are left out."""
        chosen = {t: {k: n for k, n in widths.items() if k in kinds} for t, widths in self.widths.items()}
        return replace(self, bank=self.bank.clone(out_dims={t: widths for t, widths in chosen.items() if widths}))

    def __call__(self, tokens: Tokens) -> dict[str, dict[str, jax.Array]]:
        """Predictions of every teacher's tokens, in that teacher's normalised space."""
        return self.bank.apply({"params": self.params}, tokens)


def load_chain(path: epath.PathLike, student: str | None = None) -> list[Hop]:
    """The hops from a checkpoint's student to the experts: one for a proxy, two for a student of a proxy.

    Raises:
      FileNotFoundError: nothing there. ValueError: not ours, ambiguous, or an encoder without adapters.
    """
    step = checkpoints.step_directory(path)
    manifest = checkpoints.read_manifest(step)
    entry = manifest["students"][checkpoints.pick_student(manifest, student, path)]
    if not entry.get("adapters"):
        raise ValueError(f"{path} holds an encoder without adapters: only what was distilled has a way to its experts")
    statistics = checkpoints.restore_item(step, "statistics")
    params = checkpoints.load_adapters(path, student)
    hops = [Hop.of(entry["adapters"], params, statistics, manifest["statistics"])]
    if manifest["chain"]:
        arrays = checkpoints.restore_item(step, "chain")
        if len(manifest["chain"]) > 1:
            raise ValueError(
                f"{path}: a student of several proxies ({sorted(manifest['chain'])}) has no single way back"
            )
        ((teacher, header),) = manifest["chain"].items()
        found = arrays[teacher]
        hops.append(Hop.of(header["adapters"], found["adapters"], found["statistics"], header["statistics"]))
    return hops


def predict_experts(tokens: Tokens, chain: Sequence[Hop]) -> dict[str, dict[str, jax.Array]]:
    """Follows the chain: {expert: {"cls": [B, Dc], "patches": [B, h, w, Dp]}} in the experts' normalised spaces."""
    for hop in chain[:-1]:
        ((teacher, predicted),) = hop(tokens).items()
        mean, std = hop.statistics[teacher]["mean"], hop.statistics[teacher]["std"]
        tokens = {kind: denormalize(x, mean[kind], std[kind]) for kind, x in predicted.items()}
    return chain[-1](tokens)


def agreement(prediction: Tokens, target: Tokens) -> dict[str, float]:
    """Mean cosine per token kind; patch grids are matched as in training (the smaller is upsampled)."""
    scores = {}
    for kind in target.keys() & prediction.keys():
        x, y = jnp.asarray(prediction[kind]), jnp.asarray(target[kind])
        x, y = match_grids(x, y) if x.ndim == 4 else (x, y)
        scores[kind] = float(jnp.mean(cosine(x, y)))
    return scores


def position_map(target: Tokens) -> dict[str, np.ndarray]:
    """The mean token at every position, whatever the image: the control that any honest patch score has to beat.

    The result keeps a batch axis of one. Class tokens have one position, so theirs is the plain mean.
    """
    mean = lambda x: np.mean(x, axis=0, keepdims=True, dtype=np.float64).astype(np.float32)  # noqa: E731
    return {kind: mean(x) for kind, x in target.items()}
