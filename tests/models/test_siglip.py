"""SigLIP 2 towers against transformers' independent implementation, with random weights, through its names."""

import functools

import jax
import numpy as np
import pytest

from eupe_jax.models import interchange, siglip, zoo

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = {"width": 48, "depth": 3, "num_heads": 3, "mlp_dim": 80, "patch_size": 8, "image_size": 44}
NAMES = [spec.name for spec in siglip.SPECS]


def configured(kwargs):
    return transformers.SiglipVisionConfig(
        hidden_size=kwargs["width"],
        num_hidden_layers=kwargs["depth"],
        num_attention_heads=kwargs["num_heads"],
        intermediate_size=kwargs["mlp_dim"],
        patch_size=kwargs["patch_size"],
        image_size=kwargs["image_size"],
    )


def theirs(kwargs, seed=0):
    """Their tower, every parameter random and at a scale where leaving it out shows."""
    model = transformers.SiglipVisionModel(configured(kwargs)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(generator=generator)
            if p.ndim == 1:
                p.mul_(0.2).add_("norm" in name and name.endswith("weight"))
            elif "position" not in name and "probe" not in name:
                p.div_(np.prod(p.shape[1:]) ** 0.5)
    return model


def numpy_weights(model):
    return {name: p.detach().numpy() for name, p in model.state_dict().items()}


def assert_equal_features(name, kwargs, sizes, tolerance, **overrides):
    model = theirs(kwargs)
    variables = interchange.from_state_dict(name, numpy_weights(model), **overrides)
    encoder = zoo.build(name, **overrides)
    for seed, (height, width) in enumerate(sizes):
        x = np.random.default_rng(seed).standard_normal((2, height, width, 3)).astype(np.float32)
        found = jax.jit(encoder.apply)(variables, x)
        with torch.no_grad():
            out = model(torch.from_numpy(x).permute(0, 3, 1, 2), interpolate_pos_encoding=True)
        patches = out.last_hidden_state.numpy().reshape(found["patches"].shape)
        for ours, expected in ((found["cls"], out.pooler_output.numpy()), (found["patches"], patches)):
            assert np.abs(expected).max() > 0.5
            np.testing.assert_allclose(ours, expected, atol=tolerance, rtol=0)


def test_features_are_those_of_transformers_at_any_size():
    # The native 44 is no multiple of the patch: five patches, and four pixels that nobody reads.
    assert_equal_features("siglip2_base_patch16_224", SMALL, [(44, 44), (40, 64), (16, 8)], 2e-5, **SMALL)


def test_another_shape():
    kwargs = {"width": 24, "depth": 2, "num_heads": 2, "mlp_dim": 31, "patch_size": 4, "image_size": 12}
    assert_equal_features("siglip2_so400m_patch14_384", kwargs, [(12, 12), (20, 8)], 2e-5, **kwargs)


@pytest.mark.slow
def test_so400m_of_full_size():
    spec = zoo.spec("siglip2_so400m_patch14_224")
    assert_equal_features(spec.name, spec.kwargs, [(224, 224), (182, 252)], 5e-5)


def test_layers_are_their_hidden_states():
    model = theirs(SMALL)
    variables = interchange.from_state_dict(NAMES[0], numpy_weights(model), **SMALL)
    x = np.random.default_rng(0).standard_normal((1, 40, 40, 3)).astype(np.float32)
    encoder = zoo.build(NAMES[0], **SMALL)
    raw, normed = (
        jax.jit(functools.partial(encoder.apply, layers=(0, -1), norm_layers=norm, method="features"))(variables, x)
        for norm in (False, True)
    )
    with torch.no_grad():
        states = model(torch.from_numpy(x).permute(0, 3, 1, 2), output_hidden_states=True).hidden_states
    for found, expected in zip(raw["layers"], (states[1], states[3]), strict=True):
        np.testing.assert_allclose(found["patches"].reshape(1, 25, -1), expected.numpy(), atol=2e-5)
    np.testing.assert_allclose(normed["layers"][-1]["patches"], raw["patches"], atol=1e-5)
    np.testing.assert_allclose(raw["layers"][-1]["patches"].reshape(1, 25, -1), raw["prenorm"], atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_every_named_tower_has_their_parameters(name):
    with torch.device("meta"):
        model = transformers.SiglipVisionModel(configured(zoo.spec(name).kwargs))
    expected = {key: tuple(p.shape) for key, p in model.state_dict().items()}
    assert interchange.state_dict_shapes(name) == expected


def test_weights_travel_bit_for_bit_and_leave_the_text_tower(caplog):
    weights = numpy_weights(theirs(SMALL))
    variables = interchange.from_state_dict(NAMES[0], weights, **SMALL)
    back = interchange.to_state_dict(NAMES[0], variables, **SMALL)
    assert back.keys() == weights.keys()
    for key, value in weights.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)

    whole = {f"vision_model.{key}": value for key, value in weights.items()}
    whole |= {"text_model.final_layer_norm.weight": np.ones(3, np.float32), "logit_scale": np.ones(1, np.float32)}
    again = interchange.from_state_dict(NAMES[0], whole, **SMALL)
    jax.tree.map(np.testing.assert_array_equal, again, variables)
    assert "text_model.final_layer_norm.weight" in caplog.text and "logit_scale" in caplog.text
    with pytest.raises(interchange.InterchangeError, match=r"missing head\.probe \[1, 1, 48\]"):
        interchange.from_state_dict(NAMES[0], {k: v for k, v in whole.items() if "probe" not in k}, **SMALL)


def test_a_size_that_does_not_fit_is_refused_unless_it_is_the_native_one():
    encoder = zoo.build("siglip2_so400m_patch14_384", **SMALL)
    init = jax.eval_shape(encoder.init, jax.random.key(0), np.zeros((1, 44, 44, 3)))
    assert jax.eval_shape(encoder.apply, init, np.zeros((1, 44, 44, 3)))["patches"].shape == (1, 5, 5, 48)
    with pytest.raises(ValueError, match="44x36.*multiples of 8"):
        jax.eval_shape(encoder.apply, init, np.zeros((1, 44, 36, 3)))
