"""Weights to and from the authors' names: exact both ways, and every misfit in one error."""

import collections
import logging
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from eupe_jax.models import interchange, rope, text_tower, zoo
from eupe_jax.models.interchange import InterchangeError
from eupe_jax.models.spec import TRANSFORMS, Tensor

VIT = {"embed_dim": 8, "depth": 2, "num_heads": 1, "patch_size": 4}
CONVNEXT = {"depths": (1, 2, 1, 1), "dims": (4, 6, 8, 10)}
TOWER = {
    "width": 8, "depth": 2, "num_heads": 2, "mlp_dim": 12, "patch_size": 4, "image_size": 8, "max_image_size": 8
}  # fmt: skip


def shrunk(name):
    """A name with what makes a tower of that family small."""
    return name, {key: value for key, value in TOWER.items() if hasattr(zoo.build(name), key)}


CASES = {
    "vit": ("eupe_vitt16", VIT),
    "vit_7b": ("dinov3_vit7b16", {**VIT, "ffn_ratio": 3.0}),
    "vit_untied": ("dinov3_vits16plus", {**VIT, "untie_cls_and_patch_norms": True}),
    "vit_key_bias": ("eupe_vitt16", {**VIT, "mask_k_bias": False, "ffn_bias": False, "proj_bias": False}),
    "vit_bare": ("eupe_vitt16", {**VIT, "num_storage_tokens": 0, "layerscale_init": None}),
    "convnext": ("eupe_convnext_tiny", CONVNEXT),
    "pe_core": ("pe_core_t16_384", {**shrunk("pe_core_t16_384")[1], "pool_heads": 2, "output_dim": 6}),
    "pe_lang": shrunk("pe_lang_g14_448"),
    "image_text": (None, {}),
    **{kind: shrunk(f.specs[0].name) for kind, f in zoo.FAMILIES.items() if kind not in ("vit", "convnext")},
}
STUDENTS = [name for name in zoo.names() if name.startswith("eupe_") and name != "eupe_proxy"]


def resolve(case):
    """Name, family and module of a case."""
    name, overrides = CASES[case]
    if name is None:
        visual = zoo.build("pe_core_g14_448", **shrunk("pe_core_g14_448")[1], pool_heads=2, output_dim=6)
        text = text_tower.TextTower(5, width=8, depth=2, num_heads=2, output_dim=6, vocabulary=7)
        return case, text_tower.FAMILY, text_tower.ImageTextModel(visual=visual, text=text)
    return name, zoo.family(name), zoo.build(name, **overrides)


BOTH_WAYS = [
    (case, layout)
    for case in CASES
    for layout in resolve(case)[1].layouts
    if (case, layout) != ("vit_untied", "transformers")
]


def random_state_dict(case, layout="official", seed=0):
    return random_weights(*resolve(case)[1:], layout, seed)


def random_weights(family, module, layout, seed=0):
    rng, found = np.random.default_rng(seed), family.layouts[layout]
    shapes = interchange.family_shapes(family, module, layout)
    weights = {key: rng.standard_normal(shape, dtype=np.float32) for key, shape in shapes.items()}
    weights.update(found.constants(module))
    weights.update({alias: weights[source] for alias, source in found.aliases.items()})
    return weights


def assert_round_trip(model, family, module, layout):
    weights = random_weights(family, module, layout)
    variables = interchange.family_import(model, family, module, weights)  # finds the layout itself
    back = interchange.family_export(model, family, module, variables, layout)
    assert back.keys() == weights.keys()
    for key, value in weights.items():
        assert back[key].tobytes() == value.tobytes() and back[key].shape == value.shape, key
    again = traverse_util.flatten_dict(interchange.family_import(model, family, module, back, layout))
    for path, leaf in traverse_util.flatten_dict(variables).items():
        np.testing.assert_array_equal(again[path], leaf)


def test_parts_a_model_lacks_have_no_tensors():
    names = interchange.state_dict_shapes("eupe_vitt16", **CASES["vit_bare"][1])
    assert not [n for n in names if "storage" in n or "gamma" in n] and "blocks.1.norm2.bias" in names


@pytest.mark.parametrize(("case", "layout"), BOTH_WAYS)
def test_round_trip_is_bit_identical(case, layout):
    assert_round_trip(*resolve(case), layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["official", "transformers"])
