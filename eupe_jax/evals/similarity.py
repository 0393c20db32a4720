"""Agreement with the experts: cosine in each expert's normalised space, through the chain of adapters.

A proxy predicts its experts with its own adapters. A student predicts the proxy, is de-normalised with the proxy's
statistics, and goes on through the proxy's adapters to the experts: the chain that zero-shot evaluation uses too.

As an evaluation (`Settings`, `load`, `run`) it sweeps the encoder's resolution: an encoder that switches modes between
resolutions, as multi-teacher students do that saw one only, shows as a line that falls.
"""

import functools
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.core import freeze
from PIL import Image
from tqdm import tqdm

from eupe_jax.distill.adapters import AdapterBank
from eupe_jax.distill.losses import cosine, match_grids
from eupe_jax.distill.normalization import denormalize, normalize_tokens
from eupe_jax.distill.teacher_spec import fingerprint as with_tokens
from eupe_jax.distill.teachers import CLASS_TOKENS
from eupe_jax.evals.features import Squash, extract
from eupe_jax.evals.folders import Subset, read_folder
from eupe_jax.evals.interface import DataError, Encoder, Result
from eupe_jax.training import checkpoints, encoders
from eupe_jax.training.fingerprint import fingerprint

LOGGER = logging.getLogger(__name__)

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
        bank = AdapterBank(description["hidden_dim"], freeze(description["out_dims"]), description["eps"])
        fingerprints = {name: header["provenance"]["teacher"] for name, header in (headers or {}).items()}
        return cls(bank, jax.device_put(params), jax.device_put(statistics), fingerprints)

    @property
    def widths(self) -> dict[str, dict[str, int]]:
        """{teacher: {kind: width}} of its predictions."""
        return {teacher: dict(kinds) for teacher, kinds in self.bank.out_dims.items()}

    def only(self, *kinds: str) -> "Hop":
        """The same for some token kinds; teachers that have none of them are left out."""
        chosen = {t: {k: n for k, n in widths.items() if k in kinds} for t, widths in self.widths.items()}
        kept = freeze({t: widths for t, widths in chosen.items() if widths})
        return replace(self, bank=self.bank.clone(out_dims=kept))

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
    entry = manifest["students"][encoders.pick_student(manifest, student, path)]
    if not entry.get("adapters"):
        raise ValueError(f"{path} holds an encoder without adapters: only what was distilled has a way to its experts")
    statistics = checkpoints.restore_item(step, "statistics")
    params = encoders.load_adapters(path, student)
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
    tokens = {kind: x for kind, x in tokens.items() if kind in ("cls", "patches")}
    return _follow(tuple(hop.bank for hop in chain), [(hop.params, hop.statistics) for hop in chain], tokens)


@functools.partial(jax.jit, static_argnums=0)
def _follow(banks: tuple[AdapterBank, ...], arrays: Sequence[tuple[Mapping, Mapping]], tokens: Tokens) -> dict:
    chain = [Hop(bank, *found) for bank, found in zip(banks, arrays, strict=True)]
    for hop in chain[:-1]:
        ((teacher, predicted),) = hop(tokens).items()
        mean, std = hop.statistics[teacher]["mean"], hop.statistics[teacher]["std"]
        tokens = {kind: denormalize(x, mean[kind], std[kind]) for kind, x in predicted.items()}
    return chain[-1](tokens)


def agreement(prediction: Tokens, target: Tokens) -> dict[str, float]:
    """Mean cosine per token kind, [B, D] or [B, h, w, D]; grids are matched as in training (the smaller upsampled)."""
    scores = {}
    for kind in target.keys() & prediction.keys():
        x, y = jnp.asarray(prediction[kind]), jnp.asarray(target[kind])
        x, y = match_grids(x, y) if x.ndim == 4 else (x, y)
        scores[kind] = float(jnp.mean(cosine(x, y)))
    return scores


def position_map(target: Tokens) -> dict[str, np.ndarray]:
    """The mean token at every position, whatever the image: the control that any honest patch score has to beat.

    [B, h, w, D] -> [1, h, w, D]. Class tokens have one position, so theirs is the plain mean.
    """
    mean = lambda x: np.mean(x, axis=0, keepdims=True, dtype=np.float64).astype(np.float32)  # noqa: E731
    return {kind: mean(x) for kind, x in target.items()}


