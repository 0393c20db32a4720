"""Small encoders whose every parameter matters: no zero bias, no unit norm, LayerScale around 0.5."""

from pathlib import Path

import jax
import numpy as np
import pytest

from eupe_jax.models import zoo
from eupe_jax.training.encoders import LoadedEncoder

VIT = {"embed_dim": 64, "depth": 2, "num_heads": 2}
CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64)}


def make_encoder(name: str, overrides: dict, seed: int = 0, resolution: int = 64) -> LoadedEncoder:
    module = zoo.build(name, **overrides)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), image)
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        last = path[-1].key
        if last == "rope_periods":
            # not quite what a module would compute: must be carried over
            return np.float32(1.01 * 100 ** (np.arange(leaf.size) / leaf.size))
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        centre, scale = {"gamma": (0.5, 0.2), "scale": (1, 0.2), "bias": (0, 0.3)}.get(last, (0, 0))
        if not scale:
            scale = 1.0 if "token" in last else np.prod(leaf.shape[-leaf.ndim : -1][-3:]) ** -0.5
        return np.float32(centre + scale * noise)

    variables = jax.tree_util.tree_map_with_path(fill, variables)
    spec = zoo.spec(name)
    manifest = {"model": name, "overrides": overrides, "resolution": resolution}
    manifest |= {"mean": list(spec.mean), "std": list(spec.std)}
    return LoadedEncoder(name, overrides, module, variables, manifest)


@pytest.fixture(scope="session")
def vit() -> LoadedEncoder:
    return make_encoder("eupe_vitt16", VIT)


@pytest.fixture(scope="session")
def convnext() -> LoadedEncoder:
    return make_encoder("eupe_convnext_tiny", CONVNEXT)


@pytest.fixture(params=["vit", "convnext"])
def encoder(request) -> LoadedEncoder:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    """A folder of two photograph-like images: smooth colour with edges, different sizes."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("photographs")
    for i, (h, w) in enumerate([(90, 120), (128, 70)]):
        y, x = np.mgrid[:h, :w]
        tiles = 20 * ((x // 16 + y // 9) % 2)
        channels = [128 + 100 * np.sin(x / (7 + c + i)) * np.cos(y / (11 - c)) + tiles for c in range(3)]
        Image.fromarray(np.stack(channels, -1).clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return folder
