"""What the ViT and the ConvNeXt promise whatever the weights: scan, remat, dtypes, train mode, initial values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from eupe_jax.models import layers, rope, zoo

VIT = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8, "layerscale_init": 0.5}
CONVNEXT = {"depths": (1, 1, 3, 1), "dims": (4, 6, 8, 12), "layerscale_init": 0.5}
SMALL = {"eupe_vitt16": VIT, "eupe_convnext_tiny": CONVNEXT}
NAMES = list(SMALL)


def images(height=32, width=64, batch=2, seed=0):
    return jax.random.normal(jax.random.key(seed), (batch, height, width, 3))


@functools.cache
def variables_of(name):
    """Random variables, with every leaf off its initial value, so that a part left out shows."""
    shapes = jax.eval_shape(zoo.build(name, **SMALL[name]).init, jax.random.key(0), images())
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        part = path[-1].key
        mean, scale = {"scale": (1.0, 0.1), "gamma": (0.5, 0.1), "kernel": (0.0, 0.2)}.get(part, (0.0, 0.1))
        return jnp.asarray(mean + scale * rng.standard_normal(leaf.shape), jnp.float32)

    variables = {"params": jax.tree_util.tree_map_with_path(draw, shapes["params"])}
    if "buffers" in shapes:
        head_dim = SMALL[name]["embed_dim"] // SMALL[name]["num_heads"]
        variables["buffers"] = {"rope_periods": jnp.asarray(rope.rope_periods(head_dim))}
    return variables


def build(name, **overrides):
    return zoo.build(name, **{**SMALL[name], **overrides})


def gradients(encoder, variables):
    def loss(params):
        out = encoder.apply({**variables, "params": params}, images())
        return jnp.square(out["patches"]).mean() + jnp.sin(out["cls"]).mean() + out["storage"].sum()

    return jax.jit(jax.grad(loss))(variables["params"])


def assert_close(a, b, tolerance=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        scale = max(1.0, float(jnp.abs(x).max(initial=0.0)))
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))


@functools.cache
def plain_gradients(name):
    return gradients(build(name), variables_of(name))


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("eupe_vitt16", {"scan_unroll": 2}),
        ("eupe_vitt16", {"remat": "full"}),
        ("eupe_vitt16", {"remat": "names", "scan_unroll": 3}),
        ("eupe_convnext_tiny", {"scan_unroll": 2}),
        ("eupe_convnext_tiny", {"remat": "full", "scan_unroll": 3}),
    ],
    ids=str,
)
def test_unrolling_and_remat_change_no_parameter_and_no_gradient(name, option):
    variables = variables_of(name)
    init = jax.eval_shape(build(name, **option).init, jax.random.key(1), images())
    assert jax.tree.map(jnp.shape, init) == jax.tree.map(jnp.shape, variables)
    plain = plain_gradients(name)
    assert all(
        float(jnp.abs(leaf).max()) > 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(plain)
        if "mask_token" not in str(path)
    )
    assert_close(gradients(build(name, **option), variables), plain)


def test_every_remat_policy_recomputes():
    """Remat shows as a checkpoint in the traced backward pass; an unknown policy is refused by name."""
    variables = variables_of("eupe_vitt16")

    def text(remat):
        encoder = build("eupe_vitt16", remat=remat)

        def loss(params):
            return encoder.apply({**variables, "params": params}, images())["cls"].sum()

        return str(jax.make_jaxpr(jax.grad(loss))(variables["params"]))

    assert "remat" not in text("none") and "checkpoint" not in text("none")
    for remat in layers.REMAT_POLICIES:
        assert "remat" in text(remat) or "checkpoint" in text(remat), remat
    with pytest.raises(ValueError, match="'everything'"):
        build("eupe_vitt16", remat="everything").init(jax.random.key(0), images())


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_compute_stays_close_and_returns_float32(name):
    variables = variables_of(name)
    exact = jax.jit(build(name).apply)(variables, images())
    coarse = jax.jit(build(name, dtype=jnp.bfloat16).apply)(variables, images())
    for key in ("cls", "patches"):
        a, b = exact[key].reshape(-1, exact[key].shape[-1]), coarse[key].reshape(-1, exact[key].shape[-1])
        assert b.dtype == jnp.float32
        cosine = (a * b).sum(-1) / jnp.linalg.norm(a, axis=-1) / jnp.linalg.norm(b, axis=-1)
        assert float(cosine.min()) > 0.99
        assert float(jnp.abs(a - b).max()) > 1e-4, "bfloat16 was not used"


def test_bfloat16_keeps_branches_that_start_at_a_tiny_layerscale():
    """Blocks at the published 1e-5 still move the residual stream, which bfloat16 could not represent."""
    encoder = build("eupe_vitt16", layerscale_init=1e-5, dtype=jnp.bfloat16)
    variables = variables_of("eupe_vitt16")
    blocks = {
        k: v | {"gamma": 0 * v["gamma"] + 1e-5} if "gamma" in v else v for k, v in variables["params"]["blocks"].items()
    }
    variables = {**variables, "params": {**variables["params"], "blocks": blocks}}
    first, last = (
        encoder.apply(variables, images(), layers=(0, -1), method="features")["layers_prenorm"][i]["patches"]
        for i in (0, 1)
    )
    assert 0 < float(jnp.abs(first - last).max()) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_call_gives_the_final_features_in_their_shapes(name):
    encoder, variables = build(name), variables_of(name)
    spec = zoo.spec(name, **SMALL[name])
    side = spec.patch_size
    x = images(3 * side, 2 * side)
    call, features = jax.jit(encoder.apply), jax.jit(functools.partial(encoder.apply, method="features"))
    out, full = call(variables, x), features(variables, x)
    grid = (3, 2)
    assert out["cls"].shape == (2, spec.cls_dim)
    assert out["storage"].shape == (2, spec.num_storage_tokens, spec.patch_dim)
    assert out["patches"].shape == (2, *grid, spec.patch_dim)
    for key in ("cls", "storage", "patches"):
        np.testing.assert_array_equal(out[key], full[key])


def test_rope_rescale_acts_in_training_only_and_follows_the_key():
    encoder, variables = build("eupe_vitt16"), variables_of("eupe_vitt16")

    def patches(module=encoder, **kwargs):
        return module.apply(variables, images(), **kwargs)["patches"]

    def trained(seed, module=encoder):
        return patches(module, train=True, rngs={"rope": jax.random.key(seed)})

    calm = patches()
    np.testing.assert_array_equal(patches(rngs={"rope": jax.random.key(3)}), calm)
    np.testing.assert_array_equal(trained(3), trained(3))
    assert float(jnp.abs(trained(3) - calm).max()) > 1e-3
    assert float(jnp.abs(trained(3) - trained(4)).max()) > 1e-3
    np.testing.assert_array_equal(trained(3, build("eupe_vitt16", rope_rescale=None)), calm)
    with pytest.raises(ValueError, match=r"rngs=\{'rope': key\}"):
        patches(train=True)


@pytest.mark.parametrize("masked", [True, False])
def test_key_bias_gets_a_gradient_only_when_unmasked(masked):
    unmasked = build("eupe_vitt16", mask_k_bias=False)
    grads = plain_gradients("eupe_vitt16") if masked else gradients(unmasked, variables_of("eupe_vitt16"))
    q, k, v = jnp.split(grads["blocks"]["attn"]["qkv"]["bias"], 3, axis=-1)
    assert float(jnp.abs(q).max()) > 1e-6 and float(jnp.abs(v).max()) > 1e-6
    assert bool((k == 0).all()) == masked


def test_mask_replaces_patches_by_the_mask_token():
    encoder, variables = build("eupe_vitt16"), variables_of("eupe_vitt16")
    x, everything = images(), jnp.ones((2, 32), bool)
    covered = encoder.apply(variables, x, masks=everything)["patches"]
    np.testing.assert_allclose(covered[0], covered[1], atol=1e-6)
    np.testing.assert_array_equal(
        encoder.apply(variables, x, masks=~everything)["patches"], encoder.apply(variables, x)["patches"]
    )
    with pytest.raises(ValueError, match=r"\(2, 32\).*\(2, 31\)"):
        encoder.apply(variables, x, masks=everything[:, :31])


def test_attention_fn_is_used_and_sees_rotated_heads():
    seen = []

    def attention(q, k, v):
        seen.append((q.shape, k.shape, v.shape))
        return layers.plain_attention(q, k, v)

    variables = variables_of("eupe_vitt16")
    ours = build("eupe_vitt16", attention_fn=attention).apply(variables, images())
    assert seen and set(seen) == {((2, 37, 2, 16),) * 3}
    np.testing.assert_array_equal(ours["cls"], build("eupe_vitt16").apply(variables, images())["cls"])


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("eupe_vitt16", {"images": jnp.zeros((1, 7, 32, 3))}, "smaller than one patch"),
        ("eupe_vitt16", {"images": jnp.zeros((1, 32, 32, 3)), "layers": (3,)}, "3 blocks"),
        ("eupe_convnext_tiny", {"images": jnp.zeros((1, 32, 31, 3))}, "stride of 32"),
        ("eupe_convnext_tiny", {"images": jnp.zeros((1, 32, 32, 3)), "layers": (-5,)}, "4 stages"),
    ],
)
def test_bad_input_is_named(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(name).apply(variables_of(name), method="features", **kwargs)


def test_initial_values_of_the_vit():
    dim, depth = 64, 2
    encoder = zoo.build("dinov3_vit7b16", embed_dim=dim, depth=depth, num_heads=1, num_storage_tokens=64, qkv_bias=True)
    params = jax.jit(encoder.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    flat = {"/".join(path): np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(params).items()}
    bound = (3 * 256) ** -0.5
    for path, leaf in flat.items():
        if path.startswith("patch_embed/"):
            assert np.abs(leaf).max() <= bound and abs(leaf.std() * 3**0.5 / bound - 1) < 0.2, path
        elif path.endswith("kernel") or path in ("cls_token", "storage_tokens"):
            assert abs(leaf.std() / 0.02 - 1) < (0.4 if path == "cls_token" else 0.05), path
        else:
            value = 1e-5 if path.endswith("gamma") else 1.0 if path.endswith("scale") else 0.0
            np.testing.assert_array_equal(leaf, np.float32(value), err_msg=path)
    assert {"norm/scale", "local_cls_norm/bias", "mask_token", "blocks/attn/qkv/bias"} <= set(flat)
    kernels = flat["blocks/attn/proj/kernel"]
    assert kernels.shape == (depth, dim, dim) and not np.allclose(kernels[0], kernels[1])


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("eupe_vitt16", (20, 64), "image of 20x64 pixels: .* multiples of 8; nearest is 16x64 or 24x64"),
        ("eupe_vitt16", (4, 33), "nearest is 8x32 or 8x40"),
        ("eupe_convnext_tiny", (32, 48), "multiples of 32; nearest is 32x32 or 32x64"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_nearest_that_do(name, size, message):
    with pytest.raises(ValueError, match=message):
        build(name).apply(variables_of(name), jnp.zeros((1, *size, 3)))
