"""Batches of one host: which records (pure functions of seed, step, position), read in parallel, in order.

The only state is the global step: `Loader.batches(step)` gives the same batches whether the run reached that step or
began there, and the hosts of a run together give the same global batch whatever their number.
"""

import logging
import math
import multiprocessing
import re
import sys
from collections import Counter
from collections.abc import Mapping
from functools import partial

import grain
import numpy as np

from eupe_jax.data.host import REASONS, HostConfig, RecordReader
from eupe_jax.data.mixture import Mixing, Mixture
from eupe_jax.data.order import hash_words, record_index
from eupe_jax.data.processes import end_with_parent, how_it_ended
from eupe_jax.data.sources import Source

log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]

_PART_BYTES = 32 << 20  # of pixels that a thread makes at a time, at most
_FEWEST = 4  # images of a part: handing it on costs as much as half an image
_AHEAD_BYTES = 512 << 20  # of pixels that are made ahead where whole batches are small


class Loader:
    """A stream of batches from one source or a mixture.

    sources: one source, or sources by name. weights: of each name in the mixture; without them, in proportion to size.
    mixing: "batch" draws the whole batch of a step from one source (EUPE §3.4), "record" mixes within batches.
    repeats: how often the records of a named source may be seen, at most; without it, endlessly. What a run of
    `total_steps` draws is known beforehand, so one that would need more is refused at once.
    batch_size: the global batch. Record ids ("index") number the sources' records one after another in the order of
    `sources`. threads: parts of a batch made at once. workers: processes with that many threads each, for hosts that
    decoding holds up; 0 keeps everything in this process.
    `counts`: how often broken records of each (source, kind of `host.REASONS`) were met for the batches handed out.
    Raises ValueError for settings that do not fit together.
    """

    def __init__(
        self,
        sources: Source | Mapping[str, Source],
        config: HostConfig,
        *,
        batch_size: int,
        seed: int,
        weights: Mapping[str, float] | None = None,
        mixing: Mixing = "batch",
        repeats: Mapping[str, int] | None = None,
        total_steps: int | None = None,
        threads: int = 8,
        workers: int = 0,
    ):
        sources = dict(sources) if isinstance(sources, Mapping) else {"data": sources}
        weights = dict(weights) if weights is not None else {name: len(s) for name, s in sources.items()}
        if set(weights) != set(sources):
            raise ValueError(f"mixture weights name {sorted(weights)} but the sources are {sorted(sources)}")
        if empty := [name for name, s in sources.items() if len(s) == 0]:
            raise ValueError(f"sources without records: {empty}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.batch_size, self.seed = batch_size, seed
        self._threads, self._workers = threads, workers
        mixture = Mixture({name: weights[name] for name in sources}, seed, batch_size, mixing)
        _check_repeats(sources, mixture, dict(repeats or {}), total_steps)
        self.sources = sources
        self._records = _Records(sources, config, mixture, seed)
        self._image_shape = (config.size, config.size, 3)
        self.counts: Counter[tuple[str, str]] = Counter()

    def record_ids(self, step: int) -> np.ndarray:
        """Ids (int64 [global batch]) that `step` asks for, before any broken record is replaced."""
        source, index = self._records.of_step(step)
        return index + self._records.offsets[source]

    def batches(self, start_step: int = 0, positions: np.ndarray | None = None) -> "_Stream":
        """The images at `positions` (int [b], None: all) of every global batch from `start_step` on: "image" uint8
        [b, S, S, 3], "index" int64 [b], and "broken" int64 [sources, kinds]: how often broken records of each source
        (in order) and kind were met for them.

        Endless. Close it (or drop it) to stop its threads. What goes wrong in them is raised here, as ValueError or
        OSError whatever it was; a worker process that dies is a ChildProcessError.
        """
        positions = np.arange(self.batch_size) if positions is None else np.asarray(positions)
        if not len(positions) or positions.min() < 0 or positions.max() >= self.batch_size:
            raise ValueError(f"positions must be some of the {self.batch_size} of a batch, got {positions.tolist()}")
        shape = (len(positions), *self._image_shape)
        parts, ahead = parts_of_batch(len(positions), math.prod(self._image_shape), self._threads, self._workers)
        make = partial(self._records.part, positions=positions, parts=parts)
        read = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=ahead)
        dataset = grain.MapDataset.range(start_step * parts, sys.maxsize).map(make).to_iter_dataset(read)
        if self._workers:
            _mark_flags_parsed()
            options = grain.MultiprocessingOptions(num_workers=self._workers)
            # grain ends its workers by SIGKILL, also at the exit of a process that did not close them
            dataset = dataset.mp_prefetch(
                options, worker_init_fn=lambda index, count: end_with_parent(through_notices=True)
            )
        return _Stream(iter(dataset), parts, shape, list(self.sources), self.counts, self._workers)


