"""Encoders against Hugging Face transformers' DINOv3, an independent implementation, through the layout of its own."""

import jax
import numpy as np
import pytest

from eupe_jax.models import interchange, layers, zoo

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8}
VITS = {
    "mlp": {},
    "no_storage": {"num_storage_tokens": 0, "norm_eps": 1e-6},
    "key_bias": {"mask_k_bias": False},
    "no_biases": {"qkv_bias": False, "proj_bias": False, "ffn_bias": False},
    "swiglu": {"ffn_layer": "swiglu", "ffn_ratio": 6.0, "num_storage_tokens": 1},
    "swiglu64": {"ffn_layer": "swiglu64", "ffn_ratio": 3.0, "qkv_bias": False, "untie_global_and_local_cls_norm": True},
    "base": {"rope_base": 31.0, "num_heads": 1},
}
STUDENTS = [name for name in zoo.names() if name.startswith("eupe_") and name != "eupe_proxy"]


def theirs(module, family):
    """Their model of the same shape."""
    if family == "vit":
        config = transformers.DINOv3ViTConfig(
            patch_size=module.patch_size,
            hidden_size=module.embed_dim,
            intermediate_size=layers.ffn_hidden(module.ffn_layer, module.embed_dim, module.ffn_ratio),
            num_hidden_layers=module.depth,
            num_attention_heads=module.num_heads,
            hidden_act="gelu" if module.ffn_layer == "mlp" else "silu",
            use_gated_mlp=module.ffn_layer != "mlp",
            num_register_tokens=module.num_storage_tokens,
            layer_norm_eps=module.norm_eps,
            rope_theta=module.rope_base,
            query_bias=module.qkv_bias,
            key_bias=module.qkv_bias and not module.mask_k_bias,
            value_bias=module.qkv_bias,
            proj_bias=module.proj_bias,
            mlp_bias=module.ffn_bias,
        )
        model = transformers.DINOv3ViTModel(config)
    else:
        config = transformers.DINOv3ConvNextConfig(hidden_sizes=list(module.dims), depths=list(module.depths))
        model = transformers.DINOv3ConvNextModel(config)
    return model


def randomise(model):
    """Fills every parameter at a scale where leaving it out shows."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(generator=generator)
            if name.endswith(("lambda1", "gamma")):
                p.mul_(0.1).add_(0.5)
            elif p.ndim == 1:
                p.mul_(0.2).add_("norm" in name and name.endswith("weight"))
            elif "token" not in name:
                p.div_(np.prod(p.shape[1:]) ** 0.5)
    return model.eval()


def assert_same_features(name, overrides, sizes, tolerance):
    module, spec = zoo.build(name, **overrides), zoo.spec(name, **overrides)
    model = randomise(theirs(module, spec.family))
    tensors = {key: value.numpy() for key, value in model.state_dict().items()}
    variables = interchange.from_state_dict(name, tensors, **overrides)
    apply = jax.jit(module.apply)
    for height, width in sizes:
        pixels = np.random.default_rng(height).standard_normal((2, height, width, 3)).astype(np.float32)
        with torch.inference_mode():
            tokens = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).last_hidden_state.numpy()
        with jax.default_matmul_precision("highest"):
            ours = apply(variables, pixels)
        prefix = 1 + spec.num_storage_tokens
        assert ours["patches"].shape[1:3] == (height // spec.patch_size, width // spec.patch_size)
        expected = {"cls": tokens[:, 0], "storage": tokens[:, 1:prefix], "patches": tokens[:, prefix:]}
        for kind, value in expected.items():
            assert kind == "storage" or value.std() > 0.5
            np.testing.assert_allclose(np.reshape(ours[kind], value.shape), value, rtol=0, atol=tolerance, err_msg=kind)


@pytest.mark.parametrize("case", VITS)
def test_small_vits(case):
    sizes = [(24, 48), (32, 32)] if case == "mlp" else [(24, 48)]
    assert_same_features("eupe_vitt16", SMALL | VITS[case], sizes, 2e-5)


def test_small_convnexts():
    assert_same_features("eupe_convnext_tiny", {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24)}, [(64, 96)], 2e-5)
    assert_same_features("eupe_convnext_tiny", {"depths": (2, 1), "dims": (8, 20)}, [(64, 64)], 2e-5)


@pytest.mark.parametrize("name", [n for n in zoo.names() if zoo.spec(n).family in ("vit", "convnext")])
def test_names_and_shapes_of_every_published_model(name):
    with torch.device("meta"):
        model = theirs(zoo.build(name), zoo.spec(name).family)
    shapes = {key.removeprefix("model."): tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert interchange.state_dict_shapes(name, layout="transformers") == shapes


@pytest.mark.slow
@pytest.mark.parametrize("name", [*STUDENTS, "dinov3_vits16plus", "dinov3_vitl16", "dinov3_vith16plus"])
def test_full_size(name):
    assert_same_features(name, {}, [(256, 256), (192, 320)], 5e-5)
