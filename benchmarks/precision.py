"""How far bfloat16 compute moves the features of each family of encoders: cosine to float32 compute, same weights.

python benchmarks/precision.py [--models NAME ...] [--images FOLDER] [--json FILE]

Norms, RoPE, softmax, LayerScale and the residual stream are float32 either way; matrix products, their biases and
activations change (eupe_jax/models/layers.py). Weights are random at a scale where every part of every block counts
(fan-in kernels, LayerScale, biases and norms off their initial values): published weights are not included here.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from convert import gates
from eupe_jax.models import zoo

MODELS = (
    "eupe_vitb16",
    "dinov3_vits16plus",
    "eupe_convnext_base",
    "pe_core_b16_224",
    "pe_lang_l14_448",
    "siglip2_base_patch16_256",
    "radio_v2_5_b",
    "dune_vitb14_448",
)


def random_variables(module, side: int):
    """Variables of which every leaf is random, kernels scaled by their fan-in."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        part = path[-1].key
        stacked = any(str(p.key).startswith(("blocks", "stages")) for p in path[:-1])
        fan_in = np.prod(leaf.shape[1 if stacked else 0 : -1])
        scale = fan_in**-0.5 if part in ("kernel", "proj") else 0.1
        mean = {"scale": 1.0, "gamma": 0.5}.get(part, 0.0)
        return np.float32(mean + scale * rng.standard_normal(leaf.shape, np.float32))

    return jax.tree_util.tree_map_with_path(draw, shapes["params"])


def compare(name: str, images_NxSxSx3: np.ndarray) -> dict:
    """Smallest and mean cosine between float32 and bfloat16 compute, per kind of token."""
    spec = zoo.spec(name)
    pixels = (images_NxSxSx3 / np.float32(255) - np.float32(spec.mean)) / np.float32(spec.std)
    modules = {dtype: zoo.build(name, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16)}
    params = random_variables(modules[jnp.float32], spec.resolution)
    buffers = jax.eval_shape(modules[jnp.float32].init, jax.random.key(0), pixels[:1]).get("buffers")
    variables = {"params": params}
    if buffers:
        side = spec.patch_size
        start = jax.jit(modules[jnp.float32].init)(jax.random.key(0), jnp.zeros((1, side, side, 3)))
        variables["buffers"] = start["buffers"]
    with jax.default_matmul_precision("highest"):
        exact, rounded = (jax.jit(m.apply)(variables, pixels) for m in modules.values())
    row = {"model": name, "family": spec.family, "resolution": images_NxSxSx3.shape[1]}
    for kind in ("cls", "patches"):
        if kind in exact:
            a, b = (np.asarray(x[kind], np.float64) for x in (exact, rounded))
            cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
            row |= {f"{kind}_mean": float(cosine.mean()), f"{kind}_min": float(cosine.min())}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="zoo names")
    parser.add_argument("--images", metavar="FOLDER", help="photographs (default: scikit-image's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    args = parser.parse_args()
    rows = []
    for name in args.models:
        side = zoo.spec(name).resolution
        rows.append(compare(name, gates.load_images(args.images, side, side)))
        figures = "   ".join(f"{k} {v:.6f}" for k, v in rows[-1].items() if k.endswith(("_mean", "_min")))
        print(f"{name:<24} {side:>4} px   {figures}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