@pytest.mark.parametrize("name", STUDENTS)
def test_round_trip_is_bit_identical_at_full_size(name, layout):
    assert_round_trip(name, zoo.family(name), zoo.build(name), layout)


class Lazy:
    """A tensor of a file: counts how often it is read."""

    def __init__(self, name, array, reads):
        self.shape, self.dtype, self._name, self._array, self._reads = array.shape, array.dtype, name, array, reads

    def __array__(self, dtype=None, copy=None):
        self._reads.append(self._name)
        return self._array


@pytest.mark.parametrize("case", ["vit", "convnext", "image_text"])
def test_tensors_are_read_once_and_only_for_their_leaf(case):
    weights, reads = random_state_dict(case), []
    model, family, module = resolve(case)
    lazy = {name: Lazy(name, array, reads) for name, array in weights.items()}
    leaves = interchange.import_leaves(model, family, module, lazy)
    fixed = [*family.layouts["official"].constants(module), *family.layouts["official"].aliases]
    fixed += [family.layouts["official"].aliases.get(name, name) for name in fixed]
    assert set(reads) == set(fixed)  # checked, all of them small
    reads.clear()
    table = {row.path: row for row in family.layouts["official"].table}
    got = {}
    for path, leaf in leaves:
        assert leaf.dtype == np.float32 and len(reads) == (len(leaf) if table[path].stacked else 1), path
        reads.clear()
        got[tuple(path.split("/"))] = leaf
    expected = traverse_util.flatten_dict(interchange.family_import(model, family, module, weights))
    assert got.keys() == expected.keys()
    for path, leaf in got.items():
        assert leaf.tobytes() == expected[path].tobytes(), path


def test_misfits_are_found_before_anything_is_read():
    weights, reads = random_state_dict("pe_core"), []
    weights["proj"], weights["ln_post.bias"] = weights["proj"].T, weights["ln_post.bias"].astype(np.int32)
    lazy = {name: Lazy(name, array, reads) for name, array in weights.items()}
    with pytest.raises(InterchangeError) as error:
        interchange.import_leaves(*resolve("pe_core"), lazy)
    assert not reads and error.value.problems == [
        "ln_post.bias has dtype int32, expected floating point of at most 32 bits",
        "proj has shape [6, 8], expected [8, 6]",
    ]


def test_one_leaf_and_one_tensor_are_all_the_memory_it_takes():
    overrides = {"embed_dim": 192, "depth": 12, "num_heads": 3, "patch_size": 4}
    module = zoo.build("eupe_vitt16", **overrides)
    shapes = interchange.state_dict_shapes("eupe_vitt16", **overrides)
    constants = zoo.family("eupe_vitt16").layouts["official"].constants(module)

    class Source:
        dtype = np.dtype(np.float32)

        def __init__(self, name, shape):
            self.name, self.shape = name, shape

        def __array__(self, dtype=None, copy=None):
            return constants[self.name] if self.name in constants else np.full(self.shape, 0.5, np.float32)

    tensors = {name: Source(name, shape) for name, shape in shapes.items()}
    leaf, tensor = 12 * 192 * 768 * 4, 192 * 768 * 4
    leaves = interchange.import_leaves("a", zoo.family("eupe_vitt16"), module, tensors)
    tracemalloc.start()
    collections.deque(leaves, maxlen=0)  # keeps none of them
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert leaf < peak < leaf + 1.1 * tensor


def test_joint_projections_are_cut_where_transformers_has_three():
    weights = random_state_dict("vit", "transformers")
    variables = interchange.from_state_dict("eupe_vitt16", weights, **VIT)
    attn = variables["params"]["blocks"]["attn"]["qkv"]
    for i, part in enumerate("qkv"):
        kernel = weights[f"layer.1.attention.{part}_proj.weight"]
        np.testing.assert_array_equal(attn["kernel"][1, :, 8 * i : 8 * i + 8], kernel.T)
        bias = weights.get(f"layer.1.attention.{part}_proj.bias", np.zeros(8))
        np.testing.assert_array_equal(attn["bias"][1, 8 * i : 8 * i + 8], bias)
    assert "layer.1.attention.k_proj.bias" not in weights and weights["embeddings.mask_token"].shape == (1, 1, 8)


