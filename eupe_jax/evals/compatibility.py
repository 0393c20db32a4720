"""How well teachers go together, before any training: what their tokens have in common on a few thousand images.

`run` takes named teachers instead of one encoder; otherwise it is an evaluation as interface.py has it. Every teacher
sees the whole picture, squashed to its own resolution. Patch grids are resized to the largest of them, bicubically, as
training does. The measures are those of compatibility_measures.py; compatibility_report.py puts them into words and
pictures.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from eupe_jax.data.sources import Record
from eupe_jax.evals import compatibility_report
from eupe_jax.evals.compatibility_measures import Estimate, Moments, alignment, predictability, spread
from eupe_jax.evals.features import Squash, default_batch_size, extract, load_arrays, save_arrays
from eupe_jax.evals.folders import Subset, read_folder
from eupe_jax.evals.interface import DataError, Encoder, Result
from eupe_jax.models.resize import resize

FEWEST_IMAGES = 64  # below, a fold may be all but empty, and no figure means anything

R2 = Mapping[tuple[tuple[str, ...], str], Estimate]  # (predicted from, teacher) -> R2


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      images: how many pictures, evenly spread over the folder; all of a smaller one.
      resolution: side in pixels that every teacher gets; 0: each its own.
      patch_mean: teachers without a class token get the mean of their patch tokens for one, as class_token=patch_mean
        does in a config; otherwise their class tokens are left out.
      folds: parts of the images; every part is held out once. At least 3: to fit, to choose the penalty, to score.
      penalties: of the ridge regressions, to choose from; the mean square of a normalised coordinate is about 1.
      batch_size: images a forward pass; 0: as many as suits the device.
      save_every: images after which the moments are kept, for a stopped run to go on from.
    """

    images: int = 2000
    resolution: int = 0
    patch_mean: bool = False
    folds: int = 4
    penalties: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
    batch_size: int = 0
    save_every: int = 512

    def __post_init__(self):
        if self.images < FEWEST_IMAGES or self.folds < 3 or self.save_every < 1:
            raise ValueError(
                f"images must be at least {FEWEST_IMAGES}, folds at least 3 and save_every positive, got {self}"
            )
        if self.resolution < 0 or self.batch_size < 0 or not self.penalties or min(self.penalties) <= 0:
            raise ValueError(f"resolution and batch_size must not be negative, penalties positive, got {self}")


def load(folder: Path, settings: Settings) -> Subset:
    """Pictures from anywhere below a folder.

    Raises:
      DataError: there are too few.
    """
    source = read_folder(Path(folder))
    if len(source) < FEWEST_IMAGES:
        raise DataError(f"{folder} holds {len(source)} image(s): at least {FEWEST_IMAGES} are needed, better thousands")
    return Subset(source, np.linspace(0, len(source) - 1, min(settings.images, len(source))).astype(int))


def run(teachers: Mapping[str, Encoder], images: Subset, settings: Settings, *, workdir: Path | None = None) -> Result:
    """Measures every pair of teachers and every teacher beside all others.

    Tables: "pairs" (a row a token kind and pair), "teachers" (a row a token kind and teacher). Images: "compatibility".
    Details: "summary", lines of plain words. Memory: 8 bytes x folds x (sum of widths)^2 a token kind, and one batch.

    Args:
      workdir: where moments are kept; the same call goes on from them. None: nowhere.

    Raises:
      ValueError: fewer than two teachers, sizes they do not take, tokens that are not finite or all alike.
      DataError: a broken image, by name, or too many copies of the same ones.
    """
    if len(teachers) < 2:
        raise ValueError(f"compatibility is of two teachers or more, got {sorted(teachers)}")
    moments = _accumulate(teachers, images, settings, workdir)
    pairs, rows = [], []
    for kind, found in moments.items():
        found.require_variation(compatibility_report.WORDS[kind])
        r2 = _r2(found, settings)
        pairs += _pairs(kind, found, r2)
        rows += _teachers(kind, found, r2)
    metrics = _metrics(pairs, rows)
    summary = compatibility_report.summary(pairs, rows, len(images), settings.folds)
    picture = compatibility_report.figure(pairs, rows)
    details = {"images": len(images), "summary": summary, "grid": list(_grid(teachers, settings))}
    details["teachers"] = {n: {"encoder": t.name, "resolution": _side(t, settings)} for n, t in teachers.items()}
    return Result(metrics, {"pairs": pairs, "teachers": rows}, {"compatibility": picture}, details)


def fold_of(record: Record, folds: int) -> int:
    """The fold of an image, from its content: the same whatever its place, and the same for exact copies of it."""
    data = record.data if isinstance(record.data, bytes) else np.ascontiguousarray(record.data).tobytes()
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") % folds


def _side(teacher: Encoder, settings: Settings) -> int:
    return settings.resolution or teacher.resolution


