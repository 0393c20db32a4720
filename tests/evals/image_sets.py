"""Small labelled image sets in the layouts that evaluations read."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("disc", "stripes", "plain")


def picture(label: int, seed: int, size: tuple[int, int] = (40, 36)) -> Image.Image:
    """A noisy picture whose class shows: a bright disc, stripes or a flat grey."""
    rng = np.random.default_rng([label, seed])
    width, height = size
    y, x = np.mgrid[:height, :width]
    base = rng.integers(40, 90)
    shapes = (
        np.where((x - width / 2) ** 2 + (y - height / 2) ** 2 < (min(size) / 3) ** 2, 220, base),
        np.where((x // 4) % 2 == 0, 200, base),
        np.full((height, width), 2 * base),
    )
    pixels = shapes[label][..., None] + rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def jpeg(image: Image.Image) -> bytes:
    """The picture as bytes of a JPEG file."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """An uncompressed tar file of these members."""
    with tarfile.open(path, "w:") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def samples(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    """Members of a shard: KEY.jpg and KEY.cls in turns, the classes one after another."""
    members = []
    for i in range(first, first + count):
        key = f"picture_{i:04d}"
        members += [(f"{key}.jpg", jpeg(picture(i % 3, i))), (f"{key}.cls", CLASSES[i % 3].encode())]
    return members


def write_shards(folder: Path, train: int = 12, test: int = 6) -> Path:
    """A set of tar shards: two of training images and one of test images."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    write_tar(folder / "train-000000.tar", samples(train // 2))
    write_tar(folder / "train-000001.tar", samples(train - train // 2, train // 2))
    write_tar(folder / "test-000000.tar", samples(test, 1000))
    return folder


def write_folders(folder: Path, train: int = 9, val: int = 3) -> Path:
    """The same kind of pictures as a folder a class."""
    for split, count, first in (("train", train, 0), ("val", val, 1000)):
        for i in range(first, first + count):
            path = folder / split / CLASSES[i % 3] / f"{i:04d}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(picture(i % 3, i)))
    return folder
