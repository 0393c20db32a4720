"""DUNE's trunk against transformers' independent DINOv2 with registers; its positions against PyTorch."""

import functools

import jax
import numpy as np
import pytest

from eupe_jax.models import dune, interchange, zoo

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

NAME = "dune_vitb14_448_paper"
SMALL = {"width": 48, "depth": 3, "num_heads": 3, "mlp_dim": 192, "patch_size": 7, "image_size": 35}


def theirs(module, seed=0):
    """Their DINOv2 of the same shape, every parameter random and at a scale where leaving it out shows."""
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=module.width,
        num_hidden_layers=module.depth,
        num_attention_heads=module.num_heads,
        mlp_ratio=module.mlp_dim // module.width,
        patch_size=module.patch_size,
        image_size=module.image_size,
        num_register_tokens=module.num_registers,
        layer_norm_eps=module.norm_eps,
    )
    model = transformers.Dinov2WithRegistersModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(generator=generator)
            if "lambda1" in name:
                p.mul_(0.1).add_(0.5)
            elif p.ndim == 1:
                p.mul_(0.2).add_("norm" in name and name.endswith("weight"))
            elif "token" not in name and "position" not in name:
                p.div_(np.prod(p.shape[1:]) ** 0.5)
    return model


def authors_names(model):
    """Their weights under the names of DUNE's files."""
    weights = {name: p.detach().numpy() for name, p in model.state_dict().items()}
    renamed = {
        "cls_token": weights["embeddings.cls_token"],
        "mask_token": weights["embeddings.mask_token"],
        "pos_embed": weights["embeddings.position_embeddings"],
        "register_tokens": weights["embeddings.register_tokens"],
        "patch_embed.proj.weight": weights["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": weights["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": weights["layernorm.weight"],
        "norm.bias": weights["layernorm.bias"],
    }
    for i in range(model.config.num_hidden_layers):
        old, new = f"encoder.layer.{i}", f"blocks.0.{i}"
        for part in ("weight", "bias"):
            renamed[f"{new}.attn.qkv.{part}"] = np.concatenate(
                [weights[f"{old}.attention.{p}_proj.{part}"] for p in "qkv"]
            )
            renamed[f"{new}.attn.proj.{part}"] = weights[f"{old}.attention.o_proj.{part}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                renamed[f"{new}.{name}.{part}"] = weights[f"{old}.{name}.{part}"]
        for number in (1, 2):
            renamed[f"{new}.ls{number}.gamma"] = weights[f"{old}.layer_scale{number}.lambda1"]
    return {f"encoder.{name}": value for name, value in renamed.items()}


def assert_equal_features(name, sizes, tolerance, **overrides):
    encoder = zoo.build(name, **overrides)
    model = theirs(encoder)
    variables = interchange.from_state_dict(name, authors_names(model), **overrides)
    n_prefix = 1 + encoder.num_registers
    for seed, (height, width) in enumerate(sizes):
        x = np.random.default_rng(seed).standard_normal((2, height, width, 3)).astype(np.float32)
        found = jax.jit(encoder.apply)(variables, x)
        with torch.no_grad():
            last = model(torch.from_numpy(x).permute(0, 3, 1, 2)).last_hidden_state.numpy()
        patches = last[:, n_prefix:].reshape(found["patches"].shape)
        for key, expected in (("cls", last[:, 0]), ("storage", last[:, 1:n_prefix]), ("patches", patches)):
            assert np.abs(expected).max() > 0.5
            np.testing.assert_allclose(found[key], expected, atol=tolerance, rtol=0, err_msg=key)


def test_features_are_those_of_dinov2():
    # transformers interpolates with antialiasing and without the offset; DUNE the other way round.
    overrides = {**SMALL, "position_antialias": True, "position_offset": 0.0}
    assert_equal_features(NAME, [(35, 35), (21, 49), (14, 7)], 2e-5, **overrides)


@pytest.mark.slow
def test_base_of_full_size():
    assert_equal_features(NAME, [(448, 448)], 5e-5)


def test_positions_are_interpolated_with_the_offset():
    """The table reaches the tokens as PyTorch interpolates it by a scale factor; the class token keeps its own."""
    encoder = zoo.build(NAME, **{**SMALL, "depth": 1})
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), np.zeros((1, 35, 35, 3)))
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    table = np.random.default_rng(0).standard_normal((26, 48)).astype(np.float32)
    variables["params"]["pos_embed"] = table
    features = jax.jit(functools.partial(encoder.apply, method="features"))
    tokens = features(variables, np.zeros((1, 21, 49, 3), np.float32))["prenorm"][0]
    image = torch.from_numpy(table[1:]).reshape(1, 5, 5, 48).permute(0, 3, 1, 2)
    patches = torch.nn.functional.interpolate(image, scale_factor=(3.1 / 5, 7.1 / 5), mode="bicubic")
    np.testing.assert_allclose(tokens[5:], patches.permute(0, 2, 3, 1).reshape(21, 48).numpy(), atol=2e-6)
    np.testing.assert_array_equal(tokens[0], table[0])
    np.testing.assert_array_equal(tokens[1:5], np.zeros((4, 48)))


def test_outputs_may_skip_the_final_norm():
    encoder = zoo.build(NAME, **SMALL)
    variables = interchange.from_state_dict(NAME, authors_names(theirs(encoder)), **SMALL)
    x = np.random.default_rng(0).standard_normal((1, 35, 35, 3)).astype(np.float32)
    out = jax.jit(functools.partial(encoder.apply, layers=(-1,), method="features"))(variables, x)
    raw = jax.jit(zoo.build(NAME, **SMALL, final_norm=False).apply)(variables, x)
    for key in ("cls", "storage", "patches"):
        np.testing.assert_allclose(raw[key], out["layers_prenorm"][0][key], atol=1e-5)
        np.testing.assert_allclose(out[key], out["layers"][0][key], atol=1e-5)
        assert np.abs(raw[key] - out[key]).max() > 0.1


def test_weights_travel_bit_for_bit_and_leave_the_projectors(caplog):
    tensors = authors_names(theirs(zoo.build(NAME, **SMALL)))
    variables = interchange.from_state_dict(NAME, tensors, **SMALL)
    back = interchange.to_state_dict(NAME, variables, **SMALL)
    assert {f"encoder.{name}" for name in back} == set(tensors)
    for name, value in back.items():
        np.testing.assert_array_equal(tensors[f"encoder.{name}"], value, err_msg=name)
    whole = {f"module.{name}": value for name, value in tensors.items()}
    whole |= {"module.projectors.mast3r.weight": np.ones((2, 2)), "module.teacher_norms.mast3r.mean": np.ones(2)}
    again = interchange.from_state_dict(NAME, whole, **SMALL)
    jax.tree.map(np.testing.assert_array_equal, again, variables)
    assert "projectors.mast3r.weight" in caplog.text and "teacher_norms.mast3r.mean" in caplog.text


def test_named_models_follow_the_published_facts():
    for spec in dune.SPECS:
        module = zoo.build(spec.name)
        assert spec.patch_size == 14 and spec.num_storage_tokens == 4 and module.depth == 12
        assert spec.resolution == module.image_size == int(spec.hub_file.split("_")[2].removesuffix(".pth"))
        positions = interchange.state_dict_shapes(spec.name)["pos_embed"]
        assert positions == (1, 1 + (spec.resolution // 14) ** 2, module.width)


def test_a_table_that_does_not_fit_the_patch_is_refused():
    with pytest.raises(ValueError, match="image_size 36 is not a multiple of patch_size 7"):
        jax.eval_shape(zoo.build(NAME, **{**SMALL, "image_size": 36}).init, jax.random.key(0), np.zeros((1, 14, 14, 3)))
