"""ArrayRecord shards by byte ranges: where each record lies, and its bytes, from a disk or a bucket alike.

Format (github.com/google/riegeli, doc/riegeli_records_file_format.md; github.com/google/array_record,
cpp/layout.proto): the file is cut into blocks of 64 KiB, each with a header of 24 bytes at its start, which lies across
whatever is there. A chunk is a header of 40 bytes (hash, data size, data hash, type and number of records, decoded
size) and its data; those of simple chunks are the compression type, the length of the sizes, the sizes, and the values
of the records; where they are compressed, sizes and values each begin with their decompressed length. The last block
holds a postscript that tells where the footer is, and the footer the offset and decoded size of every chunk.

A shard is plain when it was written with group_size:1 and without compression: a record is then a stretch of the file.
Riegeli's hashes are not checked here; sizes are, against each other, and packed records have a checksum of their own.
"""

import struct

import numpy as np

from eupe_jax.data.sources.base import RecordError
from eupe_jax.data.sources.storage import File, RangeReader

# Of each record: where its chunk begins; its size, or, where it is not plain, that of the chunk in the file; 0 for a
# plain record, else 1 + its number in the chunk.
ROW = np.dtype([("offset", "<u8"), ("size", "<u8"), ("place", "<u4")])

_BLOCK, _BLOCK_HEADER = 1 << 16, 24
_CHUNK = struct.Struct("<QQQB7sQ")
_SIMPLE, _UNCOMPRESSED = ord("r"), 0
_CODECS = {ord("z"): "zstd", ord("b"): "brotli", ord("s"): "snappy"}
_MAGIC = 0x71930E704FDAE05E
_MOST_DECODED = 1 << 31  # bytes of a compressed chunk


class NotPlain(ValueError):
    """A shard whose records are grouped or compressed."""


class Unreadable(ValueError):
    """A shard that only array_record's own reader reads."""


def record_table(file: File, reader: RangeReader, plain: bool = True) -> np.ndarray:
    """[N] rows `ROW`, one a record.

    plain: whether to raise NotPlain for a shard that is not. Raises Unreadable for transposed records and RecordError
    for a shard that is cut off or damaged.
    """
    if file.size < 2 * _BLOCK or file.size % _BLOCK:
        raise RecordError(file.path, f"not a whole ArrayRecord file: {file.size} bytes are no multiple of 64 KiB")
    values, _, _ = _chunk_at(file, reader, file.size - _BLOCK)
    fields = _varints(values)
    if len(fields) < 4 or fields[3] != _MAGIC:
        raise RecordError(file.path, "not a whole ArrayRecord file: its last block is no postscript")
    footer = int(fields[1])
    values, sizes, compressed = _chunk_at(file, reader, footer)
    if compressed and plain:
        raise NotPlain(f"{file.path}: its records are compressed")
    # First what holds for all (its size comes first), then three fields of one tag byte each for every chunk.
    rows = _varints(values[int(sizes[0]) :])
    if len(rows) != 6 * (len(sizes) - 1) or np.any(rows.reshape(-1, 6)[:, ::2] != [0x08, 0x10, 0x18]):
        raise RecordError(file.path, "damaged: its footer does not list its chunks")
    _, offsets, _, decoded, _, records = rows.reshape(-1, 6).T
    if plain and np.any(records != 1):
        raise NotPlain(f"{file.path}: its records lie in groups")
    if plain:
        table = np.zeros(len(offsets), ROW)
        table["offset"], table["size"] = offsets, decoded
    else:
        table = _chunk_table(file, offsets, records, footer)
    if len(table):
        read_record(file, reader, table[0])  # says whether records are compressed
    return table


def _chunk_table(file: File, offsets: np.ndarray, records: np.ndarray, footer: int) -> np.ndarray:
    ends = np.append(offsets[1:], np.uint64(footer))[: len(offsets)]
    if np.any(ends <= offsets) or np.any(records > file.size) or records.sum() > file.size:
        raise RecordError(file.path, "damaged: its footer lists chunks that do not follow each other")
    counts = records.astype(np.int64)
    table = np.zeros(int(counts.sum()), ROW)
    table["offset"], table["size"] = np.repeat(offsets, counts), np.repeat(ends - offsets, counts)
    table["place"] = np.arange(len(table)) - np.repeat(np.cumsum(counts) - counts, counts) + 1
    return table


