"""int8 networks: what they compute in PyTorch and in the runtime, which layers stay float, and the report."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("executorch", reason="the phone export needs `pip install eupe_jax[export]`")

from convert import lowering, quantize, weights  # noqa: E402
from convert.export_modules import for_export  # noqa: E402
from convert.torch_vit import VisionTransformer  # noqa: E402

SIDE = 64


def _images(count: int = 2, side: int = SIDE):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def vit_network():
    torch.manual_seed(0)
    return for_export(VisionTransformer(dim=64, depth=2, num_heads=2).eval(), SIDE, SIDE)


@pytest.fixture(scope="module")
def outlier_network():
    """What it computes has nothing odd, but one value channel of block 1 is 1000 times larger than the others before
    its projection, which makes it small again: per-token int8 there loses all the others."""
    torch.manual_seed(0)
    vit = VisionTransformer(dim=64, depth=2, num_heads=2).eval()
    with torch.no_grad():
        attention = vit.blocks[1].attn
        attention.qkv.weight[-3] *= 1000
        attention.qkv.bias[-3] *= 1000
        attention.proj.weight[:, -3] /= 1000
    return for_export(vit, SIDE, SIDE)


def _equals_the_runtime(network, layers, side):
    from executorch.runtime import Runtime

    image = _images(1, side)
    mixed = quantize.quantize(network, layers)
    lowered = lowering.lower({"forward": (mixed, (image,))})
    assert lowered.delegation["forward"]["partitions"] == 1 and not lowered.delegation["forward"]["outside"]
    got = Runtime.get().load_program(lowered.pte).load_method("forward").execute((image,))
    reference, expected = quantize.features(network, image), quantize.features(mixed, image)
    for name, value in zip(network.outputs, got, strict=True):
        # One float rounding apart, an activation rounds to the next int8: layers agree (below), whole networks nearly.
        error, apart = expected[name] - reference[name], value.numpy() - expected[name]
        assert np.linalg.norm(error) > 1e-3 * np.linalg.norm(reference[name])  # int8 does show
        assert np.linalg.norm(apart) < min(1.5 * np.linalg.norm(error), 0.05 * np.linalg.norm(reference[name]))
    return lowered


@pytest.mark.slow
@pytest.mark.parametrize("float_share", [0.0, 0.5])
def test_the_runtime_computes_what_pytorch_says_in_one_partition(encoder, float_share):
    network = for_export(weights.to_module(encoder), SIDE, SIDE)
    layers = quantize.int8_layers(network)
    kept = layers[: int(len(layers) * float_share)]
    lowered = _equals_the_runtime(network, kept, SIDE)
    int8 = sum(network.get_submodule(name).weight.numel() for name in layers if name not in kept)
    floats = sum(p.numel() for p in network.parameters()) - int8
    assert len(lowered.pte) < int8 + 4 * floats + 200_000  # tables of rotary angles, graph


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_layer_has_the_roundings_of_the_runtime(kind):
    from executorch.runtime import Runtime

    torch.manual_seed(0)
    if kind == "linear":  # every token has a scale of its own
        layer, x = torch.nn.Linear(48, 40), torch.randn(1, 9, 48) * torch.logspace(0, 4, 9)[None, :, None]
    else:
        layer, x = torch.nn.Conv2d(24, 40, 2, 2), torch.randn(1, 24, 6, 8) + 0.5
    layer = torch.nn.Sequential(layer).eval().requires_grad_(False)
    int8 = quantize.quantize(layer)
    lowered = lowering.lower({"forward": (int8, (x,))})
    assert lowered.delegation["forward"]["partitions"] == 1 and not lowered.delegation["forward"]["outside"]
    got = Runtime.get().load_program(lowered.pte).load_method("forward").execute((x,))[0]
    with torch.no_grad():
        expected, exact = int8(x), layer(x)
    channels = -1 if kind == "linear" else 1
    size = exact.norm(dim=channels)
    assert ((got - expected).norm(dim=channels) / size).max() < 1e-5
    errors = (expected - exact).norm(dim=channels) / size
    assert 1e-3 < errors.min() and errors.max() < 2e-2


def test_the_float_network_and_kept_layers_are_left_alone(vit_network):
    before = {name: value.clone() for name, value in vit_network.state_dict().items()}
    layers = quantize.int8_layers(vit_network)
    assert len(layers) == 9 and "blocks.1.fc2" in layers
    mixed = quantize.quantize(vit_network, ["blocks.1.fc2"])
    assert all(torch.equal(value, before[name]) for name, value in vit_network.state_dict().items())
    for name in layers:
        weight = mixed.get_submodule(name).weight
        is_float = type(weight) is torch.nn.Parameter and weight.dtype == torch.float32
        assert is_float == (name == "blocks.1.fc2")
    image = _images(1)
    for a, b in zip(quantize.quantize(vit_network, layers)(image[:1]), vit_network(image[:1]), strict=True):
        assert torch.equal(a, b)


def test_unknown_layers_are_refused(vit_network):
    with pytest.raises(ValueError, match="no int8 layer: blocks.9.fc1"):
        quantize.quantize(vit_network, ["blocks.9.fc1", "blocks.0.fc1"])


def test_where_int8_everywhere_is_good_enough_nothing_is_swept(vit_network):
    chosen = quantize.choose_float_layers(vit_network, _images(2), progress=False)
    assert chosen["float_layers"] == [] and chosen["sensitivity"] == {} and chosen["int8_layers"] == 9
    assert 0.999 < chosen["cosine"]["cls"] < 1 and chosen["cosine"] == chosen["cosine_all_int8"]


def test_the_sweep_finds_the_layer_that_hurts(outlier_network):
    targets = {"cls": 0.9995, "patches": 0.9995}
    chosen = quantize.choose_float_layers(outlier_network, _images(2), targets, progress=False)
    assert chosen["float_layers"] == ["blocks.1.proj"]
    assert chosen["cosine_all_int8"]["patches"] < 0.9995 <= chosen["cosine"]["patches"]
    assert set(chosen["sensitivity"]) == set(quantize.int8_layers(outlier_network))
    # the mixture is what `quantize` makes of the list
    reference = quantize.features(outlier_network, _images(2))
    again = quantize.int8_report(
        reference, quantize.features(quantize.quantize(outlier_network, chosen["float_layers"]), _images(2))
    )
    assert again["cosine"]["patches"]["mean"] == pytest.approx(chosen["cosine"]["patches"], abs=1e-7)


def test_the_sweep_takes_no_more_layers_than_needed(outlier_network):
    targets = {"cls": 0.999995, "patches": 0.999995}
    chosen = quantize.choose_float_layers(outlier_network, _images(2), targets, progress=False)
    count = len(chosen["float_layers"])
    assert 1 < count < len(quantize.int8_layers(outlier_network))
    assert chosen["float_layers"] == list(chosen["sensitivity"])[:count]
    reference = quantize.features(outlier_network, _images(2))
    fewer = quantize.features(quantize.quantize(outlier_network, chosen["float_layers"][:-1]), _images(2))
    cosine = quantize.int8_report(reference, fewer)["cosine"]
    assert any(cosine[name]["mean"] < target for name, target in targets.items())


def test_targets_out_of_reach_leave_everything_float(vit_network):
    chosen = quantize.choose_float_layers(vit_network, _images(1), {"patches": 1 - 1e-12}, progress=False)
    assert sorted(chosen["float_layers"]) == sorted(quantize.int8_layers(vit_network)) and chosen["int8_layers"] == 0


def test_networks_without_the_judged_outputs_are_refused():
    network = for_export(VisionTransformer(dim=64, depth=1, num_heads=2).eval(), 32, 32, outputs=["storage"])
    with pytest.raises(ValueError, match="none of cls, patches"):
        quantize.choose_float_layers(network, _images(1, 32), progress=False)


def _unit(angles):
    return np.stack([np.cos(angles), np.sin(angles)], -1).astype(np.float32)


def test_report_counts_cosines_and_neighbours():
    reference = {"cls": _unit(np.array([0.0, 0.1, 0.3, 0.7])), "patches": np.ones((4, 1, 2, 3), np.float32)}
    # 0.3 moves from beside 0.1 to beside 0.7, which changes its nearest (1 -> 3) and that of nobody else
    moved = {"cls": _unit(np.array([0.0, 0.1, 0.45, 0.7])), "patches": 3 * reference["patches"]}
    report = quantize.int8_report(reference, moved)
    assert report["cosine"]["cls"]["min"] == pytest.approx(np.cos(0.15), abs=1e-6)
    assert report["cosine"]["cls"]["mean"] == pytest.approx((3 + np.cos(0.15)) / 4, abs=1e-6)
    assert report["cosine"]["patches"] == {"mean": pytest.approx(1), "min": pytest.approx(1)}
    assert "knn" not in report  # of four images


def test_report_counts_shared_neighbours():
    angles = np.array([0.0, 0.1, 0.3, 0.7, 2.0, 2.11, 2.32, 2.73, 4.0])
    moved = angles + np.array([0, 0, 0.15, 0, 0, 0, 0, 0, 0])
    # pairs of nearest: image 2 moves from beside 1 to beside 3, whose set {1, 2} and that of 0 stay as they were
    knn = quantize.int8_report({"cls": _unit(angles)}, {"cls": _unit(moved)})["knn"]
    assert knn == {"images": 9, "k": 2, "top1": pytest.approx(8 / 9), "overlap": pytest.approx((8 + 1 / 2) / 9)}


@pytest.mark.parametrize("count", [8, 16, 64])
def test_unrelated_features_share_few_neighbours(count):
    rng = np.random.default_rng(0)
    reference, other = ({"cls": rng.standard_normal((count, 32)).astype(np.float32)} for _ in range(2))
    knn = quantize.int8_report(reference, other)["knn"]
    assert knn["top1"] < 0.4 and knn["overlap"] < 0.4
    assert quantize.int8_report(reference, reference)["knn"] == knn | {"top1": 1, "overlap": 1}


def test_report_without_class_token_goes_by_mean_patch():
    patches = np.random.default_rng(0).standard_normal((8, 2, 2, 8)).astype(np.float32)
    assert quantize.int8_report({"patches": patches}, {"patches": patches})["knn"]["top1"] == 1


@pytest.mark.parametrize(
    ("candidate", "words"),
    [
        ({"cls": np.ones((2, 3))}, "cls should be"),
        ({"patches": np.ones((1, 3))}, "got nothing"),
    ],
)
def test_report_refuses_what_cannot_be_compared(candidate, words):
    with pytest.raises(ValueError, match=words):
        quantize.int8_report({"cls": np.ones((1, 3), np.float32)}, candidate)
