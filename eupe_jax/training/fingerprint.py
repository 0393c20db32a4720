"""A short fingerprint of a tree of parameters, the same on every mesh.

Integer sums wrap and commute, so the value does not depend on how arrays are cut or in what order devices add. It
tells different weights apart; it is no defence against somebody who wants a collision.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp

from eupe_jax.sharding.rules import path_name


def digest(x: jax.Array) -> jax.Array:
    """uint32 []: of every bit of an array and where it stands; types of 1, 2 and 4 bytes."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    # mix value and position so that permuted or shifted weights differ (constants: MurmurHash3's finaliser)
    h = bits ^ (position * jnp.uint32(0x9E3779B1))
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)


@jax.jit
def _digests(leaves: list[jax.Array]) -> list[jax.Array]:
    return [digest(leaf) for leaf in leaves]


def fingerprint(tree: Any) -> str:
    """16 hexadecimal digits for a tree of arrays: paths, shapes, types and every bit count."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    leaves = [jnp.asarray(leaf) for _, leaf in paths]
    digests = jax.device_get(_digests(leaves))
    names = [f"{path_name(path)} {leaf.shape} {leaf.dtype}" for (path, _), leaf in zip(paths, leaves, strict=True)]
    text = [f"{name} {int(digest)}" for name, digest in zip(names, digests, strict=True)]
    return hashlib.sha256("\n".join(sorted(text)).encode()).hexdigest()[:16]
