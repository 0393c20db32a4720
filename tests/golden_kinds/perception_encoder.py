"""Checks of the Perception Encoder: vision towers, and image and text towers together."""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eupe_jax.models import interchange, text_tower, zoo
from eupe_jax.models.perception_encoder import PerceptionEncoder
from tests.golden_kinds.common import Fixture, check_probes, recipe_array, to_nhwc

# reference constructor argument -> ours; what it assumes where a fixture does not say
VISION_ARGUMENTS = {
    "width": "width",
    "layers": "depth",
    "heads": "num_heads",
    "patch_size": "patch_size",
    "image_size": "image_size",
    "use_cls_token": "cls_token",
    "use_ln_post": "final_norm",
    "output_dim": "output_dim",
    "ls_init_value": "layerscale_init",
}
VISION_FIXED = {"use_ln_pre": True, "use_abs_posemb": True, "use_rope2d": True, "drop_path": 0.0}
POOL_TYPES = ("attn", "none")
FEATURES = re.compile(r"ff_(?P<stage>norm|raw)(_layer(?P<layer>-?\d+))?(?P<strip>_strip)?")


def vision_arguments(constructor: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `PerceptionEncoder` for a reference constructor; an argument that is not covered fails."""
    given = dict(constructor)
    pool, heads, ratio = given.pop("pool_type"), given.pop("attn_pooler_heads", 8), given.pop("mlp_ratio", 4.0)
    assert pool in POOL_TYPES, f"pool_type={pool!r} is not supported"
    for key, value in VISION_FIXED.items():
        assert given.pop(key, value) == value, f"{key} is not supported"
    ours = {VISION_ARGUMENTS[key]: value for key, value in given.items()}
    return {
        "final_norm": True,
        "layerscale_init": None,
        **ours,
        "mlp_dim": round(ours["width"] * ratio),
        "pool_heads": heads if pool == "attn" else None,
        "cls_output": "pool" if pool == "attn" else "none",
        "patch_output": "norm" if ours.get("final_norm", True) else "raw",
    }


TEXT_ARGUMENTS = {
    "context_length": "context_length",
    "width": "width",
    "heads": "num_heads",
    "layers": "depth",
    "output_dim": "output_dim",
    "vocab_size": "vocabulary",
}


def _vision(fixture: Fixture) -> tuple[PerceptionEncoder, dict[str, Any]]:
    """Tower and variables of a fixture, through the weight interchange, there and back unchanged."""
    if "recipe_seed" in fixture.meta:
        assert not fixture.weights, "a fixture holds either weights or a recipe"
        name, overrides = fixture.meta["config_name"].lower().replace("-", "_"), {}
        shapes = interchange.state_dict_shapes(name)
        weights = {key: recipe_array(fixture.meta["recipe_seed"], key, shape) for key, shape in shapes.items()}
        check_probes(weights, fixture.meta["recipe_probes"])
    else:
        name, overrides = "pe_core_t16_384", vision_arguments(fixture.meta["constructor"])
        weights = fixture.weights
    variables = interchange.from_state_dict(name, weights, **overrides)
    _assert_same(interchange.to_state_dict(name, variables, **overrides), weights)
    return zoo.build(name, **overrides), variables


def _assert_same(back: dict[str, np.ndarray], weights: dict[str, np.ndarray]) -> None:
    assert back.keys() == weights.keys()
    for key, value in weights.items():
        assert back[key].shape == value.shape and back[key].dtype == value.dtype, f"round trip changed {key}"
        assert np.array_equal(back[key], value), f"round trip changed {key}"


def _tolerance(fixture: Fixture) -> float:
    """2e-5, or 5e-5 where the fixture is deep (full-size) or its activations small."""
    wide = "recipe_seed" in fixture.meta or "shrunk" in fixture.meta.get("note", "")
    return 5e-5 if wide else 2e-5


def check_pe_vision(path: Path) -> None:
    """Tokens before and after the final norm and of chosen blocks, the pooled summary and the embedding."""
    fixture = Fixture(path)
    encoder, variables = _vision(fixture)
    tolerance, n_cls = _tolerance(fixture), int(encoder.cls_token)

    def expected_features(image_name):
        """(output name, its parsed parts) for the token outputs of one image."""
        names = [n for n in fixture.outputs if n.rsplit("/", 1)[0] == image_name]
        return [(n, m.groupdict()) for n in names if (m := FEATURES.fullmatch(n.rsplit("/", 1)[1]))]

    def tokens(layer):
        """[B, T, D] again from the parts that `features` splits a block's output into."""
        patches = layer["patches"].reshape(layer["patches"].shape[0], -1, encoder.width)
        return np.concatenate([layer["cls"][:, None], patches], axis=1) if n_cls else patches

    for image_name, images in fixture.inputs.items():
        images = to_nhwc(images)
        wanted = expected_features(image_name)
        layers = sorted({int(m["layer"]) for _, m in wanted if m["layer"]})

        # Only what the fixture asks for is compiled: token outputs after a block are mostly wanted raw.
        stages = sorted({m["stage"] for _, m in wanted if m["layer"]} or {"raw"})

        @jax.jit
        def run(variables, images, layers=tuple(layers), stages=tuple(stages)):
            kept = {
                stage: encoder.apply(variables, images, layers=layers, norm_layers=stage == "norm", method="features")
                for stage in stages
            }
            by_layer = {stage: dict(zip(layers, out["layers"], strict=True)) for stage, out in kept.items()}
            height, width = (side - side % encoder.patch_size for side in images.shape[1:3])
            return kept[stages[0]], by_layer, encoder.apply(variables, images[:, :height, :width])

        out, by_layer, call = run(variables, images)
        for name, parts in wanted:
            if parts["layer"]:
                value = tokens(by_layer[parts["stage"]][int(parts["layer"])])
            else:
                value = np.asarray(out["normed" if parts["stage"] == "norm" else "prenorm"])
            fixture.check(name, value[:, n_cls:] if parts["strip"] else value, tolerance)

        for name, key in (("pooled_before_proj", "pooled"), ("forward", "embedding")):
            if f"{image_name}/{name}" in fixture.outputs:
                fixture.check(f"{image_name}/{name}", out[key], tolerance)
        # The encoder's own outputs: patches as the tower offers them, the pooled summary as class token.
        h, w = (side // encoder.patch_size for side in images.shape[1:3])
        assert call["storage"].shape == (len(images), 0, encoder.width)
        assert call["patches"].shape == (len(images), h, w, encoder.width)
        stage = f"{image_name}/ff_{encoder.patch_output}"
        patches = fixture.outputs[stage][:, n_cls:].reshape(call["patches"].shape)
        np.testing.assert_allclose(call["patches"], patches, rtol=0, atol=tolerance)
        assert ("cls" in call) == (encoder.pool_heads is not None)
        if "cls" in call:
            fixture.check(f"{image_name}/pooled_before_proj", call["cls"], tolerance)
    fixture.assert_all_checked()


def check_pe_clip(path: Path) -> None:
    """Text and image embeddings, raw and of unit length, and their logits, from one checkpoint of both towers."""
    fixture = Fixture(path)
    vision = vision_arguments(fixture.meta["vision"])
    text = {TEXT_ARGUMENTS[key]: value for key, value in fixture.meta["text"].items()}
    model = text_tower.ImageTextModel(visual=PerceptionEncoder(**vision), text=text_tower.TextTower(**text))
    variables = interchange.family_import(path.name, text_tower.FAMILY, model, fixture.weights)
    _assert_same(interchange.family_export(path.name, text_tower.FAMILY, model, variables), fixture.weights)
    tower = interchange.from_state_dict("pe_core_t16_384", fixture.weights, **vision)
    jax.tree.map(np.testing.assert_array_equal, tower["params"], variables["params"]["visual"])

    @jax.jit
    def run(variables, images, tokens):
        image = model.apply(variables, images, method="embed_images")
        return image, model.apply(variables, tokens, method="embed_texts"), model.apply(variables, images, tokens)

    images, tolerance = to_nhwc(fixture.inputs["image"]), _tolerance(fixture)
    for name in (n for n in fixture.inputs if n.startswith("tokens")):
        image, embedding, out = run(variables, images, fixture.inputs[name].astype(np.int32))
        fixture.check("image_embed", image, tolerance)
        fixture.check(f"{name}/text_embed", embedding, tolerance)
        fixture.check(f"{name}/text_embed_unit", out["text"], tolerance)
        if name == "tokens":
            fixture.check("logits_per_image", out["logits"], tolerance)
    fixture.check("logit_scale_exp", np.exp(variables["params"]["logit_scale"]), tolerance)
    fixture.assert_all_checked()


KINDS = {"pe_vision": check_pe_vision, "pe_clip": check_pe_clip}
