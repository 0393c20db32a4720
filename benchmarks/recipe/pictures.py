"""The study's pictures, made once from the folders of --data, whole or not at all.

transfer/   tiny_imagenet_unlabelled and Caltech-101's training images, unlabelled: what is distilled on
heldout/    Caltech-101's test images: per-expert similarity
depth_64/   RGB-D pictures of 128 x 96 pixels, depth_128/ of 256 x 192: a small network's share of a 640 x 480 frame
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from eupe_jax.data.sources import Source, TarShards
from eupe_jax.files import write_whole

SIZES = {64: (128, 96), 128: (256, 192)}  # side that a network is evaluated at -> width and height of RGB-D pictures
LISTS = ("nyu_train.txt", "nyu_test.txt")
DONE = "pictures.json"


@dataclass(frozen=True)
class Folders:
    """Where every task finds its data."""

    transfer: Path
    heldout: Path
    caltech: Path
    camvid: Path
    pairs: Path
    depth: dict[int, Path]


def prepare(data: Path, out: Path) -> Folders:
    """Writes `out` unless it is complete.

    Raises:
      FileNotFoundError: `data` lacks one of its folders.
    """
    names = ("tiny_imagenet_unlabelled", "caltech101", "camvid_like_ade", "pairs_like_spair", "rgbd_like_nyu")
    if missing := [name for name in names if not (data / name).is_dir()]:
        raise FileNotFoundError(f"--data {data} has no folder {', '.join(missing)}")
    if not (out / DONE).exists():
        shutil.rmtree(out, ignore_errors=True)
        sources = {
            "transfer": [data / "tiny_imagenet_unlabelled", *sorted((data / "caltech101").glob("train-*.tar"))],
            "heldout": sorted((data / "caltech101").glob("test-*.tar")),
        }
        counts = {}
        for name, paths in sources.items():
            counts[name] = sum(_unpack(TarShards(path), out / name, f"{i:02d}") for i, path in enumerate(paths))
        for side, size in SIZES.items():
            counts[f"depth_{side}"] = _shrink(data / "rgbd_like_nyu", out / f"depth_{side}", size)
        write_whole(out / DONE, json.dumps(counts, indent=2))
    return Folders(
        out / "transfer",
        out / "heldout",
        data / "caltech101",
        data / "camvid_like_ade",
        data / "pairs_like_spair",
        {side: out / f"depth_{side}" for side in SIZES},
    )


def _unpack(source: Source, folder: Path, prefix: str) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    for i in tqdm(range(len(source)), desc=f"pictures: {folder.name} {prefix}", unit="img"):
        (folder / f"{prefix}_{i:06d}.jpg").write_bytes(source[i].data)
    return len(source)


def _shrink(source: Path, folder: Path, size: tuple[int, int]) -> int:
    """A BTS folder with colour pictures averaged down and depth taken at the pixel's middle; JPEG becomes PNG."""
    count = 0
    for name in LISTS:
        lines = []
        for line in (source / name).read_text().split("\n"):
            if not line.strip():
                continue
            rgb, depth, *focal = line.split()
            rgb, depth = rgb.lstrip("/"), depth.lstrip("/")
            small = str(Path(rgb).with_suffix(".png"))
            for path in (small, depth):
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.open(source / rgb).convert("RGB").resize(size, Image.Resampling.LANCZOS).save(folder / small)
            _nearest(Image.open(source / depth), size).save(folder / depth)
            lines.append(" ".join([small, depth, *focal]))
            count += 1
        write_whole(folder / name, "\n".join(lines) + "\n")
    return count


def _nearest(depth: Image.Image, size: tuple[int, int]) -> Image.Image:
    x = np.asarray(depth)
    rows = ((np.arange(size[1]) + 0.5) * x.shape[0] / size[1]).astype(int)
    columns = ((np.arange(size[0]) + 0.5) * x.shape[1] / size[0]).astype(int)
    return Image.fromarray(x[np.ix_(rows, columns)].astype(np.uint16))
