"""One image as one self-describing record: what packed ArrayRecord shards hold.

Layout, little-endian: magic "EUPR", version (uint8), length of the name (uint32), length of the data (uint64), the name
(UTF-8), the data (an image as it was encoded), CRC-32 of everything before it (uint32). A record thus tells its name,
and damage is found when it is read, whatever the container checks.
"""

import struct
import zlib

from eupe_jax.data.sources.base import Record, RecordError

MAGIC = b"EUPR"
VERSION = 1

_HEADER = struct.Struct("<4sBIQ")
_CRC = struct.Struct("<I")


def is_packed(record: bytes) -> bool:
    """Whether a record begins as `pack_record` writes it."""
    return record[: len(MAGIC)] == MAGIC


def pack_record(name: str, data: bytes) -> bytes:
    """The record of one image; the same bytes for the same input."""
    encoded = name.encode("utf-8", "surrogateescape")  # file names may be any bytes
    body = _HEADER.pack(MAGIC, VERSION, len(encoded), len(data)) + encoded + data
    return body + _CRC.pack(zlib.crc32(body))


def unpack_record(record: bytes, where: str = "record") -> Record:
    """The image and its name.

    where: how errors call the record, e.g. "FILE[17]".
    Raises RecordError when it is not such a record or was damaged.
    """
    if not is_packed(record):
        raise RecordError(where, f"not a packed record: it begins with {record[:4]!r}, not {MAGIC!r}")
    if len(record) < _HEADER.size + _CRC.size:
        raise RecordError(where, f"a packed record cut off after {len(record)} bytes")
    _, version, name_length, data_length = _HEADER.unpack_from(record)
    if version != VERSION:
        raise RecordError(where, f"a packed record of version {version}; this code reads version {VERSION}")
    expected = _HEADER.size + name_length + data_length + _CRC.size
    if len(record) != expected:
        raise RecordError(where, f"a packed record of {len(record)} bytes that says it has {expected}")
    body = memoryview(record)[: -_CRC.size]
    if zlib.crc32(body) != _CRC.unpack(record[-_CRC.size :])[0]:
        raise RecordError(where, "a damaged packed record: its checksum does not match")
    start = _HEADER.size + name_length
    return Record(bytes(body[start:]), str(body[_HEADER.size : start], "utf-8", "surrogateescape"))
