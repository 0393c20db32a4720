"""int8 layers for a phone: which of them to quantise, how, and what it does to the features.

Weights are int8 with one scale a channel, symmetric, made here. Activations are int8 with a scale and zero point for
each token (linear layers) or image (convolutions), computed while the network runs ("dynamic"), so that no calibration
images are needed and no range can be missed. Everything between those layers stays float, and so do depthwise
convolutions. In PyTorch the quantised network computes with the very roundings that XNNPACK makes, so that accuracy can
be judged, and layers chosen, before anything is exported.
"""

import copy
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerAxis
from tqdm import tqdm

from convert import gates

# Half the error that the gate allows: layers are chosen on fewer images than they are gated on.
TARGETS = {name: (1 + least) / 2 for name, least in gates.INT8_COSINE.items()}
KNN_IMAGES = 8  # fewer share their neighbours by chance


def int8_layers(network: nn.Module) -> list[str]:
    """Names of the layers that can be int8, in the order in which they were made."""
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) or isinstance(module, nn.Conv2d) and module.groups == 1
    ]


class Int8Conv(nn.Module):
    """A convolution of an image's activations and of weights in int8, in the operators that XNNPACK recognises."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        self.bias = conv.bias
        weight = conv.weight.detach()
        scale = weight.abs().amax(dim=(1, 2, 3)).clamp(min=1e-12) / 127
        self.register_buffer("weight", (weight / scale[:, None, None, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.zeros(len(scale), dtype=torch.int64))

    def forward(self, x_1xCxHxW: Tensor) -> Tensor:
        ops, byte = torch.ops.quantized_decomposed, (-128, 127, torch.int8)
        scale, zero = ops.choose_qparams(x_1xCxHxW, -128, 127, 1e-12, torch.int8)
        x = ops.dequantize_per_tensor(ops.quantize_per_tensor(x_1xCxHxW, scale, zero, *byte), scale, zero, *byte)
        weight = ops.dequantize_per_channel(self.weight, self.scale, self.zero_point, 0, -127, 127, torch.int8)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation)


@torch.no_grad()
def quantize(network: nn.Module, keep_float: Collection[str] = ()) -> nn.Module:
    """A copy of an export network (`for_export`) whose layers are int8, but for those named in `keep_float`.

    The copy runs in PyTorch and goes through `torch.export.export` and XNNPACK's partitioner like the float one.

    Raises:
      ValueError: `keep_float` names something that is no layer of this network, or none that could be int8.
    """
    layers = int8_layers(network)
    if unknown := sorted(set(keep_float) - set(layers)):
        raise ValueError(f"keep_float names no int8 layer: {', '.join(unknown)}; layers are {', '.join(layers)}")
    chosen = set(layers) - set(keep_float)
    config = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0))
    quantised = copy.deepcopy(network)
    quantize_(quantised, config, filter_fn=lambda module, name: isinstance(module, nn.Linear) and name in chosen)
    for name in chosen:
        if isinstance(conv := quantised.get_submodule(name), nn.Conv2d):
            quantised.set_submodule(name, Int8Conv(conv))
    return quantised


@torch.no_grad()
def features(network: nn.Module, images_Nx3xHxW: Tensor) -> dict[str, np.ndarray]:
    """Outputs of an export network for each image, one at a time as on the phone, by name."""
    outputs = [network(image[None]) for image in images_Nx3xHxW]
    return {
        name: torch.cat(parts).numpy() for name, parts in zip(network.outputs, zip(*outputs, strict=True), strict=True)
    }


def _falls_short(cosines: Mapping[str, float], targets: Mapping[str, float]) -> bool:
    return any(not cosine >= targets[name] for name, cosine in cosines.items())  # a NaN always does


def _harm(cosines: Mapping[str, float], targets: Mapping[str, float]) -> float:
    """The largest error as a share of what its target allows; a NaN is worst."""
    return max((1 - c) / (1 - targets[name]) if c == c else math.inf for name, c in cosines.items())


def harm_of_int8(network: nn.Module, images_Nx3xHxW: Tensor, targets: Mapping[str, float] = TARGETS) -> float:
    """Error of the network with all layers int8, relative to what the targets allow: above 1 some must stay float."""
    compared = gates.compare(features(network, images_Nx3xHxW), features(quantize(network), images_Nx3xHxW))
    return _harm({name: compared[name]["mean_cosine"] for name in network.outputs if name in targets}, targets)


def choose_float_layers(
    network: nn.Module, images_Nx3xHxW: Tensor, targets: Mapping[str, float] = TARGETS, progress: bool = True
) -> dict[str, Any]:
    """The fewest layers to keep float so that features of real images stay close to the float network's.

    If int8 everywhere misses a target, every layer is measured quantised alone; layers then turn float in the order of
    the harm they do, and the shortest such list that meets the targets is found by bisection.

    Args:
      network: from `for_export`, float; its outputs must hold the class token or the patches.
      images_Nx3xHxW: what the network takes (normalised pixels, or bytes); 4 to 16 photographs are enough.
      targets: least mean cosine of each output; those that the network does not return are passed over.

    Returns:
      "float_layers": names for `quantize`, most harmful first (all layers if nothing less meets the targets);
      "int8_layers": how many are left; "cosine": of the chosen mixture, by output; "cosine_all_int8": with no float
      layer; "sensitivity": 1 - cosine of each layer quantised alone, by layer and output, most harmful first; empty
      where no sweep was needed.

    Raises:
      ValueError: the network returns none of the targets' outputs.
    """
    judged = [name for name in network.outputs if name in targets]
    if not judged:
        raise ValueError(f"none of {', '.join(targets)} is among the network's outputs, {', '.join(network.outputs)}")
    layers, mixture = int8_layers(network), quantize(network)
    as_float = {name: network.get_submodule(name) for name in layers}
    as_int8 = {name: mixture.get_submodule(name) for name in layers}
    reference = features(network, images_Nx3xHxW)

    def cosines(int8: Collection[str]) -> dict[str, float]:
        for name in layers:
            mixture.set_submodule(name, as_int8[name] if name in int8 else as_float[name])
        compared = gates.compare(reference, features(mixture, images_Nx3xHxW))
        return {name: compared[name]["mean_cosine"] for name in judged}

    everything = found = cosines(layers)
    sensitivity: dict[str, dict[str, float]] = {}
    count = 0
    if _falls_short(everything, targets):
        for name in tqdm(layers, desc="int8 sensitivity", unit="layer", disable=not progress):
            sensitivity[name] = {output: 1 - cosine for output, cosine in cosines([name]).items()}
        harm = {n: _harm({o: 1 - e for o, e in errors.items()}, targets) for n, errors in sensitivity.items()}
        sensitivity = {name: sensitivity[name] for name in sorted(layers, key=harm.__getitem__, reverse=True)}
        order = list(sensitivity)
        below, count = 0, len(order)  # `below` float layers are too few; `count` are enough
        found = cosines([])
        while count - below > 1:
            middle = (below + count) // 2
            tried = cosines(order[middle:])
            if _falls_short(tried, targets):
                below = middle
            else:
                count, found = middle, tried
    return {
        "float_layers": list(sensitivity)[:count],
        "int8_layers": len(layers) - count,
        "cosine": found,
        "cosine_all_int8": everything,
        "sensitivity": sensitivity,
    }


def _neighbours(features_NxD: np.ndarray, k: int) -> np.ndarray:
    """Indices [N, k] of every image's nearest others by cosine, nearest first."""
    unit = features_NxD.astype(np.float64)
    unit = unit / np.linalg.norm(unit, axis=-1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    return np.argsort(-similarity, axis=-1, kind="stable")[:, :k]


def int8_report(reference: gates.Features, candidate: gates.Features, k: int = 10) -> dict[str, Any]:
    """How far int8 features of N real images are from the float ones.

    Returns:
      "cosine": by output, the mean and min over images (and positions) of the cosine between corresponding tokens.
      "knn": for `images` images by class token (mean patch where there is none): `top1`, the share whose nearest
        neighbour among the others is the same, and `overlap`, the mean share of their `k` nearest that both find.
        `k` is at most a quarter of the others, or the share would be high by itself; left out below 8 images.

    Raises:
      GateError: an output is missing in `candidate`, or has another shape there.
    """
    compared = gates.compare(reference, candidate)
    report: dict[str, Any] = {
        "cosine": {name: {"mean": c["mean_cosine"], "min": c["cosine"]} for name, c in compared.items()}
    }
    N = len(next(iter(reference.values())))
    if N < KNN_IMAGES:
        return report
    k = max(1, min(k, (N - 1) // 4))
    ours, theirs = (
        _neighbours(side["cls"] if "cls" in reference else side["patches"].mean(axis=(1, 2)), k)
        for side in (reference, candidate)
    )
    overlap = [len(set(a) & set(b)) / k for a, b in zip(ours, theirs, strict=True)]
    top1 = float((ours[:, 0] == theirs[:, 0]).mean())
    return report | {"knn": {"images": N, "k": k, "top1": top1, "overlap": float(np.mean(overlap))}}
