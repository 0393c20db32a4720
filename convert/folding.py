"""Weights of layers that do the work of their neighbours too: norms, layer scale and normalised pixels cost nothing."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Pixels = tuple[Sequence[float], Sequence[float]]  # mean and std of each channel, for pixels in [0, 1]


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A layer of these weights [out, in] and biases [out]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    return _filled(layer, weight, bias)


def conv(like: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """An unpadded convolution of that kernel size and stride, weight [out, in, h, w]."""
    layer = nn.Conv2d(like.in_channels, like.out_channels, like.kernel_size, like.stride)
    return _filled(layer, weight, bias)


def pointwise(weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """What `linear` does with weights [out, in], for the channels of a map."""
    return _filled(nn.Conv2d(weight.shape[1], weight.shape[0], 1), weight[:, :, None, None], bias)


def _filled(layer: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer


def after_norm(norm: nn.Module, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [out, in] and bias [out] of a linear layer that does the affine part of the norm before it too."""
    return weight * norm.weight, bias + weight @ norm.bias


def before_scale(gamma: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [out, in] and bias [out] of a linear layer that does the layer scale [out] after it too."""
    return weight * gamma[:, None], bias * gamma


def centred(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [out, ...] and bias [out] of a layer whose output has no mean over its channels."""
    return weight - weight.mean(0, keepdim=True), bias - bias.mean()


def of_pixels(first: nn.Conv2d, pixels: Pixels | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that reads the image, be it normalised or (with `pixels`) bytes of 0..255."""
    if pixels is None:
        return first.weight, first.bias
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in pixels)
    weight = first.weight.double() / std
    return (weight / 255).float(), (first.bias - (weight * mean).sum((1, 2, 3))).float()
