"""The Perception Encoder's towers: sizes, outputs, positions, text, and weights. Numeric parity is in test_golden."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eupe_jax.models import interchange, layers, text_tower, zoo
from eupe_jax.models import perception_encoder as pe
from eupe_jax.models.perception_encoder import PerceptionEncoder
from tests.test_golden import GOLDEN_DIR

TINY = {
    "width": 32, "depth": 2, "num_heads": 2, "mlp_dim": 48, "patch_size": 8, "image_size": 32, "output_dim": 24
}
LANG = {
    "final_norm": False, "pool_heads": None, "output_dim": None, "layerscale_init": 0.1, "cls_output": "none",
    "patch_output": "raw",
}
PARAMETERS = {
    "pe_core_t16_384": 6_140_544,
    "pe_core_s16_384": 23_782_656,
    "pe_core_b16_224": 93_672_960,
    "pe_core_l14_336": 317_151_232,
    "pe_core_g14_448": 1_882_032_640,
    "pe_lang_l14_448": 291_415_040,
    "pe_lang_g14_448": 1_740_922_624,
    "pe_lang_l14_448_tiling": 291_415_040,
    "pe_lang_g14_448_tiling": 1_740_922_624,
    "pe_spatial_t16_512": 5_683_200,
    "pe_spatial_s16_512": 21_983_232,
    "pe_spatial_b16_512": 86_433_792,
    "pe_spatial_l14_448": 303_964_160,
    "pe_spatial_g14_448": 1_851_887_104,
}


def tiny(**overrides):
    return PerceptionEncoder(**{**TINY, **overrides})


def tiny_pair(**text):
    sizes = {"context_length": 7, "width": 16, "depth": 2, "num_heads": 2, "output_dim": 24, "vocabulary": 50, **text}
    return text_tower.ImageTextModel(visual=tiny(), text=text_tower.TextTower(**sizes))


def apply(model, variables, *inputs, **options):
    """`model.apply`, compiled as one program."""
    return jax.jit(lambda *arrays: model.apply(*arrays, **options))(variables, *inputs)


def images(batch=2, height=32, width=32):
    return jax.random.normal(jax.random.key(1), (batch, height, width, 3))


def random_like(variables):
    """Every parameter random, so that leaving one out shows."""
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return jax.tree.unflatten(tree, [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def init(model, *inputs):
    return random_like(jax.eval_shape(model.init, jax.random.key(0), *inputs))


def test_every_tower_has_a_known_size():
    assert {spec.name for spec in pe.SPECS} == set(PARAMETERS)


@pytest.mark.parametrize("name", [n for n in PARAMETERS if "spatial" in n])
def test_spatial_towers_give_raw_patches_and_no_class_token(name):
    spec, module = zoo.spec(name), zoo.build(name)
    assert spec.cls_dim is None and not module.final_norm and module.pool_heads is None
    assert module.cls_token == (name != "pe_spatial_g14_448") == (module.layerscale_init is None)


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_size_and_facts(name):
    spec, encoder = zoo.spec(name), zoo.build(name)
    image = jax.ShapeDtypeStruct((1, spec.resolution, spec.resolution, 3), jnp.float32)
    variables = jax.eval_shape(encoder.init, jax.random.key(0), image)
    assert set(variables) == {"params"}
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == PARAMETERS[name]
    out = jax.eval_shape(encoder.apply, variables, image)
    side = spec.resolution // spec.patch_size
    assert out["patches"].shape == (1, side, side, spec.patch_dim)
    assert out["storage"].shape == (1, spec.num_storage_tokens, spec.patch_dim)
    assert ("cls" in out) == (spec.cls_dim is not None)
    if spec.cls_dim is not None:
        assert out["cls"].shape == (1, spec.cls_dim)
    assert spec.mean == spec.std == (0.5, 0.5, 0.5) and spec.licence == "Apache-2.0"


def test_state_dict_names_and_shapes_are_the_published_ones():
    path = GOLDEN_DIR / "state_dict_shapes.json"
    if not path.is_file():
        pytest.skip(f"no {path}; set EUPE_GOLDEN_DIR")
    entries = {key: entry for key, entry in json.loads(path.read_text()).items() if ":PE-" in key}
    assert entries
    for key, entry in entries.items():
        kind, hub = key.split(":")
        name = hub.lower().replace("-", "_")
        expected = {tensor: tuple(shape) for tensor, shape in entry["state_dict"].items()}
        if kind == "vision":
            shapes = interchange.state_dict_shapes(name)
        else:
            shapes = interchange.family_shapes(text_tower.FAMILY, text_tower.build(name))
            vision = {f"visual.{tensor}": shape for tensor, shape in interchange.state_dict_shapes(name).items()}
            assert vision.items() <= shapes.items()
        assert shapes == expected, f"{key}: {set(shapes.items()) ^ set(expected.items())}"
        assert sum(math.prod(shape) for shape in shapes.values()) == entry["parameters"], key


def test_outputs_follow_the_settings_and_parameters_do_not():
    model = tiny()
    variables = init(model, images())
    out = apply(model, variables, images(), method="features")
    raw = tiny(cls_output="proj", patch_output="raw")
    assert jax.tree.map(jnp.shape, jax.eval_shape(raw.init, jax.random.key(0), images())) == jax.tree.map(
        jnp.shape, dict(variables)
    )
    normed, projected = apply(model, variables, images()), apply(raw, variables, images())
    none = apply(tiny(cls_output="none"), variables, images())
    assert "cls" not in none
    np.testing.assert_array_equal(normed["cls"], out["pooled"])
    np.testing.assert_allclose(projected["cls"], out["pooled"] @ variables["params"]["proj"], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(normed["patches"].reshape(2, 16, 32), out["normed"][:, 1:])
    np.testing.assert_array_equal(projected["patches"].reshape(2, 16, 32), out["prenorm"][:, 1:])
    assert not np.allclose(normed["patches"], projected["patches"], atol=0.1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"cls_output": "mean"}, "cls_output must be one of"),
        ({"patch_output": "x"}, "patch_output must be one of"),
        ({**LANG, "cls_output": "pool"}, "needs pool_heads"),
        ({**LANG, "output_dim": 8}, "needs pool_heads"),
        ({**LANG, "patch_output": "norm"}, "needs final_norm"),
        ({"cls_output": "proj", "output_dim": None}, "needs output_dim"),
        ({"image_size": 36}, "not a multiple of patch_size"),
        ({"num_heads": 3}, "not a multiple of num_heads"),
        ({"pool_heads": 5}, "not a multiple of pool_heads"),
        ({"num_heads": 16}, "multiple of 4"),
    ],
)
def test_contradicting_settings_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(tiny(**overrides).init, jax.random.key(0), images())


def test_image_and_layer_errors():
    model = tiny()
    with pytest.raises(ValueError, match="smaller than one patch"):
        jax.eval_shape(lambda x: model.init(jax.random.key(0), x, method="features"), images(1, 4, 32))
    variables = init(model, images())
    with pytest.raises(ValueError, match="out of range"):
        model.apply(variables, images(), layers=(2,), method="features")


def test_sides_that_are_no_multiple_are_cut_in_features_and_refused_by_the_encoder():
    model = tiny()
    variables = init(model, images())
    large = images(1, 45, 39)
    features = apply(model, variables, large, method="features")
    for name, value in apply(model, variables, large[:, :40, :32]).items():
        same = features["pooled" if name == "cls" else name]
        np.testing.assert_allclose(value, same, atol=1e-5, err_msg=name)
    with pytest.raises(ValueError, match="multiples of 8; nearest is 40x32 or 48x40"):
        model.apply(variables, large)


@pytest.mark.parametrize("offset", [0, 1])
def test_rope_turns_neighbouring_channels_x_before_y(offset):
    height, width, dim = 3, 5, 16
    x = np.random.default_rng(0).standard_normal((1, height * width, 1, dim)).astype(np.float32)
    turned = pe.rotate_interleaved(jnp.asarray(x), *pe.rope_table(height, width, dim, offset))
    pairs = x[..., 0::2] + 1j * x[..., 1::2]
    for row in range(height):
        for column in range(width):
            speed = 10000.0 ** (-np.arange(dim // 4) * 4 / dim)
            angle = np.concatenate([(column + offset) * speed, (row + offset) * speed])
            expected = pairs[0, row * width + column, 0] * np.exp(1j * angle)
            found = np.asarray(turned)[0, row * width + column, 0]
            np.testing.assert_allclose(found[0::2] + 1j * found[1::2], expected, atol=1e-5)


def test_rope_leaves_the_class_token_alone():
    x = jax.random.normal(jax.random.key(0), (1, 5, 2, 8))
    turned = pe.rotate_interleaved(x, *pe.rope_table(2, 2, 8, offset=1))
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])
    assert not np.allclose(turned[:, 1], x[:, 1], atol=1e-2)


def test_memory_and_loop_options_change_no_number():
    model = tiny(layerscale_init=0.5)
    variables = init(model, images())

    def loss(model, variables):
        out = model.apply(variables, images(), train=True)
        return jnp.sum(jnp.square(out["cls"])) + jnp.sum(jnp.square(out["patches"]))

    value, gradient = jax.jit(jax.value_and_grad(lambda v: loss(model, v)))(variables)
    unused = {("proj",)}  # "cls" is the summary before the projection
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient["params"]):
        keys = tuple(p.key for p in path)
        assert bool(jnp.any(leaf != 0)) == (keys not in unused), keys
    for options in ({"remat": "full"}, {"remat": "names", "scan_unroll": 2}, {"attention_fn": layers.plain_attention}):
        other = tiny(layerscale_init=0.5, **options)
        other_value, other_gradient = jax.jit(jax.value_and_grad(lambda v, m=other: loss(m, v)))(variables)
        np.testing.assert_allclose(other_value, value, rtol=1e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * float(jnp.abs(b).max())),
            other_gradient,
            gradient,
        )


def test_bfloat16_compute_keeps_float32_outputs():
    variables = init(tiny(), images())
    exact, rounded = (apply(tiny(dtype=dtype), variables, images()) for dtype in (jnp.float32, jnp.bfloat16))
    for name, value in rounded.items():
        assert value.dtype == jnp.float32
        if value.size:
            error = jnp.linalg.norm(value - exact[name]) / jnp.linalg.norm(exact[name])
            assert 0 < error < 0.03, (name, float(error))


def test_text_is_read_at_the_first_largest_id():
    tokens = jnp.array([[9, 3, 4, 49, 0, 0, 0], [9, 5, 49, 7, 49, 2, 1]])
    tower = text_tower.TextTower(
        context_length=7, width=16, depth=2, num_heads=2, output_dim=24, vocabulary=50
    )
    variables = init(tower, tokens)
    out = apply(tower, variables, tokens)
    assert out.shape == (2, 24) and out.dtype == jnp.float32
    later = tokens.at[0, 5].set(30).at[1, 3:].set(8)
    np.testing.assert_allclose(apply(tower, variables, later), out, atol=1e-5)
    np.testing.assert_allclose(apply(tower, variables, tokens[:, :4]), out, atol=1e-5)
    earlier = apply(tower, variables, tokens.at[:, 1].set(6))
    assert float(jnp.abs(earlier - out).max(axis=-1).min()) > 1e-2
    with pytest.raises(ValueError, match="exceed the context of 7"):
        apply(tower, variables, jnp.zeros((1, 8), jnp.int32))


def test_logits_are_scaled_cosines():
    pair, tokens = tiny_pair(), jnp.array([[1, 2, 49], [1, 3, 49], [5, 49, 0]])
    variables = init(pair, images(), tokens)
    out = apply(pair, variables, images(), tokens)
    image = np.asarray(apply(pair, variables, images(), method="embed_images"))
    text = np.asarray(apply(pair, variables, tokens, method="embed_texts"))
    cosines = image @ text.T / np.linalg.norm(image, axis=1)[:, None] / np.linalg.norm(text, axis=1)
    np.testing.assert_allclose(out["logits"], np.exp(variables["params"]["logit_scale"]) * cosines, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(out["text"], axis=1), 1, atol=1e-5)


def test_pairs_exist_for_core_models_only():
    assert text_tower.build("pe_core_g14_448").text.context_length == 72
    with pytest.raises(ValueError, match="no text tower belongs to 'pe_lang_g14_448'.*pe_core_b16_224"):
        text_tower.build("pe_lang_g14_448")


def test_weights_of_a_pair_travel_bit_for_bit_and_give_the_tower(caplog):
    pair = tiny_pair()
    variables = init(pair, images(), jnp.zeros((1, 7), jnp.int32))
    weights = interchange.family_export("pair", text_tower.FAMILY, pair, variables)
    assert "visual.conv1.weight" in weights and "transformer.resblocks.1.ln_1.weight" in weights
    back = interchange.family_import("pair", text_tower.FAMILY, pair, weights)
    jax.tree.map(np.testing.assert_array_equal, back, dict(variables))

    tower = interchange.from_state_dict("pe_core_t16_384", weights, **TINY)
    jax.tree.map(np.testing.assert_array_equal, tower["params"], dict(variables["params"]["visual"]))
    assert "token_embedding.weight" in caplog.text

    with pytest.raises(interchange.InterchangeError, match=r"missing visual\.proj \[32, 24\]"):
        less = {name: value for name, value in weights.items() if name != "visual.proj"}
        interchange.family_import("pair", text_tower.FAMILY, pair, less)
    with pytest.raises(interchange.InterchangeError, match=r"unexpected extra \[1\]"):
        interchange.from_state_dict("pe_core_t16_384", {**weights, "visual.extra": np.zeros(1, np.float32)}, **TINY)