def parts_of_batch(count: int, image_bytes: int, threads: int, workers: int) -> tuple[int, int]:
    """(parts that a batch of `count` images is made in, how many of them a process makes ahead).

    Parts are small enough for all threads to share one batch. What is made ahead, so that one slow read stalls none,
    is `threads` batches, but no more than 512 MiB, or one batch and the parts in hand if that is more.
    """
    makers = threads * max(workers, 1)
    images = max(1, min(max(-(-count // makers), _FEWEST), _PART_BYTES // image_bytes))
    parts = -(-count // images)
    ahead = max(parts + makers, min(makers * parts, _AHEAD_BYTES // (images * image_bytes)))
    return parts, -(-ahead // max(workers, 1))


class _Stream:
    """Batches put together from `count` parts each of grain's iterator, which `close` ends; adds up what they met."""

    def __init__(
        self,
        parts: grain.DatasetIterator,
        count: int,
        shape: tuple[int, ...],
        names: list[str],
        counts: Counter[tuple[str, str]],
        workers: int,
    ):
        self._parts, self._count, self._shape, self._names, self._counts = parts, count, shape, names, counts
        self._workers, self._others = workers, multiprocessing.active_children() if workers else []
        self._processes: list[multiprocessing.Process] = []  # the workers, once they have begun

    def __iter__(self) -> "_Stream":
        return self

    def __next__(self) -> Batch:
        image, index = np.empty(self._shape, np.uint8), np.empty(self._shape[0], np.int64)
        broken, first = np.zeros((len(self._names), len(REASONS)), np.int64), 0
        for _ in range(self._count):  # copied one by one, so that parts need no second batch's memory
            part = self._next_part()
            here = slice(first, first + len(part["index"]))
            image[here], index[here], first = part["image"], part["index"], here.stop
            broken += part["broken"]
        for source, kind in zip(*np.nonzero(broken), strict=True):
            self._counts[self._names[source], REASONS[kind]] += int(broken[source, kind])
        return {"image": image, "index": index, "broken": broken}

    def _next_part(self) -> Batch:
        try:
            part = next(self._parts)
        except RuntimeError as error:
            if not (died := re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))):
                raise
            code = int(died[1])
            dead = [f"process {p.pid}, " for p in self._processes if p.exitcode == code]
            raise ChildProcessError(
                f"a data worker ({''.join(dead[:1])}one of data.workers={self._workers}) {how_it_ended(code)}; lower "
                "data.workers or data.threads if it was short of memory. The same command resumes the run"
            ) from error
        if len(self._processes) < self._workers:  # grain begins them with the first part
            self._processes = [p for p in multiprocessing.active_children() if p not in self._others]
        return part

    def close(self) -> None:
        self._parts.close()
        if self._counts:
            kinds = ", ".join(f"{source}: {n} {kind}" for (source, kind), n in sorted(self._counts.items()))
            log.info("broken records replaced so far: %s", kinds)


def _check_repeats(
    sources: Mapping[str, Source], mixture: Mixture, repeats: Mapping[str, int], total_steps: int | None
) -> None:
    if unknown := sorted(set(repeats) - set(sources)):
        raise ValueError(f"repeats name {unknown} but the sources are {sorted(sources)}")
    if not repeats:
        return
    if total_steps is None:
        raise ValueError("repeats need total_steps: whether a source runs out depends on the length of the run")
    for (name, source), drawn in zip(sources.items(), mixture.draws_before(total_steps), strict=True):
        if name not in repeats:
            continue
        allowed, n = repeats[name], len(source)
        if allowed < 1:
            raise ValueError(f"data.sources.{name}.repeat must be at least 1 (0 in a config: endless), got {allowed}")
        if drawn > allowed * n:
            raise ValueError(
                f"data.sources.{name} runs out: {total_steps} steps draw {drawn} records, and repeat={allowed} times "
                f"{n} records are {allowed * n}; set repeat to {-(-int(drawn) // n)} or more (0: endless), lower its "
                "weight, or train for fewer steps"
            )


class _Records:
    """Reads the records of (step, position); pickled to worker processes."""

    def __init__(self, sources: Mapping[str, Source], config: HostConfig, mixture: Mixture, seed: int):
        self.names, self._sources = list(sources), list(sources.values())
        self._mixture, self._seed, self._size = mixture, seed, config.size
        self._reader = RecordReader(config, seed)
        self.offsets = np.cumsum([0] + [len(s) for s in self._sources])[:-1]

    def of_step(self, step: int, positions: np.ndarray | slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """(source, record in it), int64 each, at some positions of the global batch of `step`."""
        sources, draws = (x[positions] for x in self._mixture.of_step(step))
        index = np.empty_like(draws)
        for s in np.unique(sources):
            here = sources == s
            index[here] = record_index(int(hash_words(self._seed, s)), draws[here], len(self._sources[s]))
        return sources, index

    def part(self, number: int, *, positions: np.ndarray, parts: int) -> Batch:
        """One of the `parts` of the images at these positions of a batch, numbered through all steps, and the broken
        records it met, by source and kind."""
        step, part = divmod(number, parts)
        positions = positions[part * len(positions) // parts : (part + 1) * len(positions) // parts]
        count = len(positions)
        sources, asked = self.of_step(step, positions)
        images, index = np.empty((count, self._size, self._size, 3), np.uint8), np.empty(count, np.int64)
        broken = np.zeros((len(self.names), len(REASONS)), np.int64)
        for i, (position, source, record) in enumerate(
            zip(positions.tolist(), sources.tolist(), asked.tolist(), strict=True)
        ):
            try:
                images[i], index[i], met = self._reader.read(
                    self._sources[source], record, step, position, self.names[source]
                )
            except BaseException as error:
                if (told := _tellable(error, f"record {record} of {self.names[source]}, for step {step}")) is error:
                    raise
                raise told from error
            for kind in met:
                broken[source, REASONS.index(kind)] += 1
        return {"image": images, "index": index + self.offsets[sources], "broken": broken}


def _tellable(error: BaseException, where: str) -> Exception:
    """What a thread or a worker process tells of an error: itself, or, of a kind that is nobody's to handle or that
    would not get through to another process (which then waited for ever), its words.
    """
    family = type(error).__module__.partition(".")[0]
    if isinstance(error, (ValueError, OSError)) and family in ("builtins", __name__.partition(".")[0]):
        return error
    kind = OSError if isinstance(error, OSError) else ValueError
    return kind(f"{where} cannot be read: {type(error).__name__}: {error}")


def _mark_flags_parsed():
    # Grain's workers read absl flags, which nobody has parsed outside absl's app.run.
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
