"""Semantic correspondence between two pictures, without training: PCK@0.1 on SPair-71k (EUPE App. C.5).

For each keypoint of the source image, the most similar pixel of the target image is found by comparing patch tokens,
upsampled to pixels. It is correct if it lies near enough to the true point.

The defaults are the protocol of the paper and of the code it descends from. `STANDARD` is the benchmark's own: all
pairs, a point on the threshold counts, averaged over images first. The two are not comparable.
"""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from eupe_jax.data.host import decode
from eupe_jax.data.sources import Record
from eupe_jax.evals.features import extract, load_arrays, save_arrays
from eupe_jax.evals.interface import Encoder, Result
from eupe_jax.evals.spair import ImageFiles, Pair, read_pairs
from eupe_jax.models.resize import resize_matrix
from eupe_jax.models.text_tower import unit

HIGHEST = jax.lax.Precision.HIGHEST
CHOICES = {
    "resize": ("pad", "squash"),
    "rounding": ("round", "floor", "floor_x"),
    "similarity": ("cosine", "dot"),
    "average": ("point", "image"),
}


@dataclass(frozen=True)
class Settings:
    """Every choice that the figure depends on.

    Attributes:
      split, layout: which pairs: PairAnnotation/SPLIT, cut down to Layout/LAYOUT/SPLIT.txt where that list exists.
      pairs_per_category: how many pairs are drawn from each category; None: all of them, once.
      replacement: whether a pair may be drawn twice (the ancestor's way); False needs enough pairs.
      seed: of NumPy's legacy generator (`RandomState.choice`), which drew the pairs of published figures.
      reseed: start the generator anew for each category; False: one stream through them, in alphabetical order.
      side: pixels of the square that the encoder sees; None: 448 for patches of 14 pixels, 512 for all others.
      resize: "pad": the longer side becomes `side` (LANCZOS), zeros on both sides of the shorter; "squash": both do.
      normalize: L2-normalise patch tokens before they are upsampled (bilinear).
      similarity: "cosine" of the upsampled tokens, as the paper has it; "dot": upsampled target tokens, which are
        shorter than 1 between unlike patches, are not brought back to unit length (what the ancestor computes; some
        points of PCK apart).
      rounding: which pixel a source keypoint is read at: "round" (halves to even), "floor", or "floor_x" (x down, y
        rounded; the ancestors differ). Pixels beyond the border are taken at the border.
      mask_padding: match only inside the target picture; False: its zero padding competes too.
      alpha: threshold, as a share of the longer side of the target's bounding box.
      strict: a distance equal to the threshold is wrong.
      average: "point": all keypoints of a category weigh the same; "image": all pairs of a category do. The mean over
        categories is unweighted in both.
      batch_size: images a forward pass.
      pictures: how many pairs are drawn, spread over the categories.
    """

    split: str = "test"
    layout: str = "large"
    pairs_per_category: int | None = 100
    replacement: bool = True
    seed: int = 0
    reseed: bool = False
    side: int | None = None
    resize: str = "pad"
    normalize: bool = True
    similarity: str = "cosine"
    rounding: str = "round"
    mask_padding: bool = False
    alpha: float = 0.1
    strict: bool = True
    average: str = "point"
    batch_size: int = 8
    pictures: int = 8

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name in ("alpha", "batch_size", "pairs_per_category", "side"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


STANDARD = Settings(pairs_per_category=None, strict=False, average="image")


@dataclass(frozen=True)
class Data:
    """pairs: those to match by category, in the order drawn (repeats included). digest: of annotations and images."""

    pairs: dict[str, list[Pair]]
    digest: str


def load(folder: Path, settings: Settings) -> Data:
    """Reads and draws the pairs; see `spair.read_pairs` for the layout and for what raises DataError."""
    pairs, digest = read_pairs(Path(folder), settings.split, settings.layout)
    by_category: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_category.setdefault(pair.category, []).append(pair)
    return Data(draw(by_category, settings), digest)


def draw(by_category: dict[str, list[Pair]], settings: Settings) -> dict[str, list[Pair]]:
    """The pairs of each category that the settings ask for, categories in alphabetical order.

    Raises:
      ValueError: more pairs wanted than there are, without replacement.
    """
    random = np.random.RandomState(settings.seed)
    drawn, wanted = {}, settings.pairs_per_category
    for category in sorted(by_category):
        pairs = by_category[category]
        if wanted is None:
            drawn[category] = pairs
            continue
        if not settings.replacement and wanted > len(pairs):
            raise ValueError(f"pairs_per_category={wanted}, but {category!r} has {len(pairs)}; allow replacement")
        if settings.reseed:
            random = np.random.RandomState(settings.seed)
        drawn[category] = [pairs[i] for i in random.choice(len(pairs), wanted, settings.replacement)]
    return drawn


@dataclass(frozen=True)
class Frame:
    """How a picture of `size` (width, height) lies in the square of `side` pixels that the encoder sees.

    scale: (x, y) factors; offset: (x, y) of its corner; inner: its (width, height) in the square.
    """

    size: tuple[int, int]
    side: int
    scale: tuple[float, float]
    offset: tuple[int, int]
    inner: tuple[int, int]

    @classmethod
    def of(cls, size: tuple[int, int], side: int, resize: str) -> "Frame":
        """Of a picture of this size: squashed, or else scaled by its longer side and put in the middle."""
        if resize == "squash":
            return cls(size, side, (side / size[0], side / size[1]), (0, 0), (side, side))
        scale = side / max(size)
        inner = tuple(max(1, int(np.around(side * n / max(size)))) for n in size)
        return cls(size, side, (scale, scale), ((side - inner[0]) // 2, (side - inner[1]) // 2), inner)

    def place(self, points_Kx2: np.ndarray) -> np.ndarray:
        """Points of the picture in the square."""
        return points_Kx2 * np.asarray(self.scale) + np.asarray(self.offset)


@dataclass(frozen=True)
class Place:
    """Record -> uint8 [side, side, 3], as `Frame` says; resampled with LANCZOS."""

    side: int
    resize: str

    def __call__(self, record: Record) -> np.ndarray:
        image = Image.fromarray(decode(record))
        frame = Frame.of(image.size, self.side, self.resize)
        canvas = np.zeros((self.side, self.side, 3), np.uint8)
        (x, y), (width, height) = frame.offset, frame.inner
        canvas[y : y + height, x : x + width] = image.resize(frame.inner, Image.Resampling.LANCZOS)
        return canvas


def pixels(points_Kx2: np.ndarray, side: int, rounding: str) -> np.ndarray:
    """The pixel of each point, int32 [K, 2], within the square."""
    x, y = points_Kx2[:, 0], points_Kx2[:, 1]
    x = np.around(x) if rounding == "round" else np.floor(x)
    y = np.floor(y) if rounding == "floor" else np.around(y)
    return np.clip(np.stack([x, y], axis=1), 0, side - 1).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("side", "normalize", "similarity"))
def prepare(patches_hxwxD: jax.Array, *, side: int, normalize: bool, similarity: str) -> tuple[jax.Array, jax.Array]:
    """Patch tokens as they are compared, and by what the similarity at each pixel is divided: [side, side].

    A pixel is a weighted sum of up to four tokens, so its squared length follows from their Gram matrix: upsampled
    tokens [side, side, D] never exist.
    """
    x = unit(patches_hxwxD) if normalize else patches_hxwxD
    if similarity == "dot":
        return x, jnp.ones((side, side))
    h, w = x.shape[:2]
    rows, columns = (resize_matrix(n, side, "bilinear") for n in (h, w))
    gram = jnp.einsum("ijd,kld->ikjl", x, x, precision=HIGHEST).reshape(h * h, w * w)
    rows = (rows[:, :, None] * rows[:, None, :]).reshape(side, h * h)
    columns = (columns[:, :, None] * columns[:, None, :]).reshape(side, w * w)
    squared = jnp.einsum("ph,hw,qw->pq", rows, gram, columns, precision=HIGHEST)
    return x, jnp.maximum(jnp.sqrt(jnp.maximum(squared, 0.0)), 1e-8)


@jax.jit
def match(
    source_hxwxD: jax.Array, target_hxwxD: jax.Array, lengths_SxS: jax.Array, points_Kx2: jax.Array, box: jax.Array
) -> jax.Array:
    """The pixel of the target most similar to each source pixel: int32 [K, 2], the first in rows from the top left.

    Upsampling is linear, so similarities are upsampled instead of tokens, one keypoint at a time.

    Args:
      source_hxwxD, target_hxwxD, lengths_SxS: from `prepare`.
      points_Kx2: int pixels of the source. box: int (x1, y1, x2, y2), where matches may lie.
    """
    side = lengths_SxS.shape[0]
    up = lambda n: resize_matrix(n, side, "bilinear")  # noqa: E731
    h, w = source_hxwxD.shape[:2]
    rows, columns = jnp.asarray(up(h))[points_Kx2[:, 1]], jnp.asarray(up(w))[points_Kx2[:, 0]]
    query = jnp.einsum("kh,hwd,kw->kd", rows, source_hxwxD, columns, precision=HIGHEST)
    coarse = jnp.einsum("kd,hwd->khw", query, target_hxwxD, precision=HIGHEST)
    across = jnp.arange(side)
    inside = (across >= box[1])[:, None] & (across < box[3])[:, None] & (across >= box[0]) & (across < box[2])

    def best(similarity_hxw: jax.Array) -> jax.Array:
        fine = jnp.einsum("ph,hw,qw->pq", up(target_hxwxD.shape[0]), similarity_hxw, up(target_hxwxD.shape[1]),
                          precision=HIGHEST)  # fmt: skip
        return jnp.argmax(jnp.where(inside, fine / lengths_SxS, -jnp.inf))

    flat = jax.lax.map(best, coarse)
    return jnp.stack([flat % side, flat // side], axis=1).astype(jnp.int32)


def run(encoder: Encoder, data: Data, settings: Settings, *, workdir: Path | None = None) -> Result:
    """Matches every pair; with `workdir`, finished categories are kept and not computed again.

    Metrics: "pck" as `settings.average` says and "pck_per_image" or "pck_per_point", the other one; beside them, by the
    same rule, "floor_same_pixel" (the target's pixel at the source's place) and "floor_mean_point" (the mean of the
    target points): what needs no features at all.

    Raises:
      ValueError: the encoder does not take `side`. DataError: an image cannot be decoded.
    """
    side = settings.side or (448 if encoder.patch_size == 14 else 512)
    if side % encoder.patch_size:
        raise ValueError(f"side={side} is no multiple of the {encoder.patch_size}-pixel patches of {encoder.name}")
    predicted: dict[str, dict[str, np.ndarray]] = {}
    with tqdm(total=sum(map(len, data.pairs.values())), desc="correspondence", unit="pair", disable=None) as bar:
        for category, pairs in data.pairs.items():
            predicted[category] = _category(encoder, data, category, settings, side, workdir)
            bar.update(len(pairs))
    rows = [_score(category, pairs, predicted[category], side, settings) for category, pairs in data.pairs.items()]
    mean = {
        key: float(np.mean([row[key] for row in rows])) for key in rows[0] if key not in ("category", "pairs", "points")
    }
    other = {"point": "image", "image": "point"}[settings.average]
    metrics = {
        "pck": mean[f"pck_per_{settings.average}"],
        f"pck_per_{other}": mean[f"pck_per_{other}"],
        "floor_same_pixel": mean["same_pixel"],
        "floor_mean_point": mean["mean_point"],
    }
    images = {
        f"{number:02d}_{pair.category}": picture(pair, predicted[pair.category][pair.name], side, settings)
        for number, pair in enumerate(_chosen(data.pairs, settings.pictures))
    }
    total = {"pairs": sum(row["pairs"] for row in rows), "points": sum(row["points"] for row in rows)}
    return Result(metrics, {"categories": rows}, images, {"side": side, "data": data.digest, **total})


def _category(
    encoder: Encoder, data: Data, category: str, settings: Settings, side: int, workdir: Path | None
) -> dict[str, np.ndarray]:
    """Predicted target pixels [K, 2] of every pair of a category, by name of the pair."""
    pairs = {pair.name: pair for pair in data.pairs[category]}
    if workdir is not None:
        how = [getattr(settings, n) for n in ("resize", "normalize", "similarity", "rounding", "mask_padding")]
        facts = (encoder.fingerprint, data.digest, sorted(pairs), side, how)
        digest = hashlib.sha256(repr(facts).encode()).hexdigest()
        kept = Path(workdir) / "correspondence" / f"{category}-{digest[:16]}.safetensors"
        if (found := load_arrays(kept, digest)) is not None:
            return found
    paths = sorted({path for pair in pairs.values() for path in (pair.source, pair.target)})
    place = Place(side, settings.resize)
    patches = extract(encoder, ImageFiles(paths), settings.batch_size, kinds=("patches",), prepare=place)["patches"]
    index = {path: i for i, path in enumerate(paths)}
    # One number of points for all pairs, so that one compiled program serves them.
    most = max(len(pair.source_points) for pair in pairs.values())
    how = {"side": side, "normalize": settings.normalize, "similarity": settings.similarity}
    ready: dict[Path, tuple[jax.Array, jax.Array]] = {}
    predicted = {}
    for name, pair in sorted(pairs.items(), key=lambda item: item[1].target):
        for path in (pair.source, pair.target):
            if path not in ready:
                ready[path] = prepare(patches[index[path]], **how)
        frame = Frame.of(pair.source_size, side, settings.resize)
        points = pixels(frame.place(pair.source_points), side, settings.rounding)
        padded = np.concatenate([points, np.zeros((most - len(points), 2), np.int32)])
        box = _box(pair, side, settings)
        predicted[name] = np.asarray(match(ready[pair.source][0], *ready[pair.target], padded, box))[: len(points)]
    if workdir is not None:
        save_arrays(kept, predicted, digest)
    return predicted


def _box(pair: Pair, side: int, settings: Settings) -> np.ndarray:
    """Where matches may lie in the target's square."""
    if not settings.mask_padding:
        return np.asarray((0, 0, side, side), np.int32)
    frame = Frame.of(pair.target_size, side, settings.resize)
    return np.asarray((*frame.offset, *np.add(frame.offset, frame.inner)), np.int32)


def correct(pair: Pair, predicted_Kx2: np.ndarray, side: int, settings: Settings) -> np.ndarray:
    """Which predicted pixels of the target's square are near enough: bool [K]."""
    frame = Frame.of(pair.target_size, side, settings.resize)
    # Distances as if both axes had the larger factor; they have the same one unless the picture is squashed.
    scale = max(frame.scale)
    delta = (predicted_Kx2 - frame.place(pair.target_points)) * (scale / np.asarray(frame.scale))
    distance, threshold = np.hypot(delta[:, 0], delta[:, 1]), settings.alpha * pair.target_box * scale
    return distance < threshold if settings.strict else distance <= threshold


def _score(category: str, pairs: Sequence[Pair], predicted: dict, side: int, settings: Settings) -> dict:
    """One row of the table."""

    def shares(predict) -> dict[str, float]:
        right = [correct(pair, predict(pair), side, settings) for pair in pairs]
        per_image = float(np.mean([r.mean() for r in right]))
        return {"point": float(np.concatenate(right).mean()), "image": per_image}

    def same_pixel(pair: Pair) -> np.ndarray:
        return Frame.of(pair.source_size, side, settings.resize).place(pair.source_points)

    def mean_point(pair: Pair) -> np.ndarray:
        points = Frame.of(pair.target_size, side, settings.resize).place(pair.target_points)
        return np.broadcast_to(points.mean(axis=0), points.shape)

    found = shares(lambda pair: predicted[pair.name])
    return {
        "category": category,
        "pairs": len(pairs),
        "points": sum(len(pair.source_points) for pair in pairs),
        "pck_per_point": found["point"],
        "pck_per_image": found["image"],
        "same_pixel": shares(same_pixel)[settings.average],
        "mean_point": shares(mean_point)[settings.average],
    }


def _chosen(pairs: dict[str, list[Pair]], count: int) -> Iterator[Pair]:
    """Pairs to draw: the first of each category, then the second, ...; each once."""
    columns = [list({pair.name: pair for pair in drawn}.values()) for drawn in pairs.values()]
    ordered = [column[i] for i in range(max(map(len, columns))) for column in columns if i < len(column)]
    yield from ordered[:count]


def picture(pair: Pair, predicted_Kx2: np.ndarray, side: int, settings: Settings) -> np.ndarray:
    """Source and target side by side, uint8 [side, 2 * side + 8, 3]: green lines to right matches, red ones to wrong
    matches, and a white ring at the true point of every wrong match."""
    place, gap = Place(side, settings.resize), 8
    left, right = (place(Record(path.read_bytes(), str(path))) for path in (pair.source, pair.target))
    canvas = Image.fromarray(np.concatenate([left, np.full((side, gap, 3), 255, np.uint8), right], axis=1))
    pen, shift = ImageDraw.Draw(canvas), np.asarray([side + gap, 0])
    source = Frame.of(pair.source_size, side, settings.resize).place(pair.source_points)
    target = Frame.of(pair.target_size, side, settings.resize).place(pair.target_points) + shift
    right_ones = correct(pair, predicted_Kx2, side, settings)
    for start, end, truth, is_right in zip(source, predicted_Kx2 + shift, target, right_ones, strict=True):
        colour = (40, 220, 60) if is_right else (255, 50, 40)
        pen.line([*start, *end], fill=colour, width=1)
        for x, y in (start, end):
            pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
        if not is_right:
            pen.ellipse([*(truth - 4), *(truth + 4)], outline=(255, 255, 255), width=2)
    return np.asarray(canvas)
