"""Frozen per-coordinate statistics of a teacher's outputs (EUPE §3.3, §4.1).

Measured once over 500 iterations before training, class and patch tokens apart, patches pooled over batch and
positions; then fixed. They are an artefact of their own: a safetensors file a teacher whose header says exactly
what was measured, so that training can refuse numbers that belong to something else.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath
from jax.experimental.multihost_utils import process_allgather

from eupe_jax.distill.teacher_spec import TeacherSpec
from eupe_jax.files import write_whole

STD_FLOOR = 1e-3  # a coordinate that hardly moves must not blow up (DUNE clamps here; the paper is silent)
KINDS = ("cls", "patches")


class StatisticsMismatch(ValueError):
    """Statistics were measured on something other than what they are about to normalise."""


@dataclass(frozen=True)
class Provenance:
    """What the statistics describe. `teacher` (weights, token choice, pixel statistics) must match to be used;
    resolution and data recipe are recorded, and a difference there must be declared."""

    name: str
    teacher: str  # TeacherSpec.fingerprint
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resolution: tuple[int, ...]
    data: str

    @classmethod
    def of(cls, spec: TeacherSpec, resolution: tuple[int, ...], data: str) -> "Provenance":
        """Of a teacher at these sides in pixels, on data described in words."""
        return cls(spec.name, spec.fingerprint, tuple(spec.mean), tuple(spec.std), tuple(resolution), data)


@dataclass
class Statistics:
    """Mean and standard deviation per coordinate: `mean["cls"]` [Dc], `mean["patches"]` [Dp], float32; sample counts
    in tokens; and where they come from."""

    mean: dict[str, np.ndarray]
    std: dict[str, np.ndarray]
    count: dict[str, int]
    provenance: Provenance

    def arrays(self) -> dict[str, dict[str, np.ndarray]]:
        """{"mean": {kind: [D]}, "std": {kind: [D]}}: what the jitted step takes."""
        return {"mean": dict(self.mean), "std": dict(self.std)}

    def header(self) -> dict:
        """Everything but the arrays, as plain JSON types."""
        return {"count": dict(self.count), "provenance": dataclasses.asdict(self.provenance)}

    @classmethod
    def from_parts(cls, arrays: Mapping, header: Mapping) -> "Statistics":
        """From what `arrays` and `header` gave. Raises KeyError or TypeError where a part is missing."""
        p = header["provenance"]
        provenance = Provenance(**{k: tuple(v) if isinstance(v, list | tuple) else v for k, v in p.items()})
        as_numpy = lambda tree: {k: np.asarray(v, np.float32) for k, v in tree.items()}  # noqa: E731
        return cls(as_numpy(arrays["mean"]), as_numpy(arrays["std"]), dict(header["count"]), provenance)

    def save(self, path: epath.PathLike) -> None:
        """Writes one safetensors file, whole."""
        path = epath.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"{what}/{kind}": v for what, tree in self.arrays().items() for kind, v in tree.items()}
        write_whole(path, safetensors.numpy.save(tensors, metadata={"statistics": json.dumps(self.header())}))

    @classmethod
    def load(cls, path: epath.PathLike) -> "Statistics":
        """Reads what `save` wrote.

        Raises:
          FileNotFoundError: no such file, with the command that makes one.
          ValueError: the file is not a statistics file.
        """
        path = epath.Path(path)
        if not path.exists():
            raise FileNotFoundError(
                f"no statistics at {path}: measure them with launch/measure_statistics.py and the same --config"
            )
        data = path.read_bytes()
        try:
            size = int.from_bytes(data[:8], "little")
            header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["statistics"])
            arrays: dict = {"mean": {}, "std": {}}
            for key, value in safetensors.numpy.load(data).items():
                what, kind = key.split("/")
                arrays[what][kind] = value
            return cls.from_parts(arrays, header)
        except (KeyError, ValueError, TypeError, RecursionError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path} is not a statistics file of eupe_jax ({error})") from error

    def require(self, expected: Provenance, *, declared: bool, source: str = "") -> None:
        """Refuses statistics of another teacher; other resolutions or data need `declared=True`.

        Raises:
          StatisticsMismatch: names the statistics, the field and both values.
        """
        where = f"statistics of {expected.name!r}" + (f" in {source}" if source else "")
        for name in ("teacher", "mean", "std"):
            mine, wanted = getattr(self.provenance, name), getattr(expected, name)
            if mine != wanted:
                what = {"teacher": "another teacher (weights or token choice)"}.get(name, f"another pixel {name}")
                raise StatisticsMismatch(f"{where} belong to {what}: measured on {mine}, this run has {wanted}")
        for name in ("resolution", "data"):
            mine, wanted = getattr(self.provenance, name), getattr(expected, name)
            if mine != wanted and not declared:
                raise StatisticsMismatch(
                    f"{where} were measured at another {name} ({mine}, this run has {wanted}): measure them again, or "
                    "declare the difference by naming their folder in `statistics_from` instead of `statistics`"
                )


def normalize(x: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """(x - mean) / max(std, floor) per coordinate, float32: [..., D] -> [..., D]."""
    return (x.astype(jnp.float32) - mean) / jnp.maximum(std, STD_FLOOR)


def denormalize(x: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """The inverse of `normalize`: [..., D] -> [..., D]."""
    return x.astype(jnp.float32) * jnp.maximum(std, STD_FLOOR) + mean


def normalize_tokens(tokens: Mapping[str, jax.Array], statistics: Mapping) -> dict[str, jax.Array]:
    """Normalises every token kind that the statistics hold; others are left out: {kind: [B, ..., D]}."""
    return {k: normalize(tokens[k], m, statistics["std"][k]) for k, m in statistics["mean"].items()}


@jax.jit
def batch_moments(tokens: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """{kind: ([D] mean, [D] mean squared deviation)} of one batch, in two passes so that large offsets do no harm."""

    def moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = x.astype(jnp.float32).reshape(-1, x.shape[-1])
        mean = jnp.mean(x, axis=0)
        return mean, jnp.mean((x - mean) ** 2, axis=0)

    return {kind: moments(tokens[kind]) for kind in KINDS if kind in tokens}


@dataclass
class Accumulator:
    """Merges batch moments into pooled ones in float64 (Chan et al. 1979); a few kilobytes whatever the count."""

    count: dict[str, int] = field(default_factory=dict)
    mean: dict[str, np.ndarray] = field(default_factory=dict)
    squares: dict[str, np.ndarray] = field(default_factory=dict)  # summed squared deviations

    def add(self, tokens: Mapping[str, jax.Array]) -> None:
        """Adds one batch: {"cls": [B, Dc], "patches": [B, ..., Dp]}; kinds that are absent are skipped."""
        tokens = {k: v for k, v in tokens.items() if k in KINDS}
        moments = process_allgather(batch_moments(tokens), tiled=True)  # whole, where each host holds a part
        for kind, (mean, variance) in moments.items():
            new = int(np.prod(tokens[kind].shape[:-1]))
            mean, variance = np.asarray(mean, np.float64), np.asarray(variance, np.float64)
            old = self.count.get(kind, 0)
            total = old + new
            before = self.mean.get(kind, np.zeros_like(mean))
            delta = mean - before
            self.mean[kind] = before + delta * new / total
            self.squares[kind] = self.squares.get(kind, 0.0) + variance * new + delta**2 * (old * new / total)
            self.count[kind] = total

    def finish(self, provenance: Provenance) -> Statistics:
        """Population statistics of everything added.

        Raises:
          ValueError: nothing was added, or a coordinate is not finite (the teacher is broken: say so now).
        """
        if not self.count:
            raise ValueError(f"no batch was measured for {provenance.name!r}")
        variance = {k: v / self.count[k] for k, v in self.squares.items()}
        for kind in self.count:
            bad = np.flatnonzero(~np.isfinite(self.mean[kind]) | ~np.isfinite(variance[kind]))
            if bad.size:
                raise ValueError(f"{provenance.name!r} gives non-finite values in {kind} coordinates {bad[:8]}")
        mean = {k: v.astype(np.float32) for k, v in self.mean.items()}
        std = {k: np.sqrt(v).astype(np.float32) for k, v in variance.items()}
        return Statistics(mean, std, dict(self.count), provenance)
