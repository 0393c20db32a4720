"""Images with a map beside them (labels, depth): lists, checks before the long work, and batches read ahead."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from eupe_jax.data.decode import FORMATS
from eupe_jax.data.order import record_index
from eupe_jax.evals.interface import DataError

T = TypeVar("T")


@dataclass(frozen=True)
class Pair:
    """One image with its map; `where` is the list and line that name them."""

    image: Path
    target: Path
    where: str


def read_lines(path: Path) -> list[tuple[str, str]]:
    """(where, text) of every line that is not blank.

    Raises:
      DataError: no such file, not text, or nothing in it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path} cannot be read as a list: {e}") from None
    found = [(f"{path}:{number}", line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise DataError(f"{path} names no image")
    return found


def open_image(path: Path, where: str) -> Image.Image:
    """The decoded picture, as it lies in the file (EXIF orientation is not applied: it would part image and map).

    Raises:
      DataError: missing or damaged.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:  # Pillow raises all of these
        raise DataError(f"{where}: {path} cannot be decoded: {e}") from None


def read_rgb(pair: Pair) -> Image.Image:
    """The image of a pair as RGB."""
    return open_image(pair.image, pair.where).convert("RGB")


def check_sizes(pairs: Sequence[Pair], threads: int) -> None:
    """Reads every header: both files are there, are pictures, and have one size.

    Raises:
      DataError: naming the first that is not so.
    """

    def check(pair: Pair) -> None:
        sizes = []
        for path in (pair.image, pair.target):
            try:
                with Image.open(path, formats=FORMATS) as image:
                    sizes.append(image.size)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
                raise DataError(f"{pair.where}: {path} cannot be opened as a picture: {e}") from None
        (w, h), (tw, th) = sizes
        if (w, h) != (tw, th):
            raise DataError(f"{pair.where}: {pair.image} has {h}x{w} pixels but {pair.target} has {th}x{tw}")

    in_order(check, pairs, threads)


def in_order(work: Callable[[Pair], T], pairs: Sequence[Pair], threads: int, progress: str = "") -> list[T]:
    """`work` on every pair, several at once; the error of the first pair that has one is raised."""
    with ThreadPoolExecutor(threads) as pool:
        return list(tqdm(pool.map(work, pairs), total=len(pairs), desc=progress, disable=not progress))


def digest(pairs: Sequence[Pair], *facts: object) -> str:
    """Hex digest that changes with the pairs' names, sizes and times, or with the other facts."""
    h = hashlib.sha256(repr(facts).encode())
    for pair in pairs:
        for path in (pair.image, pair.target):
            stat = path.stat()
            h.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return h.hexdigest()


def training_batches(
    make: Callable[[int, int, int], tuple[np.ndarray, np.ndarray]],
    count: int, batch_size: int, seed: int, start: int, stop: int, threads: int, ahead: int = 2,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """Batches (images, targets) of iterations [start, stop), two made ahead by `threads`.

    make(record, iteration, position) gives one sample. Records are drawn without replacement, epoch by epoch; which
    one stands where is a function of (seed, iteration, position) alone.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        waiting: deque = deque()
        for iteration in range(start, stop + ahead):
            if iteration < stop:
                draws = np.arange(batch_size) + iteration * batch_size
                records = record_index(seed, draws, count).tolist()
                waiting.append([pool.submit(make, r, iteration, p) for p, r in enumerate(records)])
            if iteration >= start + ahead:
                images, targets = zip(*(sample.result() for sample in waiting.popleft()), strict=True)
                yield np.stack(images), np.stack(targets)
    finally:
        pool.shutdown(cancel_futures=True)


def read_ahead(read: Callable[[int], T], count: int, threads: int) -> Iterator[T]:
    """read(0), read(1), ... in order, a few ahead."""
    pool = ThreadPoolExecutor(threads)
    try:
        waiting: deque = deque()
        for index in range(count + 2 * threads):
            if index < count:
                waiting.append(pool.submit(read, index))
            if index >= 2 * threads or index >= count:
                if waiting:
                    yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
