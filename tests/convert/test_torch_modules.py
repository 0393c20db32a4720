"""The readable PyTorch modules: names and shapes of the released weights, and the numbers of the Flax encoders."""

import functools
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from convert import gates, weights  # noqa: E402
from convert.torch_convnext import ConvNeXt  # noqa: E402
from convert.torch_vit import VisionTransformer  # noqa: E402
from eupe_jax.models import interchange  # noqa: E402
from tests.convert.conftest import make_encoder  # noqa: E402

GOLDEN = Path(os.environ.get("EUPE_GOLDEN_DIR", Path(__file__).resolve().parents[3] / "shared" / "golden"))

REAL = {
    "eupe_vitt16": lambda: VisionTransformer(192, 12, 3),
    "eupe_vits16": lambda: VisionTransformer(384, 12, 6),
    "eupe_vitb16": lambda: VisionTransformer(768, 12, 12),
    "eupe_convnext_tiny": lambda: ConvNeXt((3, 3, 9, 3), (96, 192, 384, 768)),
    "eupe_convnext_small": lambda: ConvNeXt((3, 3, 27, 3), (96, 192, 384, 768)),
    "eupe_convnext_base": lambda: ConvNeXt((3, 3, 27, 3), (128, 256, 512, 1024)),
}


@pytest.mark.parametrize("name", REAL)
def test_every_real_student_has_the_released_names_and_shapes(name):
    with torch.device("meta"):
        module = REAL[name]()
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    assert shapes == {key: tuple(shape) for key, shape in interchange.state_dict_shapes(name).items()}


# 70 x 90 is no multiple of a patch; 96 x 64 is not square: rows and columns must not be mixed up.
@pytest.mark.parametrize("size", [(64, 64), (96, 64), (70, 90)])
def test_features_equal_flax(encoder, size):
    pixels = np.random.default_rng(1).standard_normal((2, *size, 3)).astype(np.float32)
    run = jax.jit(functools.partial(encoder.module.apply, method="features"))  # cuts off the rest, as PyTorch does
    flax = {k: np.asarray(v) for k, v in run(encoder.variables, pixels).items() if k in ("cls", "storage", "patches")}
    pytorch = gates.torch_features(weights.to_module(encoder), pixels)
    assert {k: v.shape for k, v in flax.items()} == {k: v.shape for k, v in pytorch.items()}
    for name in flax:
        np.testing.assert_allclose(pytorch[name], flax[name], atol=2e-5, rtol=0)


def test_other_patch_size_storage_tokens_and_norm_epsilon_carry_over():
    other = {"embed_dim": 48, "depth": 3, "num_heads": 3, "patch_size": 8, "num_storage_tokens": 2}
    encoder = make_encoder("eupe_vits16", other | {"norm_eps": 1e-2, "ffn_ratio": 2.0}, seed=3)
    pixels = np.random.default_rng(2).standard_normal((1, 32, 40, 3)).astype(np.float32)
    flax, pytorch = gates.flax_features(encoder, pixels), gates.torch_features(weights.to_module(encoder), pixels)
    for name in flax:
        np.testing.assert_allclose(pytorch[name], flax[name], atol=2e-5, rtol=0)


def test_loading_is_strict(encoder):
    tensors = {k: torch.from_numpy(v.copy()) for k, v in weights.to_state_dict(encoder).items()}
    kind = type(weights.to_module(encoder))
    first = next(k for k in tensors if k.endswith("norm.bias") or k.endswith("norm1.bias"))
    with pytest.raises(ValueError, match=first):
        kind.from_state_dict({k: v for k, v in tensors.items() if k != first})
    with pytest.raises(ValueError, match="stray"):
        kind.from_state_dict(tensors | {"stray.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=first):
        kind.from_state_dict(tensors | {first: torch.zeros(5)})
    with pytest.raises(ValueError, match="not the weights"):
        kind.from_state_dict({"conv.weight": torch.zeros(1)})


def test_the_two_names_of_convnexts_final_norm_must_agree(convnext):
    tensors = {k: torch.from_numpy(v.copy()) for k, v in weights.to_state_dict(convnext).items()}
    tensors["norms.3.bias"] += 1
    with pytest.raises(ValueError, match="norms.3"):
        ConvNeXt.from_state_dict(tensors)


@pytest.mark.parametrize(
    ("name", "overrides", "what"),
    [
        ("eupe_vitt16", {"ffn_layer": "swiglu"}, "mlp.fc1"),
        ("eupe_vitt16", {"untie_cls_and_patch_norms": True}, "cls_norm"),
        ("eupe_vitt16", {"rope_normalize_coords": "max"}, "rope_normalize_coords"),
    ],
)
def test_encoders_with_other_parts_are_refused_by_name(name, overrides, what):
    encoder = make_encoder(name, {"embed_dim": 64, "depth": 1, "num_heads": 2} | overrides)
    with pytest.raises(ValueError, match=what):
        weights.to_module(encoder)


@pytest.mark.golden
@pytest.mark.parametrize(
    "name", ["vit_mlp", "vit_mlp_bf16_periods", "vit_small_signal", "convnext_tiny_dims", "convnext_small_signal"]
)
def test_reference_fixtures(name):
    path = GOLDEN / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"no fixture {path}")
    arrays = np.load(path)
    kind = VisionTransformer if json.loads(str(arrays["meta"]))["kind"] == "vit" else ConvNeXt
    module = kind.from_state_dict({k[2:]: torch.from_numpy(arrays[k]) for k in arrays.files if k.startswith("w/")})
    images = [key for key in arrays.files if key.startswith("in/img")]
    assert images
    for key in images:
        features = gates.torch_features(module, arrays[key].transpose(0, 2, 3, 1))
        out = f"out/{key[3:]}"
        patches = features["patches"].reshape(*arrays[f"{out}/x_norm_patchtokens"].shape)
        np.testing.assert_allclose(features["cls"], arrays[f"{out}/x_norm_clstoken"], atol=2e-5, rtol=0)
        np.testing.assert_allclose(patches, arrays[f"{out}/x_norm_patchtokens"], atol=2e-5, rtol=0)
