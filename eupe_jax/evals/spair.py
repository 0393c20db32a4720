"""Keypoint pairs in the layout of SPair-71k.

ROOT/PairAnnotation/SPLIT/NAME:CATEGORY.json (or NAME_CATEGORY.json, as re-packings have it), one pair a file;
ROOT/JPEGImages/CATEGORY/IMAGE; ROOT/Layout/LAYOUT/SPLIT.txt lists the names of a split, without .json (optional).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eupe_jax.data.decode import FORMATS
from eupe_jax.data.sources import Record
from eupe_jax.evals.interface import DataError

_ORIENTATION = 0x0112  # EXIF tag


@dataclass(frozen=True)
class Pair:
    """Two pictures and points seen in both. Pixels, x before y.

    Attributes:
      name: the annotation's file name without suffix.
      source, target: paths of the images. source_size, target_size: (width, height).
      source_points, target_points: float64 [K, 2], K at least 1.
      target_box: longer side of the object's bounding box in the target.
    """

    name: str
    category: str
    source: Path
    target: Path
    source_size: tuple[int, int]
    target_size: tuple[int, int]
    source_points: np.ndarray
    target_points: np.ndarray
    target_box: float


class ImageFiles:
    """Images by path, as a source of records (`eupe_jax.data.sources`)."""

    def __init__(self, paths: Sequence[Path]):
        self._paths = list(paths)
        facts = [(p.name, p.stat().st_size) for p in self._paths]
        self.digest = hashlib.sha256(repr(facts).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Record:
        return Record(self._paths[index].read_bytes(), str(self._paths[index]))


def read_pairs(root: Path, split: str = "test", layout: str = "large") -> tuple[list[Pair], str]:
    """All pairs of a split, sorted by name, and a digest of annotations and image sizes.

    The pairs are those of the layout's list, or every annotation of the split where there is no such list.

    Raises:
      DataError: a missing list entry, annotation or image, fields that are missing or contradict each other or the
        image, points outside the image, an empty split; the message names the file (and line).
    """
    folder = root / "PairAnnotation" / split
    if not folder.is_dir():
        raise DataError(f"no folder {folder}: expected PairAnnotation/{split}/*.json as in SPair-71k")
    listed = root / "Layout" / layout / f"{split}.txt"
    files = _listed(folder, listed) if listed.is_file() else list(folder.glob("*.json"))
    if not files:
        raise DataError(f"{listed if listed.is_file() else folder} names no pairs")
    digest, sizes, pairs = hashlib.sha256(), {}, []
    for file in sorted(files, key=lambda p: p.name.replace(":", "_")):
        content = file.read_bytes()
        digest.update(content)
        pairs.append(_parse(root, file, content, sizes))
    digest.update(repr(sorted((p.name, p.stat().st_size) for p in sizes)).encode())
    return pairs, digest.hexdigest()


def _listed(folder: Path, listed: Path) -> list[Path]:
    """The annotation of every line; the colon before the category may have become an underscore in either place."""
    present = {p.name.replace(":", "_"): p for p in folder.glob("*.json")}
    try:
        lines = listed.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{listed} cannot be read as a list: {error}") from None
    files = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name = f"{line.strip()}.json".replace(":", "_")
        if name not in present:
            raise DataError(f"{listed}, line {number}: {line.strip()!r} has no annotation in {folder}")
        files.append(present[name])
    return files


def _parse(root: Path, file: Path, content: bytes, sizes: dict[Path, tuple[int, int]]) -> Pair:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise DataError(f"{file}: expected one JSON object, the fields of a pair")
    category = _plain_name(file, fields, "category")
    if not file.stem.replace(":", "_").endswith(f"_{category}"):
        raise DataError(f"{file}: its category is {category!r}, which is not how its name ends")
    points, images, boxes = [], [], []
    for side in ("src", "trg"):
        path = root / "JPEGImages" / category / _plain_name(file, fields, f"{side}_imname")
        size = _image_size(file, path, sizes)
        stated = _numbers(file, fields, f"{side}_imsize", (3,))[:2]
        if tuple(stated) != size:
            raise DataError(f"{file}: {side}_imsize says {stated.astype(int).tolist()}, {path} has {list(size)}")
        found = _numbers(file, fields, f"{side}_kps", (-1, 2))
        if outside := [p for p in found.tolist() if not (0 <= p[0] <= size[0] and 0 <= p[1] <= size[1])]:
            raise DataError(f"{file}: the point {outside[0]} of {side}_kps lies outside the {size[0]}x{size[1]} image")
        box = _numbers(file, fields, f"{side}_bndbox", (4,))
        if box[2] <= box[0] or box[3] <= box[1]:
            raise DataError(f"{file}: {side}_bndbox {box.tolist()} is not x1, y1, x2, y2 of a box")
        points.append(found)
        images.append(path)
        boxes.append(float(max(box[2] - box[0], box[3] - box[1])))
    if len(points[0]) != len(points[1]):
        raise DataError(f"{file}: {len(points[0])} points in src_kps, {len(points[1])} in trg_kps")
    return Pair(
        file.stem, category, *images, *(sizes[p] for p in images), points[0], points[1], target_box=boxes[1]
    )  # fmt: skip


def _image_size(file: Path, path: Path, sizes: dict[Path, tuple[int, int]]) -> tuple[int, int]:
    if path not in sizes:
        try:
            with Image.open(path, formats=FORMATS) as image:
                sizes[path], turned = image.size, image.getexif().get(_ORIENTATION, 1) != 1
        except OSError as error:
            raise DataError(f"{file} names the image {path}, which cannot be read: {error}") from None
        if turned:
            raise DataError(
                f"{path} is to be turned on display (EXIF), and points count stored pixels: store it upright"
            )
    return sizes[path]


def _plain_name(file: Path, fields: dict[str, Any], field: str) -> str:
    """A name that stays in its folder."""
    name = fields.get(field)
    if not isinstance(name, str) or not name or Path(name).name != name or name.startswith("."):
        raise DataError(f"{file}: {field} must be a plain name, got {name!r}")
    return name


def _numbers(file: Path, fields: dict[str, Any], field: str, shape: tuple[int, ...]) -> np.ndarray:
    """A field as finite float64 of that shape; -1 stands for any length but 0."""
    try:
        array = np.asarray(fields[field], np.float64)
    except KeyError:
        raise DataError(f"{file} has no field {field!r}") from None
    except (TypeError, ValueError):
        raise DataError(f"{file}: {field} must be numbers, got {fields[field]!r}") from None
    fits = array.ndim == len(shape) and all(n == m or (n == -1 and m) for n, m in zip(shape, array.shape, strict=True))
    if not fits or not np.isfinite(array).all():
        raise DataError(f"{file}: {field} must be finite numbers of shape {list(shape)}, got {fields[field]!r}")
    return array