@pytest.mark.parametrize(("case", "prefix"), [("vit", "layer."), ("convnext", "stages.")])
def test_names_of_transformers_files_and_modules_are_both_read(case, prefix):
    weights = random_state_dict(case, "transformers")
    nested = {f"model.{name}" if name.startswith(prefix) else name: value for name, value in weights.items()}
    assert len(set(nested) - set(weights)) > 20
    plain, same = (interchange.family_import(*resolve(case), w) for w in (weights, nested))
    jax.tree.map(np.testing.assert_array_equal, plain, same)
    twice = {**weights, **nested}
    with pytest.raises(InterchangeError, match=f"model.{prefix}.* is there under two names"):
        interchange.family_import(*resolve(case), twice)


def test_transformers_has_no_place_for_other_periods_and_drops_what_is_never_read(caplog):
    variables = interchange.from_state_dict("dinov3_vit7b16", random_state_dict("vit_7b"), **CASES["vit_7b"][1])
    name, overrides = CASES["vit_7b"]
    with pytest.raises(InterchangeError, match="1 mismatches.*\n.*rope_periods is computed in this layout, not stored"):
        interchange.to_state_dict(name, variables, layout="transformers", **overrides)
    variables["buffers"]["rope_periods"] = rope.rope_periods(8, 100.0)
    with caplog.at_level(logging.WARNING, logger="eupe_jax"):
        out = interchange.to_state_dict(name, variables, layout="transformers", **overrides)
    assert "params/local_cls_norm/scale" in caplog.text and not [n for n in out if "local" in n]

    biased = interchange.from_state_dict("eupe_vitt16", random_state_dict("vit"), **VIT)
    biased["buffers"]["rope_periods"] = rope.rope_periods(8, 100.0)
    with caplog.at_level(logging.WARNING, logger="eupe_jax"):
        interchange.to_state_dict("eupe_vitt16", biased, layout="transformers", **VIT)
    assert "a part of params/blocks/attn/qkv/bias" in caplog.text
    with pytest.raises(InterchangeError, match="no place for params/cls_norm/"):
        interchange.state_dict_shapes("dinov3_vits16plus", layout="transformers", **CASES["vit_untied"][1])


def test_layouts_are_told_apart_by_their_names():
    for case, layout in (
        ("vit", "official"),
        ("vit", "transformers"),
        ("convnext", "transformers"),
        ("vit_bare", "official"),
    ):
        weights = {f"module.{name}": value for name, value in random_state_dict(case, layout).items()}
        assert interchange.detect_layout(resolve(case)[1], weights) == layout
    with pytest.raises(ValueError, match="'convnext' has no layout 'timm', only official, transformers"):
        interchange.state_dict_shapes("eupe_convnext_tiny", layout="timm")
    with pytest.raises(InterchangeError, match="unexpected layer.0.norm1.bias"):
        interchange.from_state_dict("eupe_vitt16", random_state_dict("vit", "transformers"), layout="official", **VIT)


def test_transforms_are_undone_exactly():
    ours = np.arange(120, dtype=np.float32).reshape(2, 3, 4, 5)
    torch_like = ours.transpose(3, 2, 0, 1)  # [O, I, h, w]
    for transform, array, theirs in (
        ("copy", ours, ours),
        ("linear", ours[0, 0], ours[0, 0].T),
        ("conv", ours, torch_like),
        ("patches", ours, torch_like.reshape(5, 24)),
        ("batched", ours, ours[None]),
    ):
        row = interchange._row(Tensor("a", "b", transform), jax.ShapeDtypeStruct(array.shape, np.float32), ())
        out = {}
        assert row.write(array, out) == [] and row.shape == theirs.shape
        np.testing.assert_array_equal(out["b"], theirs)
        np.testing.assert_array_equal(row.read(out), array)
    assert set(TRANSFORMS) == {"copy", "linear", "conv", "patches", "batched"}


def test_periods_are_copied_and_masked_bias_is_kept():
    weights = random_state_dict("vit")
    variables = interchange.from_state_dict("eupe_vitt16", weights, **VIT)
    np.testing.assert_array_equal(variables["buffers"]["rope_periods"], weights["rope_embed.periods"])
    bias = variables["params"]["blocks"]["attn"]["qkv"]["bias"]
    np.testing.assert_array_equal(bias[1], weights["blocks.1.attn.qkv.bias"])
    assert np.abs(bias[:, 8:16]).min() > 0


