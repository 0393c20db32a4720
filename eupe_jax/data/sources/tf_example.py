"""One feature of a serialised tf.train.Example, without TensorFlow.

Messages (tensorflow/core/example/{example,feature}.proto): Example {1: Features}, Features {1: repeated entry},
entry {1: name, 2: Feature}, Feature {1: BytesList, 2: FloatList, 3: Int64List}, BytesList {1: repeated bytes}.
"""

from collections.abc import Iterator


def bytes_feature(example: bytes, name: str) -> bytes:
    """The bytes of a feature that holds exactly one value. Raises ValueError, with the names that there are."""
    names = []
    for features in _fields(example, 1):
        for entry in _fields(features, 1):
            key = b"".join(_fields(entry, 1)).decode("utf-8", "replace")
            names.append(key)
            if key == name:
                values = [
                    v for feature in _fields(entry, 2) for lists in _fields(feature, 1) for v in _fields(lists, 1)
                ]
                if len(values) != 1:
                    raise ValueError(f"feature {name!r} holds {len(values)} byte strings, not one")
                return bytes(values[0])
    raise ValueError(f"no feature {name!r}, only {sorted(names)}")


def _fields(message: bytes | memoryview, number: int) -> Iterator[memoryview]:
    """The length-delimited fields of that number. Raises ValueError for what is no message."""
    view, at = memoryview(message), 0
    while at < len(view):
        tag, at = _varint(view, at)
        kind = tag & 7
        if kind == 0:
            _, at = _varint(view, at)
            continue
        if kind not in (1, 2, 5):
            raise ValueError("not a tf.train.Example")
        size, at = _varint(view, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        if at + size > len(view):
            raise ValueError("not a tf.train.Example")
        if kind == 2 and tag >> 3 == number:
            yield view[at : at + size]
        at += size


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(view):
            break
        byte = view[at]
        value, at = value | (byte & 0x7F) << shift, at + 1
        if byte < 0x80:
            return value, at
    raise ValueError("not a tf.train.Example")
