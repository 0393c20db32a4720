"""A small ONNX file, written without the onnx package."""

import struct
from pathlib import Path


def field(number: int, payload: bytes | int | str) -> bytes:
    """One protocol-buffer field; nodes, values and files are made of them."""

    def varint(n: int) -> bytes:
        return bytes([n]) if n < 128 else bytes([n % 128 + 128]) + varint(n // 128)

    if isinstance(payload, int):
        return varint(number * 8) + varint(payload)
    payload = payload.encode() if isinstance(payload, str) else payload
    return varint(number * 8 + 2) + varint(len(payload)) + payload


def node(op: str, inputs: list[str], output: str, **ints) -> bytes:
    """A node of a graph with one output; its attributes are integers, or lists of them."""
    out = b"".join(field(1, i) for i in inputs) + field(2, output) + field(4, op)
    for key, held in ints.items():
        body = field(3, held) if isinstance(held, int) else b"".join(field(8, v) for v in held)
        out += field(5, field(1, key) + body + field(20, 2 if isinstance(held, int) else 7))
    return field(1, out)


def value(name: str, dims: list[str | int]) -> bytes:
    """What a graph says of a float32 input or output."""
    shape = b"".join(field(1, field(2, d) if isinstance(d, str) else field(1, d)) for d in dims)
    return field(1, name) + field(2, field(1, field(1, 1) + field(2, shape)))


def write(path: Path) -> Path:
    """8x8 cell means of the image as "map" [b, 3, h, w] and, behind one class token, as "tokens" [b, 1 + hw, 3]."""

    def constant(name, *values):
        data = b"".join(struct.pack("<q", v) for v in values)
        return field(5, field(1, len(values)) + field(2, 7) + field(8, name) + field(9, data))

    graph = node("AveragePool", ["image"], "map", kernel_shape=[8, 8], strides=[8, 8])
    graph += node("GlobalAveragePool", ["image"], "pooled") + node("Flatten", ["pooled"], "cls")
    graph += node("Reshape", ["map", "rows"], "flat") + node("Transpose", ["flat"], "patches", perm=[0, 2, 1])
    graph += node("Unsqueeze", ["cls"], "prefix", axes=[1]) + node("Concat", ["prefix", "patches"], "tokens", axis=1)
    graph += field(2, "tiny") + constant("rows", 0, 3, -1) + field(11, value("image", ["b", 3, "h", "w"]))
    graph += field(12, value("tokens", ["b", "n", 3])) + field(12, value("cls", ["b", 3]))
    path.write_bytes(field(1, 7) + field(7, graph) + field(8, field(2, 12)))
    return path