def read_record(file: File, reader: RangeReader, row: np.void) -> bytes:
    """The record of one row of `record_table`. Raises RecordError when it is not there."""
    offset, size, place = int(row["offset"]), int(row["size"]), int(row["place"])
    if place:
        values, sizes, _ = _decode(file, offset, _without_headers(reader.read(file, offset, size), offset))
        if place > len(sizes):
            raise RecordError(file.path, f"damaged: the chunk at byte {offset} has no record {place}")
        end = int(sizes[:place].sum())
        return values[end - int(sizes[place - 1]) : end]
    if offset + size > file.size:
        raise RecordError(file.path, f"damaged: a record of {size} bytes at byte {offset} of {file.size}")
    prefix = bytes([_UNCOMPRESSED]) + _varint(len(_varint(size))) + _varint(size)
    data = _plain(reader, file, offset, _CHUNK.size + len(prefix) + size)
    _, data_size, _, kind, records, decoded = _CHUNK.unpack_from(data)
    if (kind, int.from_bytes(records, "little"), decoded) != (_SIMPLE, 1, size):
        if kind == ord("t"):
            raise NotPlain(f"{file.path}: its records are transposed")
        raise RecordError(file.path, f"damaged: no record of {size} bytes at byte {offset}")
    if data[_CHUNK.size] != _UNCOMPRESSED:
        raise NotPlain(f"{file.path}: its records are compressed")
    start = _CHUNK.size + len(prefix)
    if data_size != len(prefix) + size or data[_CHUNK.size : start] != prefix:
        raise RecordError(file.path, f"damaged: the record at byte {offset} has another size than the footer says")
    return data[start:]


def _plain(reader: RangeReader, file: File, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` on, not counting the headers of blocks."""
    first, headers = -(-offset // _BLOCK) * _BLOCK, 0
    while first + headers * _BLOCK < offset + size + headers * _BLOCK_HEADER:
        headers += 1
    return _without_headers(reader.read(file, offset, size + headers * _BLOCK_HEADER), offset)


def _without_headers(raw: bytes, offset: int) -> bytes:
    """What lies from byte `offset` of a file on, without the headers of the blocks that begin there."""
    cuts = range(-offset % _BLOCK, len(raw), _BLOCK)
    starts = [0] + [cut + _BLOCK_HEADER for cut in cuts]
    return b"".join(raw[a:b] for a, b in zip(starts, [*cuts, len(raw)], strict=True))


def _chunk_at(file: File, reader: RangeReader, offset: int) -> tuple[bytes, np.ndarray, bool]:
    """As `_decode`, of a chunk of which only the place is known."""
    if not 0 < offset < file.size:
        raise RecordError(file.path, f"damaged: a chunk at byte {offset} of {file.size}")
    data_size, kind = _CHUNK.unpack(_plain(reader, file, offset, _CHUNK.size))[1:4:2]
    if kind not in (_SIMPLE, ord("t")) or data_size > file.size:
        raise RecordError(file.path, f"not a whole ArrayRecord file: no chunk at byte {offset}")
    return _decode(file, offset, _plain(reader, file, offset, _CHUNK.size + data_size))


def _decode(file: File, offset: int, chunk: bytes) -> tuple[bytes, np.ndarray, bool]:
    """(values, size of each record in them, whether it was compressed) of a simple chunk of any number of records."""
    _, data_size, _, kind, records, decoded = _CHUNK.unpack_from(chunk)
    data = memoryview(chunk)[_CHUNK.size : _CHUNK.size + data_size]
    if kind == ord("t"):
        raise Unreadable(f"{file.path}: its records are transposed")
    if kind != _SIMPLE or len(data) != data_size or not data_size:
        raise RecordError(file.path, f"damaged: no chunk at byte {offset}")
    length, at = _first_varint(data, 1)
    try:
        sizes = _varints(_decompress(data[0], data[at : at + length]))
        values = _decompress(data[0], data[at + length :], decoded)
    except (ValueError, OSError) as e:  # pyarrow's
        raise RecordError(file.path, f"damaged: the chunk at byte {offset} cannot be decompressed ({e})") from e
    if len(sizes) != int.from_bytes(records, "little") or sizes.sum() != len(values) or len(values) != decoded:
        raise RecordError(file.path, f"damaged: the chunk at byte {offset} contradicts itself")
    return values, sizes, data[0] != _UNCOMPRESSED


def _decompress(kind: int, data: memoryview, expected: int | None = None) -> bytes:
    if kind == _UNCOMPRESSED:
        return bytes(data)
    if kind not in _CODECS:
        raise ValueError(f"compression {kind}")
    import pyarrow

    size, at = _first_varint(data, 0)
    if expected not in (None, size) or size > min((len(data) << 10) + (1 << 16), _MOST_DECODED):
        raise ValueError(f"a decompressed size of {size}")
    return pyarrow.Codec(_CODECS[kind]).decompress(data[at:], size, asbytes=True) if size else b""


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _first_varint(data: memoryview, at: int) -> tuple[int, int]:
    """(value, where it ends) of the varint at `at`; 0 where there is none."""
    found = _varints(bytes(data[at : at + 10]), whole=False)
    value = int(found[0]) if len(found) else 0
    return value, at + len(_varint(value))


def _varints(data: bytes, whole: bool = True) -> np.ndarray:
    """Every varint (uint64) of a stretch of them. whole: whether the last one must be complete."""
    b = np.frombuffer(data, np.uint8)
    last = np.flatnonzero(b < 0x80)
    if not len(last) or (whole and last[-1] != len(b) - 1):
        return np.zeros(0, np.uint64)
    starts = np.concatenate([[0], last[:-1] + 1])
    b = b[: last[-1] + 1]
    place = np.arange(len(b)) - np.repeat(starts, last - starts + 1)
    return np.add.reduceat((b & 0x7F).astype(np.uint64) << (7 * place).astype(np.uint64), starts)
