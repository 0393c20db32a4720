"""Names, sizes and error messages of the zoo."""

import jax
import jax.numpy as jnp
import pytest

from eupe_jax.models import zoo

# exact parameter counts of the published models, and of the proxy shape chosen here; the Perception Encoder's are in
# its own tests
PARAMETERS = {
    "eupe_vitt16": 5_492_160,
    "eupe_vits16": 21_601_152,
    "eupe_vitb16": 85_669_632,
    "dinov3_vits16": 21_601_152,
    "dinov3_vits16plus": 28_697_472,
    "dinov3_vitb16": 85_669_632,
    "dinov3_vitl16": 303_154_176,
    "dinov3_vith16plus": 840_633_600,
    "dinov3_vit7b16": 6_716_043_264,
    "eupe_proxy": 1_850_601_472,
    "eupe_convnext_tiny": 27_820_128,
    "eupe_convnext_small": 49_454_688,
    "eupe_convnext_base": 87_566_464,
    "dinov3_convnext_tiny": 27_820_128,
    "dinov3_convnext_small": 49_454_688,
    "dinov3_convnext_base": 87_566_464,
    "dinov3_convnext_large": 196_230_336,
    "siglip2_base_patch32_256": 94_552_320,
    "siglip2_base_patch16_224": 92_884_224,
    "siglip2_base_patch16_256": 92_930_304,
    "siglip2_base_patch16_384": 93_176_064,
    "siglip2_base_patch16_512": 93_520_128,
    "siglip2_large_patch16_256": 315_956_224,
    "siglip2_large_patch16_384": 316_283_904,
    "siglip2_large_patch16_512": 316_742_656,
    "siglip2_so400m_patch14_224": 427_680_704,
    "siglip2_so400m_patch14_384": 428_225_600,
    "siglip2_so400m_patch16_256": 427_888_064,
    "siglip2_so400m_patch16_384": 428_256_704,
    "siglip2_so400m_patch16_512": 428_772_800,
    "siglip2_giant_opt_patch16_256": 1_163_168_256,
    "siglip2_giant_opt_patch16_384": 1_163_659_776,
    "radio_v2_5_b": 98_233_344,
    "radio_v2_5_l": 319_881_216,
    "radio_v2_5_h": 651_642_880,
    "dune_vits14_336": 21_753_600,
    "dune_vits14_448": 21_925_632,
    "dune_vitb14_336": 85_974_528,
    "dune_vitb14_448": 86_318_592,
    "dune_vitb14_448_paper": 86_318_592,
}


def abstract(name):
    spec = zoo.spec(name)
    image = jnp.zeros((1, spec.resolution, spec.resolution, 3))
    return jax.eval_shape(lambda key: zoo.build(name).init_with_output(key, image), jax.random.key(0))


def test_every_encoder_has_a_known_size():
    assert {n for n in zoo.names() if zoo.spec(n).family != "perception_encoder"} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count_is_exact(name):
    _, variables = abstract(name)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == PARAMETERS[name]


@pytest.mark.parametrize("name", zoo.names())
def test_spec_describes_what_the_encoder_returns(name):
    spec = zoo.spec(name)
    out, _ = abstract(name)
    side = spec.resolution // spec.patch_size
    assert (out["cls"].shape if spec.cls_dim else out.get("cls")) == ((1, spec.cls_dim) if spec.cls_dim else None)
    assert out["storage"].shape == (1, spec.num_storage_tokens, spec.patch_dim)
    assert out["patches"].shape == (1, side, side, spec.patch_dim)
    assert len(spec.mean) == len(spec.std) == 3
    assert (spec.hub_repo is None) == (name == "eupe_proxy") and (spec.licence or name == "eupe_proxy")


def test_overrides_reach_module_and_widths():
    spec = zoo.spec("eupe_vitb16", embed_dim=96, num_storage_tokens=1)
    assert (spec.cls_dim, spec.patch_dim, spec.num_storage_tokens, spec.kwargs["embed_dim"]) == (96, 96, 1, 96)
    assert zoo.build("eupe_vitb16", dtype=jnp.bfloat16, depth=2).depth == 2
    assert zoo.spec("eupe_vitb16").kwargs["embed_dim"] == 768
    assert zoo.spec("eupe_convnext_tiny", dims=(4, 4, 4, 8)).patch_dim == 8
    for name in ("pe_core_b16_224", "siglip2_base_patch16_224", "dune_vitb14_336"):
        assert zoo.spec(name, patch_size=16, image_size=480).resolution == 480


def test_unknown_names_point_to_near_ones():
    with pytest.raises(ValueError, match="'eupe_vit16'.*eupe_vitt16"):
        zoo.build("eupe_vit16")
    with pytest.raises(ValueError, match="'qqq'.*known are.*eupe_proxy"):
        zoo.spec("qqq")
    with pytest.raises(ValueError, match="'embed_dims'.*embed_dim"):
        zoo.build("eupe_vitt16", embed_dims=3)


def test_unknown_feed_forward_is_named():
    with pytest.raises(ValueError, match="'glu'"):
        zoo.build("eupe_vitt16", ffn_layer="glu", depth=1).init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
