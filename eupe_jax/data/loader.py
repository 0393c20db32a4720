"""Batches of one host: which records (pure functions of seed, step, position), read in parallel, in order.

The only state is the global step: `Loader.batches(step)` gives the same batches whether the run reached that step or
began there, and the hosts of a run together give the same global batch whatever their number.
"""

import logging
import sys
from collections import Counter
from collections.abc import Mapping
from functools import partial

import grain
import numpy as np

from eupe_jax.data.host import REASONS, HostConfig, RecordReader
from eupe_jax.data.mixture import Mixing, Mixture
from eupe_jax.data.order import hash_words, record_index
from eupe_jax.data.processes import end_with_parent
from eupe_jax.data.sources import Source

log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]

_PART = 64  # images that one thread makes at a time: a large batch is made by several, and few are held in memory
_BROKEN = "broken"  # int64 [sources, kinds]: comes with a batch from whichever process made it


class Loader:
    """A stream of batches from one source or a mixture.

    sources: one source, or sources by name. weights: of each name in the mixture; without them, in proportion to size.
    mixing: "batch" draws the whole batch of a step from one source (EUPE §3.4), "record" mixes within batches.
    repeats: how often the records of a named source may be seen, at most; without it, endlessly. What a run of
    `total_steps` draws is known beforehand, so one that would need more is refused at once.
    batch_size: the global batch, divisible by `process_count`. Record ids ("index") number the sources' records one
    after another in the order of `sources`. threads: parts of batches (64 images) made at once. workers: processes with
    that many threads each, for hosts that decoding holds up; 0 keeps everything in this process.
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
        process_index: int = 0,
        process_count: int = 1,
        threads: int = 8,
        workers: int = 0,
    ):
        sources = dict(sources) if isinstance(sources, Mapping) else {"data": sources}
        weights = dict(weights) if weights is not None else {name: len(s) for name, s in sources.items()}
        if set(weights) != set(sources):
            raise ValueError(f"mixture weights name {sorted(weights)} but the sources are {sorted(sources)}")
        if empty := [name for name, s in sources.items() if len(s) == 0]:
            raise ValueError(f"sources without records: {empty}")
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index {process_index} is not in range({process_count})")
        if batch_size < 1 or batch_size % process_count:
            raise ValueError(f"batch_size {batch_size} must be a positive multiple of the {process_count} processes")
        self.batch_size, self.seed = batch_size, seed
        self.local_batch_size = batch_size // process_count
        self.first_position = process_index * self.local_batch_size
        self._threads, self._workers = threads, workers
        mixture = Mixture({name: weights[name] for name in sources}, seed, batch_size, mixing)
        _check_repeats(sources, mixture, dict(repeats or {}), total_steps)
        self._records = _Records(sources, config, mixture, seed)
        self.counts: Counter[tuple[str, str]] = Counter()

    def record_ids(self, step: int) -> np.ndarray:
        """Ids (int64 [global batch]) that `step` asks for, before any broken record is replaced."""
        source, index = self._records.of_step(step)
        return index + self._records.offsets[source]

    def batches(self, start_step: int = 0) -> "_Stream":
        """This host's part of every batch from `start_step` on: "image" uint8 [b, S, S, 3], "index" int64 [b].

        Endless. Close it (or drop it) to stop its threads. A worker process that dies is a RuntimeError.
        """
        parts = -(-self.local_batch_size // _PART)
        make = partial(self._records.part, first=self.first_position, count=self.local_batch_size, parts=parts)
        read = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=max(self._threads, 2 * parts))
        dataset = grain.MapDataset.range(start_step * parts, sys.maxsize).map(make).to_iter_dataset(read)
        if self._workers:
            _mark_flags_parsed()
            options = grain.MultiprocessingOptions(num_workers=self._workers)
            dataset = dataset.mp_prefetch(options, worker_init_fn=lambda index, count: end_with_parent())
        return _Stream(iter(dataset), parts, list(self._records.names), self.counts)


class _Stream:
    """Batches put together from `parts` elements of grain's iterator, which `close` ends; adds up what they met."""

    def __init__(self, elements: grain.DatasetIterator, parts: int, names: list[str], counts: Counter[tuple[str, str]]):
        self._elements, self._parts, self._names, self._counts = elements, parts, names, counts

    def __iter__(self) -> "_Stream":
        return self

    def __next__(self) -> Batch:
        pieces = [next(self._elements) for _ in range(self._parts)]
        broken = sum(piece.pop(_BROKEN) for piece in pieces)
        for source, kind in zip(*np.nonzero(broken), strict=True):
            self._counts[self._names[source], REASONS[kind]] += int(broken[source, kind])
        return {k: np.concatenate([p[k] for p in pieces]) for k in pieces[0]} if self._parts > 1 else pieces[0]

    def close(self) -> None:
        self._elements.close()
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

    def of_step(self, step: int, positions: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """(source, record in it), int64 each, at some positions of the global batch of `step`."""
        sources, draws = (x[positions] for x in self._mixture.of_step(step))
        index = np.empty_like(draws)
        for s in np.unique(sources):
            here = sources == s
            index[here] = record_index(int(hash_words(self._seed, s)), draws[here], len(self._sources[s]))
        return sources, index

    def part(self, number: int, *, first: int, count: int, parts: int) -> Batch:
        """One of the `parts` of the batch of `count` positions from `first` on, numbered through all steps, and the
        broken records it met, by source and kind."""
        step, part = divmod(number, parts)
        first, stop = first + part * count // parts, first + (part + 1) * count // parts
        count = stop - first
        sources, asked = self.of_step(step, slice(first, stop))
        images, index = np.empty((count, self._size, self._size, 3), np.uint8), np.empty(count, np.int64)
        broken = np.zeros((len(self.names), len(REASONS)), np.int64)
        for i, (source, record) in enumerate(zip(sources.tolist(), asked.tolist(), strict=True)):
            images[i], index[i], met = self._reader.read(
                self._sources[source], record, step, first + i, self.names[source]
            )
            for kind in met:
                broken[source, REASONS.index(kind)] += 1
        return {"image": images, "index": index + self.offsets[sources], _BROKEN: broken}


def _mark_flags_parsed():
    # Grain's workers read absl flags, which nobody has parsed outside absl's app.run.
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
