"""The rewritten networks compute what the readable ones do."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from convert import weights  # noqa: E402
from convert.export_modules import for_export  # noqa: E402
from tests.convert.conftest import make_encoder  # noqa: E402


def _check(module, height, width, **options):
    network = for_export(module, height, width, **options)
    image = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, height, width)).astype(np.float32))
    with torch.inference_mode():
        expected, got = module(image), dict(zip(network.outputs, network(image), strict=True))
    assert set(got) == {name for name, value in expected.items() if value.numel()}
    for name, value in got.items():
        np.testing.assert_allclose(value, expected[name], atol=2e-5, rtol=0)


@pytest.mark.parametrize("size", [pytest.param((64, 64), marks=pytest.mark.slow), (64, 96), (128, 32)])
def test_equals_the_readable_module(encoder, size):
    _check(weights.to_module(encoder), *size)


def test_without_storage_tokens_there_is_no_storage_output():
    encoder = make_encoder("eupe_vitt16", {"embed_dim": 64, "depth": 1, "num_heads": 2, "num_storage_tokens": 0})
    module = weights.to_module(encoder)
    assert for_export(module, 32, 32).outputs == ("cls", "patches")
    _check(module, 32, 32)


def test_the_readable_module_is_left_as_it_was(encoder):
    module = weights.to_module(encoder)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for_export(module, 64, 64)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("size", [(70, 64), (64, 0), (64, -32)])
def test_sides_that_are_no_multiple_of_the_patch_are_refused(encoder, size):
    with pytest.raises(ValueError, match="multiple of the patch size"):
        for_export(weights.to_module(encoder), *size)


@pytest.mark.parametrize("outputs", [("cls",), ("patches",), ("patches", "cls")])
def test_returns_only_what_is_asked_for(encoder, outputs):
    module = weights.to_module(encoder)
    network = for_export(module, 64, 96, outputs=outputs)
    assert network.outputs == tuple(name for name in ("cls", "patches") if name in outputs)
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, got = module(image), dict(zip(network.outputs, network(image), strict=True))
    for name, value in got.items():
        np.testing.assert_allclose(value, expected[name], atol=2e-5, rtol=0)


def test_storage_tokens_alone(vit):
    assert for_export(weights.to_module(vit), 32, 32, outputs=["storage"]).outputs == ("storage",)


@pytest.mark.parametrize("outputs", [(), ("cls", "cls"), ("tokens",)])
def test_outputs_the_model_does_not_have_are_refused(encoder, outputs):
    with pytest.raises(ValueError, match="name some of cls, .*patches"):
        for_export(weights.to_module(encoder), 64, 64, outputs=outputs)


def test_convnext_has_no_storage_tokens_to_ask_for(convnext):
    with pytest.raises(ValueError, match="storage: name some of cls, patches"):
        for_export(weights.to_module(convnext), 64, 64, outputs=("storage",))


def test_bytes_of_an_image_as_input(encoder):
    """Pixels as they are, with the normalisation in the first convolution, give what normalised pixels give."""
    module = weights.to_module(encoder)
    mean, std = (0.4, 0.5, 0.45), (0.2, 0.25, 0.3)
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 64, 64), np.uint8))
    pixels = (image / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.inference_mode():
        got = for_export(module, 64, 64, uint8_input=True, mean=mean, std=std)(image)
        expected = for_export(module, 64, 64)(pixels)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5, rtol=0)


def test_bytes_as_input_need_a_mean_and_a_std(encoder):
    with pytest.raises(ValueError, match="mean and std"):
        for_export(weights.to_module(encoder), 64, 64, uint8_input=True, mean=(0.5,) * 3)
