"""RADIO against transformers' independent implementation, with random weights, through the file that it writes."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from eupe_jax.models import interchange, radio, zoo

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

NAME = "radio_v2_5_b"
SMALL = {"width": 48, "depth": 2, "num_heads": 3, "mlp_dim": 192, "patch_size": 8, "max_image_size": 64}
# what the published files of RADIOv2.5 store, as the hub counts: weights, and nine values that are none
PUBLISHED = {"radio_v2_5_b": 98_233_353, "radio_v2_5_l": 319_881_225, "radio_v2_5_h": 651_642_889}


def theirs(module, seed=0):
    """Their model of the same shape, every parameter random; RADIO has no LayerScale, so it stays one."""
    config = transformers.RadioConfig(
        hidden_size=module.width,
        num_hidden_layers=module.depth,
        num_attention_heads=module.num_heads,
        mlp_ratio=module.mlp_dim / module.width,
        patch_size=module.patch_size,
        max_img_size=module.max_image_size,
        num_cls_tokens=module.num_cls_tokens,
        num_registers=module.num_registers,
        summary_idxs=list(module.summary),
    )
    model = transformers.RadioModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "layer_scale" in name:
                continue
            p.normal_(generator=generator)
            if p.ndim == 1:
                p.mul_(0.2).add_("norm" in name and name.endswith("weight"))
            elif "position_embedding" not in name and "token" not in name:
                p.div_(p.shape[1] ** 0.5)
    return model


def saved(model, folder):
    """The tensors of the file they write, which has the authors' names; a LayerScale of one is not RADIO's."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    scales = [name for name in tensors if "layer_scale" in name]
    assert all((tensors.pop(name) == 1).all() for name in scales)
    return tensors


def pixels(height, width, seed=0):
    return np.random.default_rng(seed).random((2, height, width, 3), np.float32)


def assert_equal_features(model, variables, encoder, sizes, tolerance):
    """`tolerance` is for features of unit scale, which no final norm gives RADIO's."""
    for seed, (height, width) in enumerate(sizes):
        x = pixels(height, width, seed)
        found = jax.jit(encoder.apply)(variables, (x - np.float32(radio.CLIP_MEAN)) / np.float32(radio.CLIP_STD))
        with torch.no_grad():
            out = model(torch.from_numpy(x).permute(0, 3, 1, 2))
        last = out.last_hidden_state.numpy()
        storage = last[:, encoder.num_cls_tokens : encoder.num_cls_tokens + encoder.num_registers]
        patches = out.features.numpy().reshape(found["patches"].shape)
        for key, expected in (("cls", out.summary.numpy()), ("storage", storage), ("patches", patches)):
            scale = np.sqrt(np.mean(expected**2))
            assert 0.5 < scale < 10
            np.testing.assert_allclose(found[key] / scale, expected / scale, atol=tolerance, rtol=0, err_msg=key)


def test_features_are_those_of_transformers_at_any_size(tmp_path):
    encoder = zoo.build(NAME, **SMALL)
    model = theirs(encoder)
    variables = interchange.from_state_dict(NAME, saved(model, tmp_path), **SMALL)
    # smaller, upright, the whole table, and wide beyond it
    assert_equal_features(model, variables, encoder, [(24, 24), (40, 16), (64, 64), (32, 80)], 2e-5)


def test_another_shape(tmp_path):
    kwargs = {
        "width": 32,
        "depth": 1,
        "num_heads": 2,
        "mlp_dim": 96,
        "patch_size": 4,
        "max_image_size": 20,
        "num_cls_tokens": 3,
        "summary": (2, 0),
        "num_registers": 7,
    }
    encoder = zoo.build("radio_v2_5_h", **kwargs)
    model = theirs(encoder, seed=1)
    variables = interchange.from_state_dict("radio_v2_5_h", saved(model, tmp_path), **kwargs)
    assert_equal_features(model, variables, encoder, [(20, 20), (12, 16)], 2e-5)
    assert zoo.spec("radio_v2_5_h", **kwargs).cls_dim == 64


@pytest.mark.slow
def test_base_of_full_size(tmp_path):
    encoder = zoo.build(NAME)
    model = theirs(encoder)
    variables = interchange.from_state_dict(NAME, saved(model, tmp_path))
    assert_equal_features(model, variables, encoder, [(256, 256), (224, 400)], 5e-5)


def test_corner_alignment_is_a_setting():
    rng = np.random.default_rng(0)
    table = rng.standard_normal((64, 48)).astype(np.float32)
    image = torch.from_numpy(table).reshape(1, 8, 8, 48).permute(0, 3, 1, 2)
    for align in (True, False):
        square = torch.nn.functional.interpolate(image, (5, 5), mode="bilinear", align_corners=align)
        expected = square[:, :, :3, :].permute(0, 2, 3, 1).reshape(-1, 48).numpy()
        found = zoo.build(NAME, **SMALL, align_corners=align)._positions(table, 3, 5)
        np.testing.assert_allclose(found, expected, atol=5e-6)


def test_weights_travel_bit_for_bit(tmp_path):
    tensors = saved(theirs(zoo.build(NAME, **SMALL)), tmp_path)
    variables = interchange.from_state_dict(NAME, tensors, **SMALL)
    back = interchange.to_state_dict(NAME, variables, **SMALL)
    assert back.keys() == tensors.keys()
    for key, value in back.items():
        np.testing.assert_array_equal(tensors[key], value, err_msg=key)
        assert tensors[key].dtype == value.dtype, key
    for wrong, reason in ((np.zeros(3, np.int64), "not what the architecture"), (np.zeros(3, np.float32), "integers")):
        with pytest.raises(interchange.InterchangeError, match=f"summary_idxs .*{reason}"):
            interchange.from_state_dict(NAME, {**tensors, "radio_model.summary_idxs": wrong}, **SMALL)
    other = {**tensors, "radio_model.input_conditioner.norm_std": np.ones((3, 1, 1), np.float32)}
    with pytest.raises(interchange.InterchangeError, match="norm_std is not what the architecture fixes"):
        interchange.from_state_dict(NAME, other, **SMALL)
    with pytest.raises(interchange.InterchangeError, match=r"unexpected radio_model\.model\.norm\.weight"):
        interchange.from_state_dict(NAME, {**tensors, "radio_model.model.norm.weight": np.ones(48)}, **SMALL)


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_models_store_as_many_values_as_published(name):
    shapes = interchange.state_dict_shapes(name)
    assert sum(int(np.prod(s)) for s in shapes.values()) == PUBLISHED[name]
    assert zoo.spec(name).mean == radio.CLIP_MEAN and zoo.spec(name).std == radio.CLIP_STD


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"summary": (0, 4)}, r"summary \(0, 4\).*4 class tokens"),
        ({"summary": ()}, "summary"),
        ({"max_image_size": 60}, "max_image_size 60 is not a multiple"),
    ],
)
def test_contradicting_settings_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(zoo.build(NAME, **{**SMALL, **overrides}).init, jax.random.key(0), pixels(16, 16))