@pytest.mark.parametrize("prefix", ["teacher.", "module.teacher.", "teacher.backbone."])
def test_common_prefixes_are_stripped(prefix):
    weights = random_state_dict("convnext")
    name, overrides = CASES["convnext"]
    plain = interchange.from_state_dict(name, weights, **overrides)
    nested = interchange.from_state_dict(name, {prefix + k: v for k, v in weights.items()}, **overrides)
    np.testing.assert_array_equal(plain["params"]["norm"]["bias"], nested["params"]["norm"]["bias"])


def test_known_extras_are_logged_by_name_and_to_be_had(caplog):
    adapter = np.ones((2, 2), np.float32)
    weights = {**random_state_dict("vit"), "projectors.0.weight": adapter}
    weights = {f"teacher.{name}": value for name, value in weights.items()}
    with caplog.at_level(logging.WARNING, logger="eupe_jax"):
        interchange.from_state_dict("eupe_vitt16", weights, **VIT)
    assert "projectors.0.weight" in caplog.text
    assert interchange.extras(zoo.family("eupe_vitt16"), weights) == {"projectors.0.weight": adapter}
    pair = random_state_dict("image_text")
    other_tower = {name for name in pair if not name.startswith("visual.")}
    assert interchange.extras(zoo.family("pe_core_t16_384"), pair).keys() == other_tower


def test_every_misfit_is_in_one_error():
    weights = random_state_dict("vit")
    del weights["norm.bias"]
    weights["mystery"] = np.zeros(3, np.float32)
    weights["cls_token"] = weights["cls_token"][0]
    weights["mask_token"] = weights["mask_token"].astype(np.int32)
    weights["blocks.1.ls1.gamma"] = weights["blocks.1.ls1.gamma"].astype(np.float64)
    weights["blocks.0.attn.qkv.bias_mask"] = np.full(24, np.nan, np.float32)
    with pytest.raises(InterchangeError) as error:
        interchange.from_state_dict("eupe_vitt16", weights, **VIT)
    assert error.value.problems == [
        "cls_token has shape [1, 8], expected [1, 1, 8]",
        "mask_token has dtype int32, expected floating point of at most 32 bits",
        "blocks.1.ls1.gamma has dtype float64, expected floating point of at most 32 bits",
        "missing norm.bias [8]",
        "blocks.0.attn.qkv.bias_mask is not what the architecture fixes",
        "unexpected mystery [3]",
    ]
    assert "eupe_vitt16" in str(error.value) and all(p in str(error.value) for p in error.value.problems)


def test_alias_must_agree_with_its_source():
    weights = random_state_dict("convnext")
    weights["norms.3.bias"] = weights["norms.3.bias"] + 1
    name, overrides = CASES["convnext"]
    with pytest.raises(InterchangeError, match="norms.3.bias is not a copy of norm.bias"):
        interchange.from_state_dict(name, weights, **overrides)
    del weights["norms.3.bias"], weights["norm.weight"]
    with pytest.raises(InterchangeError) as error:
        interchange.from_state_dict(name, weights, **overrides)
    assert error.value.problems == ["missing norm.weight [10]", "missing norms.3.bias [10]"]


def test_export_names_what_does_not_fit():
    variables = interchange.from_state_dict("eupe_vitt16", random_state_dict("vit"), **VIT)
    del variables["params"]["norm"]["scale"]
    variables["params"]["head"] = np.zeros(4)
    variables["params"]["cls_token"] = np.zeros((1, 8))
    with pytest.raises(InterchangeError) as error:
        interchange.to_state_dict("eupe_vitt16", variables, **VIT)
    assert error.value.problems == [
        "params/cls_token has shape [1, 8], expected [1, 1, 8]",
        "missing params/norm/scale [8]",
        "unexpected params/head [4]",
    ]


def test_half_precision_weights_widen_exactly():
    weights = {k: np.asarray(jnp.asarray(v, jnp.bfloat16)) for k, v in random_state_dict("vit").items()}
    variables = interchange.from_state_dict("eupe_vitt16", weights, **VIT)
    token = variables["params"]["cls_token"]
    assert token.dtype == np.float32
    np.testing.assert_array_equal(token, weights["cls_token"].astype(np.float32))
