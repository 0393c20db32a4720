"""How to feed a program: the same facts as JSON beside it and as constant methods inside it."""

from collections.abc import Iterable, Mapping
from typing import Any

from convert import weights
from eupe_jax.training.encoders import LoadedEncoder

FORMAT = "eupe_jax.pte/2"
INSIDE = (
    "format", "model", "weights_sha256", "licence", "precision", "backend", "input_dtype", "pixels", "mean", "std",
    "token_layout", "outputs", "patch_size", "num_storage_tokens",
)  # fmt: skip

Size = int | tuple[int, int]


def sides(size: Size) -> tuple[int, int]:
    """(height, width) of a size given as one side or as both."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def method_name(height: int, width: int) -> str:
    """encode_256 for squares, encode_256x320 (height first) for others."""
    return f"encode_{height}" if height == width else f"encode_{height}x{width}"


def parse_sizes(text: str) -> list[Size]:
    """Sizes from "256", "256,384,512" or "256x320" (height first).

    Raises:
      ValueError: anything else.
    """
    found: list[Size] = []
    for part in text.lower().split(","):
        numbers = part.strip().split("x")
        if len(numbers) > 2 or not all(n.isdecimal() for n in numbers):
            raise ValueError(f"--resolution {text}: give sides in pixels, such as 256, 256,384,512 or 256x320")
        found.append(int(numbers[0]) if len(numbers) == 1 else (int(numbers[0]), int(numbers[1])))
    return found


def require_distinct(sizes: Iterable[tuple[int, int]]) -> None:
    """Raises ValueError for a size that is given twice."""
    names = [method_name(*size) for size in sizes]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"resolution {name.removeprefix('encode_')} is given more than once")


def describe(encoder: LoadedEncoder, backend: str, precision: str, uint8_input: bool) -> dict[str, Any]:
    """What holds for every method of a program."""
    report = weights.describe(encoder) | {"format": FORMAT, "backend": backend, "precision": precision}
    report["input_dtype"] = "uint8" if uint8_input else "float32"
    if uint8_input:
        report["pixels"] = "RGB of 0 to 255; mean and std are inside the program"
    return report


def constants(report: Mapping[str, Any], sizes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Constant methods, name -> value. Lists become several outputs: `resolution` gives the height and width of every
    method, in the order of `methods`."""
    found = {name: report[name] for name in INSIDE}
    found["mean"], found["std"] = ([float(v) for v in report[name]] for name in ("mean", "std"))
    found["methods"] = list(sizes)
    found["resolution"] = [side for size in sizes.values() for side in size]
    return found