@dataclass(frozen=True)
class Settings:
    """What is compared.

    Attributes:
      resolutions: sides of the squashed pictures that the encoder sees, in pixels (EUPE's stage 3 has these three);
        each expert sees them at its own native resolution.
      images: how many pictures are scored, evenly spread over the folder.
      control_images: how many others make up the position map; a folder of fewer pictures is shared in that ratio.
      batch_size: images a forward pass.
    """

    resolutions: tuple[int, ...] = (256, 384, 512)
    images: int = 256
    control_images: int = 256
    batch_size: int = 8

    def __post_init__(self):
        if not self.resolutions or min(*self.resolutions, self.images, self.control_images, self.batch_size) < 1:
            raise ValueError(f"resolutions, images, control_images and batch_size must be positive, got {self}")


@dataclass(frozen=True)
class Data:
    """images: to score on. control: others, for the position map. teachers: {name in the chain: encoder}."""

    images: Subset
    control: Subset
    teachers: Mapping[str, Encoder] = field(default_factory=dict)


def load(folder: Path, settings: Settings) -> Data:
    """Pictures from anywhere below a folder; raises DataError where there are fewer than two."""
    source = read_folder(Path(folder))
    total = min(settings.images + settings.control_images, len(source))
    count = round(total * settings.images / (settings.images + settings.control_images))
    if not 0 < count < total:
        raise DataError(f"{folder} holds {len(source)} image(s): similarity needs some to score and some as a control")
    chosen = np.linspace(0, len(source) - 1, total).astype(int)
    scored = np.zeros(total, bool)
    scored[np.linspace(0, total - 1, count).astype(int)] = True
    return Data(Subset(source, chosen[scored]), Subset(source, chosen[~scored]))


def run(encoder: Encoder, data: Data, settings: Settings, *, workdir: Path | None = None) -> Result:
    """Mean cosine with every expert at every resolution, class and patch tokens apart, beside the position map.

    Metrics: "EXPERT_KIND_RESOLUTION" and "EXPERT_KIND_position_map". All features are kept in `workdir`, batch by
    batch: a megabyte or more an image and expert.

    Raises:
      ValueError: no checkpoint with adapters, no experts, or experts that the chain does not lead to.
    """
    if not getattr(encoder, "checkpoint", ""):
        raise ValueError(f"{encoder.name} comes from no training checkpoint, so it has no adapters to its experts")
    chain = load_chain(encoder.checkpoint, getattr(encoder, "student", "") or None)
    experts = _experts(encoder, chain, data.teachers)
    controls = {name: _Mean() for name in experts}
    with tqdm(total=len(data.control) + len(data.images), desc="similarity", unit="img", disable=None) as bar:
        for part in data.control.batches(settings.batch_size):
            for name, expert in experts.items():
                controls[name].add(expert(part, settings.batch_size, workdir))
            bar.update(len(part))
        sums: dict[tuple[str, str, str], float] = {}
        maps = {name: control.value() for name, control in controls.items()}
        for part in data.images.batches(settings.batch_size):
            targets = {name: expert(part, settings.batch_size, workdir) for name, expert in experts.items()}
            predicted = {"position_map": {n: _repeat(m, len(part)) for n, m in maps.items()}}
            for side in settings.resolutions:
                tokens = extract(encoder, part, settings.batch_size, prepare=Squash(side), workdir=workdir)
                predicted[str(side)] = predict_experts(tokens, chain)
            for row, found in predicted.items():
                for name, target in targets.items():
                    for kind, value in agreement(found[name], target).items():
                        sums[name, kind, row] = sums.get((name, kind, row), 0.0) + value * len(part)
            bar.update(len(part))
    scores = {key: value / len(data.images) for key, value in sums.items()}
    table = [
        {
            "expert": name,
            "tokens": kind,
            "resolution": side,
            "cosine": scores[name, kind, str(side)],
            "above_position_map": scores[name, kind, str(side)] - scores[name, kind, "position_map"],
        }
        for name, kind in sorted({key[:2] for key in scores})
        for side in settings.resolutions
    ]
    metrics = {f"{name}_{kind}_{row}": value for (name, kind, row), value in scores.items()}
    details = {
        "images": len(data.images),
        "control_images": len(data.control),
        "experts": {name: {"class_token": e.class_token, "recognised": e.recognised} for name, e in experts.items()},
    }
    return Result(metrics, {"agreement": table}, {"agreement": _plot(scores, settings.resolutions)}, details)


