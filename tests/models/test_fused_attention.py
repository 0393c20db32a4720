"""The fused kernel against the plain path, run as plain operations (interpret mode)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from eupe_jax.models import zoo
from eupe_jax.models.fused_attention import FusedAttention, head_group, permute_columns
from eupe_jax.models.layers import plain_attention
from eupe_jax.models.perception_encoder import NEIGHBOURS
from eupe_jax.models.perception_encoder import rope_table as neighbour_table
from eupe_jax.models.rope import HALVES, patch_coords, rope_periods, rope_table
from eupe_jax.sharding.rules import path_name
from eupe_jax.training.kernels import in_kernel_order

PREFIX = 5


class NoneFits(FusedAttention):
    """As for more tokens than fast memory holds."""

    def fits(self, *_):
        return False


NONE_FITS = NoneFits(permuted=True)


def draw(tokens: int, heads: int, width: int, batch: int = 1, dtype=jnp.float32):
    rng = np.random.default_rng(tokens + heads + width)
    qkv = rng.standard_normal((batch, tokens, 3 * heads * width))
    weights = rng.standard_normal((batch, tokens, heads * width))
    return jnp.asarray(qkv, dtype), jnp.asarray(weights, jnp.float32)


def tables(rotation, tokens: int, width: int):
    if rotation is HALVES:
        return rope_table(jnp.asarray(rope_periods(width)), jnp.asarray(patch_coords(1, tokens - PREFIX)))
    return neighbour_table(1, tokens - PREFIX, width, offset=1)


def plain(qkv, heads: int, rotation, sin, cos):
    batch, tokens, width = qkv.shape
    q, k, v = jnp.moveaxis(qkv.reshape(batch, tokens, 3, heads, -1), 2, 0)
    out = plain_attention(rotation.turn(q, sin, cos), rotation.turn(k, sin, cos), v)
    return out.reshape(batch, tokens, width // 3)


def fused(qkv, heads: int, rotation, sin, cos, **options):
    qkv = permute_columns(qkv, heads, rotation.interleaved)
    return FusedAttention(interpret=True, **options)(qkv, *rotation.half_tables(sin, cos), heads)


def value_and_gradient(function, qkv, weights, *args):
    def loss(x):
        out = function(x, *args).astype(jnp.float32)
        return (out * weights).sum(), out

    gradient, out = jax.jit(jax.grad(loss, has_aux=True))(qkv)
    return out, gradient.astype(jnp.float32)


def largest(a, b) -> float:
    return float(jnp.abs(a - b).max())


def rms(x) -> float:
    return float(jnp.sqrt(jnp.square(x).mean()))


# ViT-T, ViT-S (whole rows), ViT-B, the proxy and PE-G, SigLIP2 so400m (whole rows), RADIO-H
LAYOUTS = [(3, 64), (6, 64), (12, 64), (16, 96), (16, 72), (16, 80)]
QUICK = [(37, 3, 64), (37, 8, 96), (530, 4, 64)]  # whole rows, groups, and blocks of queries
REAL = [(tokens, heads, width) for tokens in (37, 261, 581, 1029) for heads, width in LAYOUTS]


def check(tokens: int, heads: int, width: int, rotation) -> None:
    sin_cos = tables(rotation, tokens, width)
    qkv, weights = draw(tokens, heads, width)
    exact = value_and_gradient(plain, qkv, weights, heads, rotation, *sin_cos)
    ours = value_and_gradient(fused, qkv, weights, heads, rotation, *sin_cos)
    for a, b in zip(ours, exact, strict=True):
        assert largest(a, b) <= 1e-5
    half = qkv.astype(jnp.bfloat16)
    exact = value_and_gradient(plain, half.astype(jnp.float32), weights, heads, rotation, *sin_cos)
    usual = value_and_gradient(plain, half, weights, heads, rotation, *sin_cos)
    ours = value_and_gradient(fused, half, weights, heads, rotation, *sin_cos)
    # The gradient of the logits goes through the products in bfloat16, as on a TPU; the plain path's, here, in float32.
    for a, b, reference, allowed in zip(ours, usual, exact, (1.0, 1.1), strict=True):
        assert rms(a - reference) <= allowed * rms(b - reference)


@pytest.mark.parametrize("tokens, heads, width", QUICK)
def test_agrees_with_the_plain_path(tokens, heads, width):
    check(tokens, heads, width, HALVES)


@pytest.mark.slow
@pytest.mark.parametrize("rotation", [HALVES, NEIGHBOURS], ids=["halves", "neighbours"])
@pytest.mark.parametrize("tokens, heads, width", REAL)
def test_agrees_with_the_plain_path_at_real_sizes(tokens, heads, width, rotation):
    check(tokens, heads, width, rotation)


def test_what_fits_fast_memory_depends_on_the_dtype():
    attend = FusedAttention()
    for heads, width in ((12, 64), (16, 80), (16, 96)):
        half, single = (
            max(tokens for tokens in range(64, 8192, 8) if attend.fits(heads, width, tokens, dtype))
            for dtype in ("bfloat16", "float32")
        )
        assert 700 < single < half / 1.3
    assert not attend.fits(12, 63, 64, "bfloat16")


def test_groups_of_heads_fill_lanes():
    assert [head_group(h, w) for h, w in LAYOUTS] == [None, None, 4, 8, None, 16]


def test_permuted_columns_hold_every_column_once():
    for interleaved in (False, True):
        columns = np.asarray(permute_columns(jnp.arange(3 * 6 * 8), 6, interleaved))
        assert sorted(columns) == list(range(3 * 6 * 8))
        assert list(columns[:3]) == ([0, 2, 4] if interleaved else [0, 1, 2])
        np.testing.assert_array_equal(columns[2 * 6 * 8 :], np.arange(2 * 6 * 8, 3 * 6 * 8))


def test_batch_over_devices_gives_the_same():
    qkv, weights = draw(9, 4, 64, batch=8)
    sin_cos = tables(HALVES, 9, 64)
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    alone = value_and_gradient(fused, qkv, weights, 4, HALVES, *sin_cos)
    together = value_and_gradient(lambda x, *args: fused(x, *args, mesh=mesh), qkv, weights, 4, HALVES, *sin_cos)
    for a, b in zip(together, alone, strict=True):
        assert largest(a, b) <= 1e-6


@pytest.mark.parametrize(
    "name, options",
    [
        ("eupe_vitt16", {"embed_dim": 96, "depth": 2, "num_heads": 3}),
        ("pe_core_t16_384", {"width": 96, "depth": 2, "num_heads": 3, "mlp_dim": 64, "pool_heads": 2}),
        ("siglip2_base_patch16_256", {"width": 96, "depth": 2, "num_heads": 3, "mlp_dim": 64}),
    ],
)
def test_encoders_take_it(name, options):
    """Rotation by halves, by neighbours, and none; parameters are those of the plain path, or theirs permuted once."""
    side = 2 * zoo.spec(name).patch_size
    if name.startswith("siglip"):
        side = zoo.spec(name).resolution
    images = jnp.asarray(np.random.default_rng(0).standard_normal((1, side, side, 3)), jnp.float32)
    usual = zoo.build(name, **options)
    variables = jax.jit(usual.init)(jax.random.key(0), images)
    expected = jax.jit(usual.apply)(variables, images)
    frozen = zoo.build(name, **options, attention_fn=FusedAttention(interpret=True, permuted=True))
    reordered = in_kernel_order(frozen, variables)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), variables, reordered)
    assert [path_name(p) for p, c in jax.tree_util.tree_leaves_with_path(changed) if c] == [
        "params/blocks/attn/qkv/kernel"  # biases are zero in new models
    ]
    usual_order, kernel_order = (FusedAttention(interpret=True), variables), (frozen.attention_fn, reordered)
    for attend, given in (usual_order, kernel_order, (NONE_FITS, reordered)):
        ours = jax.jit(zoo.build(name, **options, attention_fn=attend).apply)(given, images)
        for kind, value in expected.items():
            assert not value.size or largest(ours[kind], value) <= 2e-5, (attend, kind)
