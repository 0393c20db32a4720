"""Batches of one host: which records (pure functions of seed, step, position), read in parallel, in order.

The only state is the global step: `Loader.batches(step)` gives the same batches whether the run reached that step or
began there, and the hosts of a run together give the same global batch whatever their number.
"""

import sys
from collections.abc import Iterator, Mapping

import grain
import numpy as np

from eupe_jax.data.host import HostConfig, RecordReader
from eupe_jax.data.mixture import Mixture
from eupe_jax.data.order import hash_words, record_index
from eupe_jax.data.sources import Source

Batch = dict[str, np.ndarray]


class Loader:
    """A stream of batches from one source or a mixture.

    sources: one source, or sources by name. weights: probability of each name for a step's whole batch (homogeneous
    batches, EUPE §3.4); without them, in proportion to size. batch_size: the global batch, divisible by
    `process_count`. Record ids ("index") number the sources' records one after another in the order of `sources`.
    threads: batches made at once, each by one thread. workers: processes with that many threads each, for hosts that
    decoding holds up; 0 keeps everything in this process.
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
        self._records = _Records(sources, config, weights, seed, batch_size)

    def record_ids(self, step: int) -> np.ndarray:
        """Ids (int64 [global batch]) that `step` asks for, before any broken record is replaced."""
        source, indices = self._records.of_step(step)
        return indices + self._records.offsets[source]

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """This host's part of every batch from `start_step` on: "image" uint8 [b, S, S, 3], "index" int64 [b].

        Endless. Close it (or drop it) to stop its threads.
        """
        b, first = self.local_batch_size, self.first_position
        records = self._records

        def place(i: int) -> Batch:
            return records.read(start_step + i // b, first + i % b)

        # Batched before it is iterated, so that worker processes share out whole batches and order stays.
        read = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=self._threads)
        dataset = grain.MapDataset.range(sys.maxsize).map(place).batch(b).to_iter_dataset(read)
        if self._workers:
            _mark_flags_parsed()
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._workers))
        return iter(dataset)


class _Records:
    """Reads the record of (step, position); pickled to worker processes."""

    def __init__(self, sources, config: HostConfig, weights: Mapping[str, float], seed: int, batch_size: int):
        self._sources = list(sources.values())
        self._mixture = Mixture({name: weights[name] for name in sources}, seed)
        self._seed, self._batch_size = seed, batch_size
        self._reader = RecordReader(config, seed)
        self.offsets = np.cumsum([0] + [len(s) for s in self._sources])[:-1]

    def of_step(self, step: int, positions: np.ndarray | None = None) -> tuple[int, np.ndarray]:
        """(source, record in it for each position) of the global batch of `step`."""
        positions = np.arange(self._batch_size) if positions is None else positions
        source, earlier = self._mixture.draws_before(step)
        draws = earlier * self._batch_size + positions
        return source, record_index(int(hash_words(self._seed, source)), draws, len(self._sources[source]))

    def read(self, step: int, position: int) -> Batch:
        source, indices = self.of_step(step, np.array([position]))
        image, index = self._reader(self._sources[source], int(indices[0]), step, position)
        return {"image": image, "index": np.int64(index + self.offsets[source])}


def _mark_flags_parsed():
    # Grain's workers read absl flags, which nobody has parsed outside absl's app.run.
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
