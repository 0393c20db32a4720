"""FLOPs from the architecture against XLA's own count of the same program, and against published figures."""

import jax
import jax.numpy as jnp
import pytest

from eupe_jax.models import zoo
from eupe_jax.models.flops import forward_flops, taps

# XLA counts norms, activations, softmax and rotations as well.
ELEMENTWISE = 0.06

SHALLOW = {
    "eupe_vitb16": {"depth": 2},
    "dinov3_vith16plus": {"depth": 1},
    "eupe_convnext_base": {"depths": (1, 1, 2, 1)},
    "pe_core_b16_224": {"depth": 1, "cls_output": "proj"},
    "siglip2_base_patch16_224": {"depth": 1},
    "radio_v2_5_b": {"depth": 1},
    "dune_vits14_336": {"depth": 1},
}


@pytest.mark.parametrize("name", SHALLOW)
def test_equals_xlas_count(name):
    """Real widths, few blocks, side by side: XLA counts the body of a loop once. Nothing is compiled or allocated."""
    side, batch = zoo.spec(name).resolution, 64  # many images: position tables are made once for all of them
    module = zoo.build(name, scan_unroll=8, **SHALLOW[name])
    images = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))
    counted = jax.jit(module.apply).lower(variables, images).cost_analysis()["flops"] / batch
    ours = forward_flops(module, side)
    assert ours <= counted <= (1 + ELEMENTWISE) * ours, (ours, counted, counted / ours)


@pytest.mark.parametrize(
    ("name", "at_256", "at_512"),
    # EUPE table 11 for ViTs in GFLOPs. Its ViT-T figures (4, 17) fit no count of that shape at these two sizes; its
    # ConvNeXt figures are multiply-adds.
    [("eupe_vits16", 12, 63), ("eupe_vitb16", 47, 216), ("dinov3_vitl16", 163, 721)],
)
def test_agrees_with_the_published_figures(name, at_256, at_512):
    for side, published in ((256, at_256), (512, at_512)):
        assert forward_flops(zoo.build(name), side) / 1e9 == pytest.approx(published, rel=0.015, abs=0.5)


@pytest.mark.parametrize(("size", "at_256"), [("tiny", 5), ("small", 11), ("base", 20)])
def test_published_convnext_figures_are_multiply_adds(size, at_256):
    assert forward_flops(zoo.build(f"eupe_convnext_{size}"), 256) / 2e9 == pytest.approx(at_256, rel=0.02, abs=0.9)


def test_border_taps_multiply_nothing():
    assert taps(8, 7) == 8 * 7 - 2 * (3 + 2 + 1)
    assert taps(1, 7) == 1
    assert taps(2, 7) == 4


def test_every_encoder_of_the_zoo_is_counted():
    for name in zoo.names():
        assert forward_flops(zoo.build(name), zoo.spec(name).resolution) > 1e9


def test_an_unknown_module_is_refused():
    with pytest.raises(ValueError, match="no FLOPs are known for Dense"):
        forward_flops(zoo.nn.Dense(3), 224)
