"""What happens to a record on the host: bytes -> RGB -> one square uint8 image at the canonical size.

NumPy and light libraries only (`data.decode`, `data.crop`), so it runs in threads, for they let go of the interpreter
lock, and in worker processes. The same bytes and the same place in the run give the same image on every machine.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from eupe_jax.data.crop import crop_and_resize, random_crop_box
from eupe_jax.data.decode import REASONS, BrokenRecord, decode, naming, open_picture
from eupe_jax.data.order import hash_words
from eupe_jax.data.sources import Record, RecordError, Source, Unavailable

__all__ = [
    "REASONS", "BrokenRecord", "HostConfig", "Reading", "RecordReader", "TooManyBroken", "decode", "make_image",
    "random_crop_box", "random_generator",
]  # fmt: skip

log = logging.getLogger(__name__)

_ATTEMPTS = 16
_PAUSES = (1, 2, 4, 8)  # seconds between tries to reach storage
_LISTED = 50  # broken records that the error of too many names
_NAMED = 1000  # broken records that are remembered and logged by name
_FEW = 20  # broken records that say nothing of a fraction yet


class TooManyBroken(ValueError):
    """More records than allowed were broken: the message says how many, a note lists them, one a line."""

    def __init__(self, message: str, broken: Mapping[str, str] | None = None):
        super().__init__(message)
        lines = [f"  {name}: {reason}" for name, reason in (broken or {}).items()]
        if len(lines) > _LISTED:
            lines[_LISTED:] = [f"  and {len(lines) - _LISTED} more"]
        if lines:
            self.add_note("\n".join(["broken records:", *lines]))


@dataclass(frozen=True)
class HostConfig:
    """How a record becomes an image of `size` x `size`.

    mode: "crop": a random-resized crop, bicubic, of `scale` of the area and an aspect ratio in `ratio` (log-uniform).
      "resize": the whole picture squashed, bicubic. "none": it must already have that size.
    The default scale and ratio are DINOv3's for global crops. max_pixels bounds what is decoded (decompression bombs).
    max_broken_fraction: of the records read, how many may be broken before the run stops. Up to 20 always may, unless
      it is 0: then the first one stops the run.
    Raises ValueError that names the field of a run's config.
    """

    size: int = 256
    mode: Literal["crop", "resize", "none"] = "crop"
    scale: tuple[float, float] = (0.32, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    max_pixels: int = 80_000_000
    max_broken_fraction: float = 0.1

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"data.image_size must be positive, got {self.size}")
        if self.mode not in ("crop", "resize", "none"):
            raise ValueError(f"data.mode must be 'crop', 'resize' or 'none', got {self.mode!r}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"data.crop_scale must be 0 < low <= high <= 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"data.crop_ratio must be 0 < low <= high, got {self.ratio}")
        if self.max_pixels < 1:
            raise ValueError(f"data.max_pixels must be positive, got {self.max_pixels}")
        if not 0 <= self.max_broken_fraction <= 1:
            raise ValueError(f"data.max_broken_fraction must be in [0, 1], got {self.max_broken_fraction}")


@lru_cache(maxsize=64)
def _stream_key(seed: int) -> tuple[int, int]:
    return int(hash_words(seed, 0x63726F70)), int(hash_words(seed, 0x70697865))


def random_generator(seed: int, step: int, position: int) -> np.random.Generator:
    """Philox stream of one place in the run: the same whatever host, process or thread asks."""
    return np.random.Generator(np.random.Philox(key=_stream_key(seed), counter=(0, 0, position, step)))


def make_image(record: Record, config: HostConfig, generator: np.random.Generator) -> np.ndarray:
    """One image, uint8 [size, size, 3], from a record. Raises BrokenRecord, which names the record."""
    s = config.size
    with naming(record):
        picture = open_picture(record.data, config.max_pixels)
        width, height = picture.width, picture.height
        if config.mode == "none":
            if (width, height) != (s, s):
                raise BrokenRecord(
                    record.name, f"it is {width}x{height} and mode 'none' takes {s}x{s} as it is", "unsupported"
                )
            return picture.decode(1)
        box = (0.0, 0.0, float(width), float(height))
        if config.mode == "crop":
            box = random_crop_box(width, height, config.scale, config.ratio, generator)
        # A JPEG decodes at 1/2, 1/4 or 1/8 of its size for a fraction of the time: allowed if the crop stays >= s.
        shrink = min(box[2] - box[0], box[3] - box[1]) / s if picture.can_shrink else 1
        scale = max(n for n in (1, 2, 4, 8) if n == 1 or n <= shrink)
        return crop_and_resize(picture.decode(scale), tuple(x / scale for x in box), s)


def _read(source: Source, index: int) -> Record:
    """Asks storage that does not answer again, after `_PAUSES`; what is not the record's own fault stays an error, so
    that no outage changes which records a run sees."""
    for pause in (*_PAUSES, None):
        try:
            return source[index]
        except RecordError as e:
            reason = e.reason.removeprefix("cannot be read: ")
            raise BrokenRecord(e.name, f"cannot be read: {reason}", "unreadable") from e
        except Unavailable as e:
            if pause is None:
                raise
            log.warning("trying again in %g s: %s", pause, e)
            time.sleep(pause)


class Reading(NamedTuple):
    """image: uint8 [size, size, 3]. index: the record it really shows. broken: kinds (of REASONS) met on the way."""

    image: np.ndarray
    index: int
    broken: tuple[str, ...] = ()


class RecordReader:
    """Reads, decodes and crops the record of one place, and stands in another one for a broken record.

    The stand-in is a function of (seed, step, position) alone, so every host and every resumed run agrees on it.
    Broken records are logged once by name, and counted by source and kind (`counts`); past the allowed fraction
    TooManyBroken lists them. Thread-safe; a worker process counts for itself, and `read` says what it met, so whoever
    gets the batches can add that up.
    """

    def __init__(self, config: HostConfig, seed: int):
        self._config, self._seed = config, seed
        self._lock = threading.Lock()
        self.reads = 0  # records tried, stand-ins among them
        self.counts: Counter[tuple[str, str]] = Counter()  # (source, kind) -> times a broken record was met
        self.broken: dict[str, str] = {}  # name -> reason, of the first thousand

    def __call__(self, source: Source, index: int, step: int, position: int) -> tuple[np.ndarray, int]:
        """(uint8 [size, size, 3], index of the record it really came from)."""
        return self.read(source, index, step, position)[:2]

    def read(self, source: Source, index: int, step: int, position: int, name: str = "data") -> Reading:
        """The image of one place; `name`: what the source is called in `counts`.

        Raises:
          TooManyBroken: every record that was drawn for it was broken.
        """
        generator = random_generator(self._seed, step, position)
        met = []
        for attempt in range(_ATTEMPTS):
            try:
                image = make_image(_read(source, index), self._config, generator)
            except BrokenRecord as e:
                met.append(e.kind)
                self._count(name, e)
                index = int(hash_words(self._seed, 0x72657472, step, position, attempt) % np.uint64(len(source)))
                continue
            with self._lock:
                self.reads += 1
            return Reading(image, index, tuple(met))
        with self._lock:
            raise TooManyBroken(f"{name}: {_ATTEMPTS} records drawn in a row were broken", self.broken)

    def _count(self, source: str, error: BrokenRecord):
        with self._lock:
            self.reads += 1
            self.counts[source, error.kind] += 1
            if new := error.name not in self.broken and len(self.broken) < _NAMED:
                self.broken[error.name] = error.reason
            broken, allowed = self.counts.total(), self._config.max_broken_fraction
            if broken > max(allowed * self.reads, _FEW if allowed else 0):
                kinds = ", ".join(f"{name}: {n} {kind}" for (name, kind), n in sorted(self.counts.items()))
                raise TooManyBroken(
                    f"{broken} of {self.reads} records read were broken ({kinds}), more than "
                    f"data.max_broken_fraction={allowed} allows; raise it to go on",
                    self.broken,
                ) from error
            if new:
                log.warning("broken record of %s replaced (%s): %s", source, error.kind, error)
                if len(self.broken) == _NAMED:
                    log.warning("that was broken record %d; more of them are counted, but not named", _NAMED)

    def __getstate__(self):
        return self._config, self._seed

    def __setstate__(self, state):
        self.__init__(*state)
