"""ArrayRecord shards by byte ranges: where each record lies, and its bytes, from a disk or a bucket alike.

Only for shards written with group_size:1 and without compression, where a record is a stretch of the file. Format
(github.com/google/riegeli, doc/riegeli_records_file_format.md; github.com/google/array_record, cpp/layout.proto): the
file is cut into blocks of 64 KiB, each with a header of 24 bytes at its start, which lies across whatever is there. A
chunk is a header of 40 bytes (hash, data size, data hash, type and number of records, decoded size) and its data; data
of simple chunks are the compression type, the length of the sizes, the sizes, and the values of the records. The last
block holds a postscript that tells where the footer is, and the footer the offset and size of every chunk. Riegeli's
hashes are not checked here; sizes are, against each other, and packed records have a checksum of their own.
"""

import struct

import numpy as np

from eupe_jax.data.sources.base import RecordError
from eupe_jax.data.sources.storage import File, RangeReader

# Where the chunk of each record begins, and the size of the record.
ROW = np.dtype([("offset", "<u8"), ("size", "<u8")])

_BLOCK, _BLOCK_HEADER = 1 << 16, 24
_CHUNK = struct.Struct("<QQQB7sQ")
_SIMPLE, _UNCOMPRESSED = ord("r"), 0
_MAGIC = 0x71930E704FDAE05E


class NotPlain(ValueError):
    """A shard whose records are grouped or compressed."""


def record_table(file: File, reader: RangeReader) -> np.ndarray:
    """[N] rows `ROW`, one a record.

    Raises NotPlain for a shard that only array_record's own reader reads, RecordError for one that is cut off or
    damaged.
    """
    if file.size < 2 * _BLOCK or file.size % _BLOCK:
        raise RecordError(file.path, f"not a whole ArrayRecord file: {file.size} bytes are no multiple of 64 KiB")
    values, _ = _simple_chunk(file, reader, file.size - _BLOCK)
    fields = _varints(values)
    if len(fields) < 4 or fields[3] != _MAGIC:
        raise RecordError(file.path, "not a whole ArrayRecord file: its last block is no postscript")
    values, sizes = _simple_chunk(file, reader, int(fields[1]))
    # First what holds for all (its size comes first), then three fields of one tag byte each for every chunk.
    rows = _varints(values[int(sizes[0]) :])
    if len(rows) != 6 * (len(sizes) - 1) or np.any(rows.reshape(-1, 6)[:, ::2] != [0x08, 0x10, 0x18]):
        raise RecordError(file.path, "damaged: its footer does not list its chunks")
    _, offsets, _, decoded, _, records = rows.reshape(-1, 6).T
    if np.any(records != 1):
        raise NotPlain(f"{file.path}: its records lie in groups")
    table = np.zeros(len(offsets), ROW)
    table["offset"], table["size"] = offsets, decoded
    if len(table):
        read_record(file, reader, table[0])  # says whether records are compressed
    return table


def read_record(file: File, reader: RangeReader, row: np.void) -> bytes:
    """The record of one row of `record_table`. Raises RecordError when it is not there."""
    offset, size = int(row["offset"]), int(row["size"])
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
    """`size` bytes from `offset` on, with the headers of blocks taken out."""
    # The header of the block in which the first byte lies counts only if that byte is its first.
    first = -(-offset // _BLOCK) * _BLOCK
    end, headers = offset + size, 0
    while first + headers * _BLOCK < end + headers * _BLOCK_HEADER:
        headers += 1
    raw = reader.read(file, offset, size + headers * _BLOCK_HEADER)
    cuts = [first - offset + i * _BLOCK for i in range(headers)]
    starts = [0] + [cut + _BLOCK_HEADER for cut in cuts]
    return b"".join(raw[a:b] for a, b in zip(starts, [*cuts, len(raw)], strict=True))


def _simple_chunk(file: File, reader: RangeReader, offset: int) -> tuple[bytes, np.ndarray]:
    """(values, size of each record in them) of an uncompressed simple chunk of any number of records."""
    if not 0 < offset < file.size:
        raise RecordError(file.path, f"damaged: a chunk at byte {offset} of {file.size}")
    header = _CHUNK.unpack(_plain(reader, file, offset, _CHUNK.size))
    _, data_size, _, kind, records, decoded = header
    if kind != _SIMPLE or data_size > file.size:
        raise RecordError(file.path, f"not a whole ArrayRecord file: no chunk at byte {offset}")
    data = _plain(reader, file, offset, _CHUNK.size + data_size)[_CHUNK.size :]
    if data[:1] != bytes([_UNCOMPRESSED]):
        raise NotPlain(f"{file.path}: its footer is compressed")
    (length, *_), begin = _varints(data[1:11], whole=False), 1
    begin += len(_varint(int(length)))
    sizes = _varints(data[begin : begin + int(length)])
    values = data[begin + int(length) :]
    if len(sizes) != int.from_bytes(records, "little") or sizes.sum() != len(values) or len(values) != decoded:
        raise RecordError(file.path, f"damaged: the chunk at byte {offset} contradicts itself")
    return values, sizes


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


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
