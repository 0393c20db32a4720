"""NYUv2 in the BTS layout: scene folders with pictures and 16-bit depth, and lists that name them.

A line of ROOT/nyu_train.txt or nyu_test.txt is `rgb depth [focal]`, paths below ROOT; a leading slash, as the training
list has it, means nothing. Depth is a uint16 PNG in millimetres, 0 where there is no reading.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eupe_jax.evals import dense_data
from eupe_jax.evals.dense_data import Pair
from eupe_jax.evals.interface import DataError

_MODES = ("I;16", "I;16B", "I")  # what Pillow calls 16-bit grey


@dataclass(frozen=True)
class Data:
    """Both splits; `divisor`: what a unit of the files is a fraction of a metre by; `digest` identifies it all."""

    train: tuple[Pair, ...]
    test: tuple[Pair, ...]
    divisor: float
    digest: str

    def read_depth(self, pair: Pair) -> np.ndarray:
        """Metres, float32 [H, W]; 0 where unknown.

        Raises:
          DataError: damaged, or not 16 bits of grey.
        """
        image = dense_data.open_image(pair.target, pair.where)
        if image.mode not in _MODES:
            raise DataError(f"{pair.where}: {pair.target} has mode {image.mode}, expected 16-bit grey in millimetres")
        return np.asarray(image, np.float32) / np.float32(self.divisor)


def load(
    folder: Path, train_list: str, test_list: str, divisor: float, smallest: tuple[int, int],
    usable: Callable[[np.ndarray], bool], scan_limit: int, threads: int,
) -> Data:  # fmt: skip
    """Reads and checks the lists, every header and, in splits of at most `scan_limit` pairs, every pixel.

    Args:
      smallest: (height, width) that training pictures must have at least.
      usable: whether a test depth has anything to be measured on.

    Raises:
      DataError: naming the file and the line of its list.
    """
    folder = Path(folder)
    train, test = _pairs(folder, train_list), _pairs(folder, test_list)
    for split in (train, test):
        dense_data.check_sizes(split, threads)
    data = Data(tuple(train), tuple(test), divisor, dense_data.digest([*train, *test], divisor))

    def scan_train(pair: Pair) -> bool:
        require_smallest(pair, dense_data.read_rgb(pair).size, smallest)
        return bool(data.read_depth(pair).any())

    def scan_test(pair: Pair) -> bool:
        dense_data.read_rgb(pair)
        if not usable(data.read_depth(pair)):
            raise DataError(f"{pair.where}: {pair.target} has no valid depth in the part that is evaluated")
        return True

    for name, split, scan in (("training", train, scan_train), ("test", test, scan_test)):
        if len(split) <= scan_limit and not any(dense_data.in_order(scan, split, threads, f"checking {name}")):
            raise DataError(f"{split[0].where}: no {name} image has a depth reading")
    return data


def require_smallest(pair: Pair, size: tuple[int, int], smallest: tuple[int, int]) -> None:
    """Raises DataError where a training picture of `size` (width, height) is below `smallest` (height, width)."""
    if size[1] < smallest[0] or size[0] < smallest[1]:
        raise DataError(
            f"{pair.where}: {pair.image} has {size[1]}x{size[0]} pixels, training crops need at least "
            f"{smallest[0]}x{smallest[1]}: set train_box and train_crop"
        )


def _pairs(folder: Path, name: str) -> list[Pair]:
    pairs = []
    for where, line in dense_data.read_lines(folder / name):
        fields = line.split()
        if len(fields) not in (2, 3) or (len(fields) == 3 and not _is_number(fields[2])):
            raise DataError(f"{where}: expected 'rgb depth focal', got {line[:100]!r}")
        rgb, depth = (folder / field.lstrip("/") for field in fields[:2])
        pairs.append(Pair(rgb, depth, where))
    return pairs


def _is_number(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False
