"""The rewritten networks compute what the readable ones do."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from convert import weights  # noqa: E402
from convert.export_modules import for_export  # noqa: E402
from tests.convert.conftest import make_encoder  # noqa: E402


def _check(module, height, width):
    network = for_export(module, height, width)
    image = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, height, width)).astype(np.float32))
    with torch.inference_mode():
        expected, got = module(image), dict(zip(network.outputs, network(image), strict=True))
    assert set(got) == {name for name, value in expected.items() if value.numel()}
    for name, value in got.items():
        np.testing.assert_allclose(value, expected[name], atol=2e-5, rtol=0)


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (128, 32)])
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
