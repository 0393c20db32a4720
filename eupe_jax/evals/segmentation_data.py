"""ADE20k's layout, and others laid out like it.

ROOT/images/{training,validation}/NAME.jpg, ROOT/annotations/{training,validation}/NAME.png (one uint8 class a pixel),
lists of images relative to ROOT/images (`training/NAME.jpg`, one a line), and, where it is there, ROOT/objectInfo*.txt:
tab-separated with a header line, of which Idx (from 1) and Name are read.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eupe_jax.evals import dense_data
from eupe_jax.evals.dense_data import Pair
from eupe_jax.evals.interface import DataError
from eupe_jax.evals.seg_metrics import IGNORE, reduce_zero


@dataclass(frozen=True)
class Data:
    """Both splits; `classes` are names by class number (after the zero label is gone), `digest` identifies it all."""

    train: tuple[Pair, ...]
    val: tuple[Pair, ...]
    classes: tuple[str, ...]
    reduce_zero_label: bool
    digest: str

    def read_label(self, pair: Pair) -> np.ndarray:
        """Classes of a pair, uint8 [H, W]; IGNORE where unknown.

        Raises:
          DataError: damaged, not one channel, or a label that is no class.
        """
        label = _read_raw(pair)
        label = reduce_zero(label) if self.reduce_zero_label else label
        known = label[label != IGNORE]
        if known.size and known.max() >= len(self.classes):
            raw = int(known.max()) + self.reduce_zero_label
            raise DataError(
                f"{pair.where}: {pair.target} holds the label {raw}, but there are {len(self.classes)} classes "
                f"({'0 is no class' if self.reduce_zero_label else 'from 0'})"
            )
        return label


def load(folder: Path, train_list: str, val_list: str, reduce_zero_label: bool, scan_limit: int, threads: int) -> Data:
    """Reads and checks the lists, every header and, in splits of at most `scan_limit` pairs, every pixel.

    Raises:
      DataError: naming the file (and the line of the list).
    """
    folder = Path(folder)
    train, val = _pairs(folder, train_list), _pairs(folder, val_list)
    for split in (train, val):
        dense_data.check_sizes(split, threads)
    classes = _classes(folder) or _counted_classes([*train, *val], reduce_zero_label, threads)
    digest = dense_data.digest([*train, *val], classes, reduce_zero_label)
    data = Data(tuple(train), tuple(val), classes, reduce_zero_label, digest)

    def scan(pair: Pair) -> bool:
        dense_data.read_rgb(pair)
        return bool((data.read_label(pair) != IGNORE).any())

    for name, split in (("training", train), ("validation", val)):
        if len(split) <= scan_limit and not any(dense_data.in_order(scan, split, threads, f"checking {name}")):
            raise DataError(f"{split[0].where}: no {name} image has a labelled pixel")
    return data


def _pairs(folder: Path, name: str) -> list[Pair]:
    pairs = []
    for where, line in dense_data.read_lines(folder / name):
        image = folder / "images" / line.lstrip("/")
        target = (folder / "annotations" / line.lstrip("/")).with_suffix(".png")
        pairs.append(Pair(image, target, where))
    return pairs


def _read_raw(pair: Pair) -> np.ndarray:
    image = dense_data.open_image(pair.target, pair.where)
    if image.mode not in ("L", "P", "1"):
        raise DataError(f"{pair.where}: {pair.target} has mode {image.mode}, expected one 8-bit channel of labels")
    return np.array(image, np.uint8)


def _classes(folder: Path) -> tuple[str, ...]:
    """Names from the one objectInfo*.txt; () where there is none."""
    files = sorted(folder.glob("objectInfo*.txt"))
    if len(files) > 1:
        raise DataError(f"{folder} holds several class lists, {[f.name for f in files]}: leave one")
    if not files:
        return ()
    try:
        rows = list(csv.DictReader(files[0].read_text(encoding="utf-8").splitlines(), delimiter="\t"))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise DataError(f"{files[0]} cannot be read: {e}") from None
    names = []
    for number, row in enumerate(rows, 1):
        if (row.get("Idx") or "").strip() != str(number) or not (row.get("Name") or "").strip():
            raise DataError(f"{files[0]}:{number + 1}: expected the columns Idx ({number}) and Name, got {row}")
        names.append(row["Name"].strip())
    if not names:
        raise DataError(f"{files[0]} names no class")
    return tuple(names)


def _counted_classes(pairs: list[Pair], reduce_zero_label: bool, threads: int) -> tuple[str, ...]:
    """As many classes as the largest label says, where nothing names them."""

    def largest(pair: Pair) -> int:
        label = _read_raw(pair)
        label = reduce_zero(label) if reduce_zero_label else label
        return int(np.max(label, where=label != IGNORE, initial=0))

    count = max(dense_data.in_order(largest, pairs, threads, "counting classes")) + 1
    return tuple(f"class {i + reduce_zero_label}" for i in range(count))
