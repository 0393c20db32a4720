"""XLA's own FLOP count of a few blocks of an encoder, laid out one after another, beside the count from the sizes."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from eupe_jax.models import zoo
from eupe_jax.models.flops import forward_flops

IMAGES = 16  # what is made once for all images (position tables) hardly shows


def block_ratio(entry: ConfigDict, side: int) -> float:
    """XLA's FLOPs of one more block (of each stage) over ours; XLA counts norms, softmax and activations as well.

    XLA counts a loop's body once, whatever its turns: so the blocks are unrolled, and few. Nothing is compiled.
    """
    shallow, deep = (_count(entry, side, depth) for depth in (1, 2))
    return (deep[0] - shallow[0]) / (deep[1] - shallow[1])


def _count(entry: ConfigDict, side: int, depth: int) -> tuple[float, int]:
    """(XLA's, our) FLOPs of one image with `depth` blocks."""
    spec = zoo.spec(entry.model, **entry.overrides)
    few = {"depths": (depth,) * len(spec.kwargs["depths"])} if "depths" in spec.kwargs else {"depth": depth}
    module = zoo.build(entry.model, jnp.bfloat16, **{**entry.overrides, **few, "scan_unroll": depth})
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), image)
    images = jax.ShapeDtypeStruct((IMAGES, side, side, 3), jnp.float32)
    counted = jax.jit(module.apply).lower(variables, images).cost_analysis()["flops"] / IMAGES
    return counted, forward_flops(module, side)