@dataclass(frozen=True)
class _Expert:
    """An expert as the distilled encoder met it: its choice of class token, and its statistics.

    recognised: its weights, token choice and pixel normalisation are those that the statistics were measured on.
    """

    encoder: Encoder
    class_token: str
    recognised: bool
    statistics: Mapping

    def __call__(self, images: Subset, batch_size: int, workdir: Path | None) -> dict[str, np.ndarray]:
        """Its tokens in its normalised space."""
        tokens = extract(self.encoder, images, batch_size, prepare=Squash(self.encoder.resolution), workdir=workdir)
        if self.class_token == "patch_mean":
            tokens["cls"] = tokens["patches"].mean(axis=(1, 2))
        kinds = self.statistics["mean"].keys() & tokens.keys()
        known = {what: {kind: self.statistics[what][kind] for kind in kinds} for what in ("mean", "std")}
        return {kind: np.asarray(x) for kind, x in normalize_tokens(tokens, known).items()}


def _experts(encoder: Encoder, chain: Sequence[Hop], teachers: Mapping[str, Encoder]) -> dict[str, _Expert]:
    last = chain[-1]
    if not teachers:
        raise ValueError(
            f"similarity compares {encoder.name} with its experts {sorted(last.widths)}: name some as teachers"
        )
    if strangers := teachers.keys() - last.widths.keys():
        raise ValueError(f"the chain of {encoder.name} leads to {sorted(last.widths)}, not to {sorted(strangers)}")
    experts = {}
    for name, teacher in teachers.items():
        known = last.fingerprints.get(name, "")
        matching = [token for token in CLASS_TOKENS if _as_teacher(teacher, token) == known]
        if not matching:
            LOGGER.warning("%s is not the very teacher %r that %s learned from", teacher.name, name, encoder.name)
        native = "native" if teacher.cls_dim is not None else "patch_mean"
        widths = last.widths[name]
        own = {"cls": teacher.cls_dim or teacher.patch_dim, "patches": teacher.patch_dim}
        if wrong := {kind: n for kind, n in widths.items() if own[kind] != n}:
            raise ValueError(f"teacher {name!r} ({teacher.name}) is {own} wide, but the chain predicts {wrong}")
        experts[name] = _Expert(teacher, (matching or [native])[0], bool(matching), last.statistics[name])
    return experts


def _as_teacher(teacher: Encoder, class_token: str) -> str:
    """The fingerprint that statistics record for this encoder with this choice of class token."""
    loaded = getattr(teacher, "loaded", None)
    if loaded is not None:
        return with_tokens(fingerprint(loaded.variables), {"class_token": class_token}, loaded.mean, loaded.std)
    return teacher.fingerprint if class_token == "native" else f"{teacher.fingerprint}+{class_token}"


class _Mean:
    """Running mean over images of every token kind, in float64."""

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}
        self._count = 0

    def add(self, tokens: Tokens) -> None:
        self._count += len(next(iter(tokens.values())))
        for kind, x in tokens.items():
            self._sums[kind] = self._sums.get(kind, 0.0) + np.sum(x, axis=0, dtype=np.float64)

    def value(self) -> dict[str, np.ndarray]:
        """{kind: [1, ...]}, float32, as `position_map` gives it."""
        return {kind: (x / self._count).astype(np.float32)[None] for kind, x in self._sums.items()}


def _repeat(tokens: Tokens, count: int) -> dict[str, np.ndarray]:
    return {kind: np.broadcast_to(x, (count, *x.shape[1:])) for kind, x in tokens.items()}


def _plot(scores: Mapping[tuple[str, str, str], float], resolutions: Sequence[int]) -> np.ndarray:
    """Cosine over resolution, a panel a token kind, a colour an expert; dotted: its position map. uint8 RGB."""
    from matplotlib.figure import Figure  # late: only pictures need it

    kinds = sorted({kind for _, kind, _ in scores})
    figure = Figure(figsize=(5.5 * len(kinds), 4), dpi=110, layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        names = sorted({name for name, k, _ in scores if k == kind})
        for colour, name in enumerate(names):
            values = [scores[name, kind, str(side)] for side in resolutions]
            axes.plot(resolutions, values, "o-", color=f"C{colour}", label=name)
            axes.axhline(scores[name, kind, "position_map"], color=f"C{colour}", linestyle=":")
        axes.set(title={"cls": "class token", "patches": "patch tokens"}[kind], xlabel="resolution (pixels)")
        axes.set(ylabel="cosine with the expert (dotted: position map)", xticks=resolutions)
        axes.grid(alpha=0.3)
        axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return np.asarray(Image.open(file).convert("RGB"))
