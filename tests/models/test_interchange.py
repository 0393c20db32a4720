"""Weights to and from the authors' names: exact both ways, and every misfit in one error."""

import logging

import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from eupe_jax.models import interchange, zoo
from eupe_jax.models.interchange import InterchangeError

VIT = {"embed_dim": 8, "depth": 2, "num_heads": 1, "patch_size": 4}
CASES = {
    "vit": ("eupe_vitt16", VIT),
    "vit_7b": ("dinov3_vit7b16", {**VIT, "ffn_ratio": 3.0}),
    "vit_untied": ("dinov3_vits16plus", {**VIT, "untie_cls_and_patch_norms": True}),
    "vit_bare": ("eupe_vitt16", {**VIT, "num_storage_tokens": 0, "layerscale_init": None}),
    "convnext": ("eupe_convnext_tiny", {"depths": (1, 2, 1, 1), "dims": (4, 6, 8, 10)}),
}


def random_state_dict(case, seed=0):
    name, overrides = CASES[case]
    spec = zoo.spec(name, **overrides)
    family = zoo.FAMILIES[spec.family]
    rng = np.random.default_rng(seed)
    weights = {
        key: rng.standard_normal(shape).astype(np.float32)
        for key, shape in interchange.state_dict_shapes(name, **overrides).items()
    }
    official = family.layouts["official"]
    weights.update(official.constants(family.module(**spec.kwargs)))
    weights.update({alias: weights[source] for alias, source in official.aliases.items()})
    return weights


def test_parts_a_model_lacks_have_no_tensors():
    names = interchange.state_dict_shapes("eupe_vitt16", **CASES["vit_bare"][1])
    assert not [n for n in names if "storage" in n or "gamma" in n] and "blocks.1.norm2.bias" in names


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_bit_identical(case):
    name, overrides = CASES[case]
    weights = random_state_dict(case)
    variables = interchange.from_state_dict(name, weights, **overrides)
    back = interchange.to_state_dict(name, variables, **overrides)
    assert back.keys() == weights.keys()
    for key, value in weights.items():
        assert back[key].tobytes() == value.tobytes() and back[key].shape == value.shape, key
    again = interchange.from_state_dict(zoo.spec(name, **overrides), back)
    for path, leaf in traverse_util.flatten_dict(variables).items():
        np.testing.assert_array_equal(traverse_util.flatten_dict(again)[path], leaf)


def test_periods_are_copied_and_masked_bias_is_kept():
    weights = random_state_dict("vit")
    variables = interchange.from_state_dict("eupe_vitt16", weights, **VIT)
    np.testing.assert_array_equal(variables["buffers"]["rope_periods"], weights["rope_embed.periods"])
    bias = variables["params"]["blocks"]["attn"]["qkv"]["bias"]
    np.testing.assert_array_equal(bias[1], weights["blocks.1.attn.qkv.bias"])
    assert np.abs(bias[:, 8:16]).min() > 0


@pytest.mark.parametrize("prefix", ["teacher.", "module.teacher.", "teacher.backbone."])
def test_common_prefixes_are_stripped(prefix):
    weights = random_state_dict("convnext")
    name, overrides = CASES["convnext"]
    plain = interchange.from_state_dict(name, weights, **overrides)
    nested = interchange.from_state_dict(name, {prefix + k: v for k, v in weights.items()}, **overrides)
    np.testing.assert_array_equal(plain["params"]["norm"]["bias"], nested["params"]["norm"]["bias"])


def test_known_extras_are_logged_by_name(caplog):
    weights = {**random_state_dict("vit"), "projectors.0.weight": np.zeros((2, 2), np.float32)}
    with caplog.at_level(logging.WARNING, logger="eupe_jax"):
        interchange.from_state_dict("eupe_vitt16", weights, **VIT)
    assert "projectors.0.weight" in caplog.text


def test_every_misfit_is_in_one_error():
    weights = random_state_dict("vit")
    del weights["norm.bias"]
    weights["mystery"] = np.zeros(3, np.float32)
    weights["cls_token"] = weights["cls_token"][0]
    weights["mask_token"] = weights["mask_token"].astype(np.int32)
    weights["blocks.1.ls1.gamma"] = weights["blocks.1.ls1.gamma"].astype(np.float64)
    weights["blocks.0.attn.qkv.bias_mask"] = np.full(24, np.nan, np.float32)
    with pytest.raises(InterchangeError) as error:
        interchange.from_state_dict("eupe_vitt16", weights, **VIT)
    assert error.value.problems == [
        "cls_token has shape [1, 8], expected [1, 1, 8]",
        "mask_token has dtype int32, expected floating point of at most 32 bits",
        "blocks.1.ls1.gamma has dtype float64, expected floating point of at most 32 bits",
        "missing norm.bias [8]",
        "blocks.0.attn.qkv.bias_mask is not what the architecture fixes",
        "unexpected mystery [3]",
    ]
    assert "eupe_vitt16" in str(error.value) and all(p in str(error.value) for p in error.value.problems)


def test_alias_must_agree_with_its_source():
    weights = random_state_dict("convnext")
    weights["norms.3.bias"] = weights["norms.3.bias"] + 1
    name, overrides = CASES["convnext"]
    with pytest.raises(InterchangeError, match="norms.3.bias is not a copy of norm.bias"):
        interchange.from_state_dict(name, weights, **overrides)
    del weights["norms.3.bias"], weights["norm.weight"]
    with pytest.raises(InterchangeError) as error:
        interchange.from_state_dict(name, weights, **overrides)
    assert error.value.problems == ["missing norm.weight [10]", "missing norms.3.bias [10]"]


def test_export_names_what_does_not_fit():
    variables = interchange.from_state_dict("eupe_vitt16", random_state_dict("vit"), **VIT)
    del variables["params"]["norm"]["scale"]
    variables["params"]["head"] = np.zeros(4)
    variables["params"]["cls_token"] = np.zeros((1, 8))
    with pytest.raises(InterchangeError) as error:
        interchange.to_state_dict("eupe_vitt16", variables, **VIT)
    assert error.value.problems == [
        "params/cls_token has shape [1, 8], expected [1, 1, 8]",
        "missing params/norm/scale [8]",
        "unexpected params/head [4]",
    ]


def test_half_precision_weights_widen_exactly():
    weights = {k: np.asarray(jnp.asarray(v, jnp.bfloat16)) for k, v in random_state_dict("vit").items()}
    variables = interchange.from_state_dict("eupe_vitt16", weights, **VIT)
    token = variables["params"]["cls_token"]
    assert token.dtype == np.float32
    np.testing.assert_array_equal(token, weights["cls_token"].astype(np.float32))
