"""Checks of the ViT, the ConvNeXt, the RoPE tables and the state_dict shapes."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eupe_jax.models import interchange, rope, zoo
from tests.golden_kinds.common import Fixture, check_probes, recipe_array, to_nchw, to_nhwc

NORM_EPS = {"layernorm": 1e-6, "layernormbf16": 1e-5}
# reference constructor argument -> ours
VIT_ARGUMENTS = {
    "embed_dim": "embed_dim",
    "depth": "depth",
    "num_heads": "num_heads",
    "patch_size": "patch_size",
    "n_storage_tokens": "num_storage_tokens",
    "ffn_layer": "ffn_layer",
    "ffn_ratio": "ffn_ratio",
    "ffn_bias": "ffn_bias",
    "qkv_bias": "qkv_bias",
    "mask_k_bias": "mask_k_bias",
    "proj_bias": "proj_bias",
    "layerscale_init": "layerscale_init",
    "untie_cls_and_patch_norms": "untie_cls_and_patch_norms",
    "untie_global_and_local_cls_norm": "untie_global_and_local_cls_norm",
    "pos_embed_rope_base": "rope_base",
    "pos_embed_rope_min_period": "rope_min_period",
    "pos_embed_rope_max_period": "rope_max_period",
    "pos_embed_rope_normalize_coords": "rope_normalize_coords",
    "pos_embed_rope_shift_coords": "rope_shift",
    "pos_embed_rope_jitter_coords": "rope_jitter",
    "pos_embed_rope_rescale_coords": "rope_rescale",
}
# what the reference constructor assumes where a fixture does not say
VIT_DEFAULTS = {
    "n_storage_tokens": 0,
    "layerscale_init": None,
    "mask_k_bias": False,
    "norm_layer": "layernorm",
    "qkv_bias": True,
}
VIT_FIXED = {"img_size": None, "in_chans": 3, "drop_path_rate": 0.0, "pos_embed_rope_dtype": "fp32"}
CONVNEXT_ARGUMENTS = {"depths": "depths", "dims": "dims", "layer_scale_init_value": "layerscale_init"}
CONVNEXT_FIXED = {"in_chans": 3, "drop_path_rate": 0.0, "patch_size": None}


def _translate(constructor: dict[str, Any], table: dict[str, str], fixed: dict[str, Any]) -> dict[str, Any]:
    """Our constructor arguments; an argument that is neither in the table nor as we fix it fails."""
    ours = {}
    for key, value in constructor.items():
        if key in table:
            ours[table[key]] = tuple(value) if isinstance(value, list) else value
        else:
            assert key in fixed, f"constructor argument {key}={value!r} is not covered"
            assert fixed[key] is None or fixed[key] == value, f"{key}={value!r} is not supported"
    return ours


def vit_overrides(constructor: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `VisionTransformer` for a reference ViT constructor."""
    constructor = {**VIT_DEFAULTS, **constructor}
    eps = NORM_EPS[constructor.pop("norm_layer")]
    return {**_translate(constructor, VIT_ARGUMENTS, VIT_FIXED), "norm_eps": eps}


def _recipe_state_dict(seed: int, name: str, overrides: dict[str, Any]) -> dict[str, np.ndarray]:
    """The full state_dict from the recipe, buffers and aliases at their constructed values."""
    spec = zoo.spec(name, **overrides)
    family = zoo.FAMILIES[spec.family]
    module = family.module(**spec.kwargs)
    official = family.layouts["official"]
    built = official.constants(module)
    shapes = interchange.state_dict_shapes(spec)
    if "rope_embed.periods" in shapes:
        built["rope_embed.periods"] = rope.rope_periods(
            module.embed_dim // module.num_heads, module.rope_base, module.rope_min_period, module.rope_max_period
        )
    sources = {key: official.aliases.get(key, key) for key in shapes}
    return {
        key: built[key] if key in built else recipe_array(seed, sources[key], shape) for key, shape in shapes.items()
    }


