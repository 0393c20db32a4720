"""Writes an Orbax checkpoint whose arrays are made one at a time: what is larger than memory can be converted."""

import dataclasses
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from eupe_jax.training import integrity

# What is read at once: large enough for speed, small enough that a host of a pod reads little beyond its own shard.
CHUNK_BYTES = 32 * 2**20
# What is compressed and written at once; a leaf written whole would be in memory a second time, compressed.
WRITE_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class ComingLeaf:
    """An array that will come: what the stream calls it, its shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def save(
    directory: epath.PathLike,
    items: Mapping[str, Any],
    leaves: Iterable[tuple[str, np.ndarray]],
    **jsons: Any,
) -> None:
    """Writes a checkpoint with an item of arrays for every one of `items`, and one of JSON for every one of `jsons`.

    Each array is on disk before the next one is taken from `leaves`: the peak is one array and a part of it compressed.

    Args:
      directory: must not exist; appears when all is written, and then gets its checksums. What a failed save leaves
        beside it nobody writes to.
      items: item -> tree of `ComingLeaf`.
      leaves: (name, array) of all the leaves: those of the first item in any order, then those of the second, ...

    Raises:
      ValueError: what came is not what was announced. OSError, ValueError: cannot be written.
    """
    numpy_format = _StreamHandler(leaves)
    registry = ocp.type_handlers.create_type_handler_registry(
        (ComingLeaf, numpy_format), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handlers, args = {}, {}
    for item, tree in items.items():
        chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
        handlers[item] = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
        args[item] = ocp.args.PyTreeSave(tree, save_args=chunks)
    for item, content in jsons.items():
        handlers[item], args[item] = ocp.JsonCheckpointHandler(), ocp.args.JsonSave(content)
    before = set(threading.enumerate())
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as checkpointer:
        try:
            checkpointer.save(directory, ocp.args.Composite(**args))
        except BaseException:  # Ctrl-C as well
            # Nothing may write any more when the caller removes what is there: Orbax makes folders in other threads.
            numpy_format.stop()
            for thread in set(threading.enumerate()) - before:
                if type(thread).__module__.startswith("orbax."):
                    thread.join(timeout=30)
            raise
    integrity.seal(epath.Path(directory))


class _StreamHandler(ocp.type_handlers.NumpyHandler):
    """Orbax's own format for numpy arrays; every array is pulled from an iterator when its turn has come."""

    def __init__(self, leaves: Iterable[tuple[str, np.ndarray]]) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._leaves = iter(leaves)
        self._writing = threading.Lock()
        self._stopped = False

    def stop(self) -> None:
        """Returns when no array is being written any more."""
        self._stopped = True
        with self._writing:
            pass

    async def serialize(self, values, infos, args=None):
        targets = {leaf.name: (leaf, info, arg) for leaf, info, arg in zip(values, infos, args, strict=True)}
        while targets:
            name, array = next(self._leaves, (None, None))
            if name not in targets:
                raise ValueError(f"{name or 'nothing'} came where one of {', '.join(targets)} was announced")
            leaf, info, arg = targets.pop(name)
            if (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
                raise ValueError(f"{name} came as {array.dtype} {list(array.shape)}, announced was {leaf}")
            (writing,) = await super().serialize([array], [info], [arg])
            writing.result()
            del array, writing  # both hold the memory
        return []

    async def _open_and_write(self, value, tspec, ts_context):
        with self._writing:
            store = await tensorstore.open(tensorstore.Spec(tspec), create=True, open=True, context=ts_context)
            for part in _parts(value.shape, store.chunk_layout.write_chunk.shape, value.nbytes):
                if self._stopped:
                    return
                await store[part].write(value[part], can_reference_source_data_indefinitely=True)


def _parts(shape: tuple[int, ...], chunk: tuple[int, ...], nbytes: int) -> Iterator[tuple[slice, ...]]:
    """Slabs of whole chunks, cut along the axis that has most chunks, of about WRITE_BYTES each."""
    if nbytes <= WRITE_BYTES:
        yield (slice(None),) * len(shape)
        return
    axis = int(np.argmax(np.array(shape) / chunk))
    rows = max(1, WRITE_BYTES * shape[axis] // nbytes // chunk[axis]) * chunk[axis]
    for start in range(0, shape[axis], rows):
        yield (slice(None),) * axis + (slice(start, min(start + rows, shape[axis])),)
