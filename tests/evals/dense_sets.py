"""Generated data sets in ADE20k's and NYUv2's layouts, and an encoder that a linear head can read them from."""

import hashlib
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from eupe_jax.evals.encoders import FlaxEncoder
from eupe_jax.models import zoo
from eupe_jax.training.encoders import LoadedEncoder

COLOURS = np.array([[30, 30, 30], [220, 40, 40], [40, 200, 60], [60, 80, 230]], np.uint8)  # by raw label; 0 is "other"


def tiny_vit() -> FlaxEncoder:
    """An untrained ViT with patches of 16 pixels."""
    name, overrides = "eupe_vitt16", {"embed_dim": 32, "depth": 1, "num_heads": 2}
    module = zoo.build(name, **overrides)
    variables = jax.jit(module.init)(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    manifest = {"resolution": 64, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    return FlaxEncoder(LoadedEncoder(name, overrides, module, variables, manifest))


class ColourEncoder:
    """Mean colours of patches, their squares and products, as tokens; remembers the keys it was called with.

    stop_after: raise KeyboardInterrupt at the call after so many. square: take squares only.
    """

    name, cls_dim, patch_dim, resolution = "colours", None, 10, 32

    def __init__(self, patch_size: int = 8, stop_after: int | None = None, square: bool = False):
        self.patch_size, self.stop_after, self.square = patch_size, stop_after, square
        self.fingerprint = hashlib.sha256(f"colours {patch_size}".encode()).hexdigest()
        self.keys: list[tuple[int, ...] | None] = []

    def __call__(self, images_BxHxWx3, *, key=None):
        if self.stop_after is not None and len(self.keys) == self.stop_after:
            raise KeyboardInterrupt
        self.keys.append(None if key is None else tuple(jax.random.key_data(key).tolist()))
        b, h, w, _ = images_BxHxWx3.shape
        assert images_BxHxWx3.dtype == np.float32 and images_BxHxWx3.min() >= 0 and images_BxHxWx3.max() <= 1
        assert h % self.patch_size == 0 and w % self.patch_size == 0
        if self.square and h != w:
            raise ValueError(f"{self.name} takes squares only, got {h}x{w}")
        p = self.patch_size
        x = np.asarray(images_BxHxWx3).reshape(b, h // p, p, w // p, p, 3).mean(axis=(2, 4))
        products = [x[..., [0]] * x[..., [1]], x[..., [0]] * x[..., [2]], x[..., [1]] * x[..., [2]]]
        return {"patches": np.concatenate([x, x * x, *products, np.ones_like(x[..., :1])], axis=-1)}


def write_ade(root: Path, train: int = 6, val: int = 3, sizes=((64, 96), (80, 64)), names: bool = True) -> Path:
    """Pictures whose colour is their class, blocks of 16 pixels; two sizes, some pixels without a class."""
    rng = np.random.default_rng(0)
    for split, list_name, count in (("training", "train", train), ("validation", "val", val)):
        lines = []
        for i in range(count):
            height, width = sizes[i % len(sizes)]
            blocks = rng.integers(0, len(COLOURS), (height // 16, width // 16))
            if i == 0:
                blocks.reshape(-1)[: len(COLOURS)] = np.arange(len(COLOURS))
            label = np.kron(blocks, np.ones((16, 16), np.uint8)).astype(np.uint8)
            noise = rng.integers(-20, 21, (*label.shape, 3))
            pixels = np.clip(COLOURS[label].astype(int) + noise, 0, 255).astype(np.uint8)
            stem = f"ADE_{list_name}_{i + 1:08d}"
            for folder, suffix, array in (("images", "jpg", pixels), ("annotations", "png", label)):
                path = root / folder / split / f"{stem}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path, quality=95)
            lines.append(f"{split}/{stem}.jpg")
        (root / f"ADE20K_object150_{list_name}.txt").write_text("\n".join(lines) + "\n")
    if names:
        rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
        rows += [f"{i}\t0.3\t1\t1\t0\t{name}" for i, name in enumerate(("red", "green, grass", "blue"), 1)]
        (root / "objectInfo3.txt").write_text("\n".join(rows) + "\n")
    return root


def write_nyu(root: Path, train: int = 6, test: int = 3, size=(48, 64)) -> Path:
    """Pictures whose brightness says how far away it is, with holes in the depth; the lists as BTS writes them."""
    rng = np.random.default_rng(1)
    height, width = size
    for name, count, slash in (("train", train, "/"), ("test", test, "")):
        lines = []
        for i in range(count):
            low = rng.uniform(0.0, 1.0, (height // 16, width // 16))
            far = np.asarray(Image.fromarray(low.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR))
            pixels = np.repeat((40 + 200 * far)[..., None], 3, axis=-1).round().astype(np.uint8)
            depth = (1000 + 4000 * far).round().astype(np.uint16)
            depth[rng.random(depth.shape) < 0.1] = 0
            scene = root / f"scene_{name}"
            scene.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(scene / f"rgb_{i:05d}.jpg", quality=95)
            Image.fromarray(depth).save(scene / f"sync_depth_{i:05d}.png")
            lines.append(f"{slash}{scene.name}/rgb_{i:05d}.jpg {slash}{scene.name}/sync_depth_{i:05d}.png 518.8579")
        (root / f"nyu_{name}.txt").write_text("\n".join(lines) + "\n")
    return root
