"""How one entry of a feature cache is stored: named arrays in one checked record, features in two bytes or in one.

Precisions of features:
  "bf16": bfloat16, 8 significant bits: a value is off by at most 2^-8 of itself.
  "int8": patch tokens as whole numbers in [-127, 127] times one float32 scale a channel and entry: 1/127 of the largest
    magnitude that the channel has in this view. A value is off by at most 1/254 of that magnitude. A class token has
    one value a channel, so a scale a channel would be all of it; it stays bfloat16.
"""

import json
import math
import struct
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from eupe_jax.data.sources.record_codec import pack_record, unpack_record

PRECISIONS = ("bf16", "int8")

_BF16 = np.dtype(ml_dtypes.bfloat16)
_DTYPES = {d.name: d for d in map(np.dtype, ("uint8", "int8", "uint32", "int64", "float32"))} | {"bfloat16": _BF16}
_LENGTH = struct.Struct("<I")


def pack_arrays(name: str, arrays: Mapping[str, np.ndarray]) -> bytes:
    """One record: a JSON list of (name, dtype, shape), then the arrays' bytes, packed and checked like an image.

    Raises:
      ValueError: an array of a type that records do not hold.
    """
    if unknown := {k: v.dtype.name for k, v in arrays.items() if v.dtype.name not in _DTYPES}:
        raise ValueError(f"{name}: records hold arrays of {sorted(_DTYPES)}, not {unknown}")
    header = json.dumps([[k, v.dtype.name, v.shape] for k, v in arrays.items()]).encode()
    return pack_record(name, b"".join([_LENGTH.pack(len(header)), header, *(v.tobytes() for v in arrays.values())]))


def unpack_arrays(record: bytes, where: str = "record") -> dict[str, np.ndarray]:
    """The arrays of a record, read-only views of its bytes.

    where: how errors call the record, e.g. "FILE[17]".
    Raises RecordError (an OSError) when it was damaged, ValueError when it holds something else.
    """
    data = unpack_record(record, where).data
    try:
        (length,) = _LENGTH.unpack_from(data)
        start, arrays = _LENGTH.size + length, {}
        for key, dtype, shape in json.loads(data[_LENGTH.size : start]):
            count = math.prod(shape)
            if count < 0:
                raise ValueError(f"an array of shape {shape}")
            arrays[key] = np.frombuffer(data, _DTYPES[dtype], count, start).reshape(shape)
            start += arrays[key].nbytes
    except (struct.error, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{where}: not a record of arrays ({type(error).__name__}: {error})") from None
    if start != len(data):
        raise ValueError(f"{where}: a record of arrays with {len(data) - start} bytes too many")
    return arrays


def encode_features(name: str, tokens: Mapping[str, np.ndarray], precision: str) -> dict[str, np.ndarray]:
    """What is stored of a teacher's features for b images: {"NAME.cls": [b, Dc], "NAME.patches": [b, h, w, Dp], with
    "int8" also "NAME.patches.scale": [b, Dp]}.

    Raises:
      ValueError: a feature is not finite, or too large for bfloat16.
    """
    stored = {}
    for kind, x in tokens.items():
        x = np.asarray(x, np.float32)
        if not np.all(np.abs(x) <= float(ml_dtypes.finfo(_BF16).max)):  # NaN fails too
            raise ValueError(f"{name}.{kind}: features are not finite (largest magnitude {np.abs(x).max()})")
        if precision == "int8" and kind == "patches":
            scale = np.abs(x).max(axis=(1, 2)) / np.float32(127)
            # A channel that is zero (or too small to divide by) everywhere: any scale gives zero.
            safe = np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)[:, None, None]
            stored[f"{name}.{kind}"] = np.rint(x / safe).astype(np.int8)
            stored[f"{name}.{kind}.scale"] = scale
        else:
            stored[f"{name}.{kind}"] = x.astype(_BF16)
    return stored


def decode_features(key: str, entry: Mapping[str, np.ndarray], out: np.ndarray) -> None:
    """Writes the features that `encode_features` stored under `key` for one image into `out`, float32 [...] as
    they were."""
    if f"{key}.scale" in entry:
        np.multiply(entry[key], entry[f"{key}.scale"], out=out, dtype=np.float32)
    else:
        out[...] = entry[key]