def _load(fixture: Fixture, name: str, overrides: dict[str, Any]):
    """Encoder and variables of a fixture, through the weight interchange, there and back unchanged."""
    weights = fixture.weights
    if "recipe_seed" in fixture.meta:
        assert not weights, "a fixture holds either weights or a recipe"
        weights = _recipe_state_dict(fixture.meta["recipe_seed"], name, overrides)
        check_probes(weights, fixture.meta["recipe_probes"])
    weights = _complete(name, overrides, weights)
    variables = interchange.from_state_dict(name, weights, **overrides)
    back = interchange.to_state_dict(name, variables, **overrides)
    assert back.keys() == weights.keys()
    for key, value in weights.items():
        assert back[key].dtype == value.dtype and np.array_equal(back[key], value), f"round trip changed {key}"
    return zoo.build(name, **overrides), variables


def _complete(name: str, overrides: dict[str, Any], weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adds tensors that the architecture fixes (bias masks) where a fixture leaves them out."""
    spec = zoo.spec(name, **overrides)
    family = zoo.FAMILIES[spec.family]
    return {**family.layouts["official"].constants(family.module(**spec.kwargs)), **weights}


def _tolerance(fixture: Fixture) -> float:
    """2e-5, or 5e-5 where the fixture is deep (full-size) or its activations small."""
    wide = "factory" in fixture.meta or "shrunk" in fixture.meta.get("note", "")
    return 5e-5 if wide else 2e-5


def _tokens(maps_BxHxWxD: Any) -> np.ndarray:
    array = np.asarray(maps_BxHxWxD)
    return array.reshape(array.shape[0], -1, array.shape[-1])


def check_vit(path: Path) -> None:
    """Final, pre-norm, masked and intermediate tokens of a ViT at every image size of the fixture."""
    fixture = Fixture(path)
    if "factory" in fixture.meta:
        name, overrides = fixture.meta["factory"], {}
    else:
        name, overrides = "eupe_vitt16", vit_overrides(fixture.meta["constructor"])
    encoder, variables = _load(fixture, name, overrides)
    tolerance, depth = _tolerance(fixture), encoder.depth
    with_layers = any("/gil_" in output for output in fixture.outputs)
    layers = (depth - 2, depth - 1) if with_layers else ()

    @jax.jit
    def run(variables, images, masks):
        return encoder.apply(variables, images, masks=masks, layers=layers, method="features")

    def checks(prefix, out):
        """Output name -> value, for whichever of them the fixture holds."""
        yield f"{prefix}/x_norm_clstoken", out["cls"]
        yield f"{prefix}/x_storage_tokens", out["storage"]
        yield f"{prefix}/x_norm_patchtokens", _tokens(out["patches"])
        yield f"{prefix}/x_prenorm", out["prenorm"]
        for kind, got in (("norm", out["layers"]), ("raw", out["layers_prenorm"])):
            for i, layer in enumerate(got):
                yield f"{prefix}/gil_{kind}/{i}/patch", _tokens(layer["patches"])
                yield f"{prefix}/gil_{kind}/{i}/cls", layer["cls"]
                yield f"{prefix}/gil_{kind}/{i}/extra", layer["storage"]
        if with_layers:
            yield f"{prefix}/gil_norm_reshape/last", to_nchw(out["layers"][-1]["patches"])

    for image_name in (n for n in fixture.inputs if n.startswith("img_")):
        images = to_nhwc(fixture.inputs[image_name])
        cases = [(image_name, None)]
        mask_name = image_name.replace("img_", "mask_")
        if mask_name in fixture.inputs:
            cases.append((f"{image_name}/masked", fixture.inputs[mask_name]))
        for prefix, masks in cases:
            for output, value in checks(prefix, run(variables, images, masks)):
                if output in fixture.outputs:
                    fixture.check(output, value, tolerance)
    fixture.assert_all_checked()


def check_convnext(path: Path) -> None:
    """Final and pre-norm tokens and the maps of every stage, plain and at pseudo patch size 16."""
    fixture = Fixture(path)
    if "factory" in fixture.meta:
        name, overrides = fixture.meta["factory"], {}
    else:
        name = "eupe_convnext_tiny"
        overrides = _translate(fixture.meta["constructor"], CONVNEXT_ARGUMENTS, CONVNEXT_FIXED)
    encoder, variables = _load(fixture, name, overrides)
    tolerance = _tolerance(fixture)

    @functools.partial(jax.jit, static_argnums=2)
    def run(variables, images, patch_size):
        return encoder.apply(variables, images, layers=range(4), patch_size=patch_size, method="features")

    for image_name, images in fixture.inputs.items():
        for patch_size, kind in ((None, "gil"), (16, "gil_p16")):
            if patch_size and not any(f"{image_name}/{kind}_" in output for output in fixture.outputs):
                continue
            out = run(variables, to_nhwc(images), patch_size)
            named = {
                "x_norm_clstoken": out["cls"],
                "x_norm_patchtokens": _tokens(out["patches"]),
                "x_prenorm": _tokens(out["prenorm"]),
            }
            if patch_size is None:
                named["gil_norm_tokens/last"] = _tokens(out["layers"][-1]["patches"])
            for suffix, stages in (("norm", out["layers"]), ("raw", out["layers_prenorm"])):
                for s, stage in enumerate(stages):
                    named[f"{kind}_{suffix}/stage{s}/map"] = to_nchw(stage["patches"])
                    named[f"{kind}_{suffix}/stage{s}/cls"] = stage["cls"]
            for output, value in named.items():
                if f"{image_name}/{output}" in fixture.outputs:
                    fixture.check(f"{image_name}/{output}", value, tolerance)
    fixture.assert_all_checked()


def check_rope_tables(path: Path) -> None:
    """Periods, coordinate normalisations, and train-time tables for the given draws."""
    fixture = Fixture(path)
    constructor = fixture.meta["constructor"]
    head_dim = constructor["embed_dim"] // constructor["num_heads"]
    periods = rope.rope_periods(
        head_dim, constructor.get("base"), constructor.get("min_period"), constructor.get("max_period")
    )
    fixture.check("periods", periods, 2e-5)
    for case in fixture.meta["cases"]:
        name = case["name"]
        drawn = {}
        for part in ("shift", "jitter", "rescale"):
            key = f"{name}/drawn_{part}_coords"
            if key in fixture.outputs:
                drawn[part] = fixture.outputs[key]
                fixture.check(key, drawn[part], 0.0)
                bound = case[f"{part}_coords"]
                low, high = (-bound, bound) if part == "shift" else (1 / bound, bound)
                assert (drawn[part] >= low - 1e-6).all() and (drawn[part] <= high + 1e-6).all()
        coords = jnp.asarray(rope.patch_coords(case["H"], case["W"], case["normalize_coords"]))
        factor, offset = rope.combine_augmentation(**drawn)
        sin, cos = rope.rope_table(jnp.asarray(periods), coords * factor + offset)
        fixture.check(f"{name}/sin", sin, 2e-5)
        fixture.check(f"{name}/cos", cos, 2e-5)
    fixture.assert_all_checked()


def check_state_dict_shapes(path: Path) -> None:
    """Names, shapes, parameter counts and constructor arguments of every model of the file that the zoo builds."""
    content = json.loads(path.read_text())
    checked = []
    for name in (n for n in content if n in zoo.names()):
        entry = content[name]
        expected = {key: tuple(shape) for key, shape in entry["state_dict"].items()}
        shapes = interchange.state_dict_shapes(name)
        assert shapes == expected, f"{name}: {set(shapes.items()) ^ set(expected.items())}"
        params = jax.eval_shape(zoo.build(name).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == entry["parameters"], name
        if "constructor" in entry:
            module = zoo.build(name)
            for key, value in vit_overrides(entry["constructor"]).items():
                assert getattr(module, key) == value, f"{name}: {key} is {getattr(module, key)}, not {value}"
        checked.append(name)
    if not checked:
        pytest.skip(f"the zoo has none of {list(content)}")


KINDS = {
    "vit": check_vit,
    "convnext": check_convnext,
    "rope_tables": check_rope_tables,
    "state_dict_shapes": check_state_dict_shapes,
}