def _grid(teachers: Mapping[str, Encoder], settings: Settings) -> tuple[int, int]:
    """The largest patch grid: the one that all are brought to."""
    side = max(_side(teacher, settings) // teacher.patch_size for teacher in teachers.values())
    return side, side


def _accumulate(
    teachers: Mapping[str, Encoder], images: Subset, settings: Settings, workdir: Path | None
) -> dict[str, Moments]:
    """{kind: moments} of all images; class tokens of those teachers that have one."""
    grid = _grid(teachers, settings)
    patches = {name: teacher.patch_dim for name, teacher in teachers.items()}
    cls = {name: teacher.cls_dim for name, teacher in teachers.items() if teacher.cls_dim is not None}
    if settings.patch_mean:
        cls = {name: cls.get(name, width) for name, width in patches.items()}
    moments = {"cls": Moments(cls, 1, settings.folds)} if cls else {}
    moments["patches"] = Moments(patches, math.prod(grid), settings.folds)
    batch_size = settings.batch_size or default_batch_size()
    kept = _Kept(workdir, teachers, images, settings, batch_size)
    done = saved = kept.restore(moments)
    with tqdm(total=len(images), initial=done, desc="compatibility", unit="img", disable=None) as bar:
        for part in images.batches(batch_size)[-(-done // batch_size) :]:
            tokens = {name: _tokens(t, part, settings, batch_size, grid) for name, t in teachers.items()}
            folds = np.array([fold_of(part[i], settings.folds) for i in range(len(part))])
            for kind, found in moments.items():
                found.add({name: tokens[name][kind] for name in found.widths}, folds)
            done += len(part)
            if done - saved >= settings.save_every or done == len(images):
                kept.save(moments, done)
                saved = done
            bar.update(len(part))
    if moments["patches"].images.min() < 2:
        raise DataError(f"the {len(images)} images are too few different ones: most are copies of each other")
    return moments


def _tokens(
    teacher: Encoder, part: Subset, settings: Settings, batch_size: int, grid: tuple[int, int]
) -> dict[str, np.ndarray]:
    """{"cls": [B, 1, Dc], "patches": [B, places of the common grid, Dp]}."""
    tokens = extract(teacher, part, batch_size, prepare=Squash(_side(teacher, settings)))
    if settings.patch_mean and teacher.cls_dim is None:
        tokens["cls"] = tokens["patches"].mean(axis=(1, 2))
    common = np.asarray(resize(tokens["patches"], grid))
    tokens["patches"] = common.reshape(len(common), -1, common.shape[-1])
    return {kind: x[:, None] if kind == "cls" else x for kind, x in tokens.items()}


class _Kept:
    """Moments on disk, of these very teachers, images and settings; without a workdir it holds nothing."""

    def __init__(self, workdir, teachers, images: Subset, settings: Settings, batch_size: int) -> None:
        measured = {k: v for k, v in asdict(settings).items() if k not in ("penalties", "batch_size", "save_every")}
        facts = {
            "teachers": {name: [t.fingerprint, _side(t, settings)] for name, t in teachers.items()},
            "images": images.digest,
            "settings": measured,
            "batch_size": batch_size,
        }
        self._fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        self._path = None if workdir is None else Path(workdir) / f"moments_{self._fingerprint[:16]}.safetensors"

    def restore(self, moments: Mapping[str, Moments]) -> int:
        """Fills `moments` with what is kept; how many images that is."""
        arrays = None if self._path is None else load_arrays(self._path, self._fingerprint)
        if arrays is None:
            return 0
        for kind, own in moments.items():
            own.restore({name: arrays[f"{kind}/{name}"] for name in own.arrays()})
        return int(arrays["done"])

    def save(self, moments: Mapping[str, Moments], done: int) -> None:
        if self._path is not None:
            arrays = {f"{kind}/{name}": x for kind, own in moments.items() for name, x in own.arrays().items()}
            save_arrays(self._path, {**arrays, "done": np.int64(done)}, self._fingerprint)


def _others(moments: Moments, name: str) -> tuple[str, ...]:
    return tuple(n for n in moments.widths if n != name)


def _r2(moments: Moments, settings: Settings) -> R2:
    """Of every teacher, predicted from each other one and from all others."""
    names = list(moments.widths)
    questions = [((a,), b) for a in names for b in names if a != b]
    questions += [(_others(moments, name), name) for name in names if len(names) > 1]
    return predictability(moments, list(dict.fromkeys(questions)), settings.penalties)


def _pairs(kind: str, moments: Moments, r2: R2) -> list[dict]:
    cka, raw = alignment(moments), alignment(moments, normalized=False)
    return [
        {
            "tokens": kind,
            "one": a,
            "other": b,
            "cka": estimate.value,
            "cka_spread": estimate.spread,
            "cka_raw": raw[a, b].value,
            "r2_one_to_other": r2[(a,), b].value,
            "r2_one_to_other_spread": r2[(a,), b].spread,
            "r2_other_to_one": r2[(b,), a].value,
            "r2_other_to_one_spread": r2[(b,), a].spread,
        }
        for (a, b), estimate in cka.items()
    ]


def _teachers(kind: str, moments: Moments, r2: R2) -> list[dict]:
    rows = []
    for name in moments.widths:
        found = r2.get((_others(moments, name), name))
        together = {"r2_from_all_others": found.value if found else None}
        together["r2_from_all_others_spread"] = found.spread if found else None
        rows.append({"tokens": kind, "teacher": name, **spread(moments, name), **together})
    return rows


def _metrics(pairs: Sequence[Mapping], rows: Sequence[Mapping]) -> dict[str, float]:
    found = {}
    for row in pairs:
        kind, a, b = row["tokens"], row["one"], row["other"]
        found[f"{kind}_cka_{a}_{b}"] = row["cka"]
        found[f"{kind}_r2_{a}_to_{b}"] = row["r2_one_to_other"]
        found[f"{kind}_r2_{b}_to_{a}"] = row["r2_other_to_one"]
    for row in rows:
        kind, name = row["tokens"], row["teacher"]
        found |= {f"{kind}_{figure}_{name}": float(row[figure]) for figure in ("std_ratio", "dead", "participation")}
        if row["r2_from_all_others"] is not None:
            found[f"{kind}_r2_others_to_{name}"] = row["r2_from_all_others"]
    return found
