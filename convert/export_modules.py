"""The same networks once more, in the forms that XNNPACK takes whole: one image, one fixed size, constants folded.

Built from the readable modules, never trained or saved. What differs, and why:
  * LayerNorm is `mean(dim=(2, 3), keepdim=True)` over [1, T, 1, D], the one reduction the delegate takes (it never
    takes `native_layer_norm`). Its affine part moves into the linear layer or convolution that follows.
  * Attention is rank-3 `bmm` over [heads, tokens, head width], with slices where the readable module splits: the
    delegate takes neither `split`, nor rank-4 products, nor the softmax of `scaled_dot_product_attention`.
  * 1 / sqrt(head width), LayerScale and the key-bias mask are folded into weights; rotary tables are constants.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convert import torch_convnext, torch_vit

TOKENS = ("cls", "storage", "patches")
Pixels = tuple[Sequence[float], Sequence[float]]  # mean and std of each channel, for pixels in [0, 1]


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer


def _after_norm(norm: nn.Module, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear layer that does the affine part of the norm before it too."""
    return weight * norm.weight, bias + weight @ norm.bias


def _conv(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """A copy of the (unpadded) convolution with other weights."""
    copy = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride)
    copy.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    copy.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return copy


def _first_conv(conv: nn.Conv2d, pixels: Pixels | None) -> nn.Conv2d:
    """The convolution that reads the image: normalised, or as 0..255 with the normalisation in its weights."""
    if pixels is None:
        return _conv(conv, conv.weight, conv.bias)
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in pixels)
    weight = conv.weight.double() / std
    return _conv(conv, (weight / 255).float(), (conv.bias - (weight * mean).sum((1, 2, 3))).float())


def standardise(x_1xTxD: Tensor, eps: float) -> Tensor:
    """LayerNorm over D without its affine part."""
    _, T, D = x_1xTxD.shape
    x = x_1xTxD.reshape(1, T, 1, D)
    x = x - x.mean(dim=(2, 3), keepdim=True)
    variance = (x * x).mean(dim=(2, 3), keepdim=True)
    return (x * torch.rsqrt(variance + eps)).reshape(1, T, D)


class VitBlock(nn.Module):
    @torch.no_grad()
    def __init__(self, block: torch_vit.Block):
        super().__init__()
        self.eps, self.num_heads = block.norm1.eps, block.attn.num_heads
        qkv = block.attn.qkv
        weight, bias = _after_norm(block.norm1, qkv.weight, qkv.bias * qkv.bias_mask)
        dim = weight.shape[1]
        q_scale = torch.ones(3 * dim)
        q_scale[:dim] = (dim // self.num_heads) ** -0.5
        self.qkv = _linear(weight * q_scale[:, None], bias * q_scale)
        gamma = block.ls1.gamma
        self.proj = _linear(block.attn.proj.weight * gamma[:, None], block.attn.proj.bias * gamma)
        self.fc1 = _linear(*_after_norm(block.norm2, block.mlp.fc1.weight, block.mlp.fc1.bias))
        gamma = block.ls2.gamma
        self.fc2 = _linear(block.mlp.fc2.weight * gamma[:, None], block.mlp.fc2.bias * gamma)

    def forward(self, x_1xTxD: Tensor, sin_1xTxK: Tensor, cos_1xTxK: Tensor) -> Tensor:
        _, T, D = x_1xTxD.shape
        K = D // self.num_heads
        qkv = self.qkv(standardise(x_1xTxD, self.eps))
        q, k, v = (
            qkv[:, :, i * D : (i + 1) * D].reshape(T, self.num_heads, K).transpose(0, 1) for i in range(3)
        )  # [heads, T, K]
        q, k = (t * cos_1xTxK + torch.cat([t[:, :, K // 2 :], t[:, :, : K // 2]], 2) * sin_1xTxK for t in (q, k))
        y = torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), dim=-1), v)
        x = x_1xTxD + self.proj(y.transpose(0, 1).reshape(1, T, D))
        return x + self.fc2(F.gelu(self.fc1(standardise(x, self.eps))))


class ExportVit(nn.Module):
    """forward(image [1, 3, H, W]) -> those of cls [1, D], storage [1, R, D], patches [1, h, w, D] in `outputs`."""

    @torch.no_grad()
    def __init__(
        self,
        vit: torch_vit.VisionTransformer,
        height: int,
        width: int,
        outputs: tuple[str, ...],
        pixels: Pixels | None,
    ):
        super().__init__()
        self.outputs, self.uint8_input = outputs, pixels is not None
        self.h, self.w, self.eps = height // vit.patch_size, width // vit.patch_size, vit.norm.eps
        self.patch_embed = _first_conv(vit.patch_embed.proj, pixels)
        prefix = torch.cat([vit.cls_token, vit.storage_tokens], dim=1)
        self.register_buffer("prefix", prefix.clone())
        sin, cos = vit.rope_embed(self.h, self.w)
        sin[:, : sin.shape[1] // 2] *= -1  # the sign of the rotation's second half, so that halves are only swapped
        still = torch.zeros(prefix.shape[1], sin.shape[1])
        self.register_buffer("sin", torch.cat([still, sin])[None])
        self.register_buffer("cos", torch.cat([still + 1, cos])[None])
        self.blocks = nn.ModuleList(VitBlock(block) for block in vit.blocks)
        self.register_buffer("norm_weight", vit.norm.weight.detach().clone())
        self.register_buffer("norm_bias", vit.norm.bias.detach().clone())

    def forward(self, image_1x3xHxW: Tensor) -> tuple[Tensor, ...]:
        x = self.patch_embed(image_1x3xHxW.float() if self.uint8_input else image_1x3xHxW).flatten(2).transpose(1, 2)
        x = torch.cat([self.prefix, x], dim=1)
        for block in self.blocks:
            x = block(x, self.sin, self.cos)
        x = standardise(x, self.eps) * self.norm_weight + self.norm_bias
        prefix = self.prefix.shape[1]
        pick = {
            "cls": lambda: x[:, :1].flatten(1),
            "storage": lambda: x[:, 1:prefix],
            "patches": lambda: x[:, prefix:].reshape(1, self.h, self.w, -1),
        }
        return tuple(pick[name]() for name in self.outputs)


def _standardise_map(x_1xCxHxW: Tensor) -> Tensor:
    """LayerNorm over the channels of a map without its affine part: [1, H * W, C]."""
    return standardise(x_1xCxHxW.flatten(2).transpose(1, 2), torch_convnext.NORM_EPS)


def _to_map(x_1xTxC: Tensor, like_1xCxHxW: Tensor) -> Tensor:
    _, _, H, W = like_1xCxHxW.shape
    return x_1xTxC.transpose(1, 2).reshape(1, -1, H, W)


class ConvNeXtBlock(nn.Module):
    @torch.no_grad()
    def __init__(self, block: torch_convnext.Block):
        super().__init__()
        self.dwconv = block.dwconv
        self.pwconv1 = _linear(*_after_norm(block.norm, block.pwconv1.weight, block.pwconv1.bias))
        self.pwconv2 = _linear(block.pwconv2.weight * block.gamma[:, None], block.pwconv2.bias * block.gamma)

    def forward(self, x_1xCxHxW: Tensor) -> Tensor:
        y = _standardise_map(self.dwconv(x_1xCxHxW))
        return x_1xCxHxW + _to_map(self.pwconv2(F.gelu(self.pwconv1(y))), x_1xCxHxW)


class Shrink(nn.Module):
    """Norm, then 2x2 convolution of stride 2; the norm's affine part is in the convolution."""

    @torch.no_grad()
    def __init__(self, norm: torch_convnext.ChannelNorm, conv: nn.Conv2d):
        super().__init__()
        bias = conv.bias + torch.einsum("oikl,i->o", conv.weight, norm.bias)
        self.conv = _conv(conv, conv.weight * norm.weight[:, None, None], bias)

    def forward(self, x_1xCxHxW: Tensor) -> Tensor:
        return self.conv(_to_map(_standardise_map(x_1xCxHxW), x_1xCxHxW))


class ExportConvNeXt(nn.Module):
    """forward(image [1, 3, H, W]) -> those of cls [1, C], patches [1, H/32, W/32, C] in `outputs`."""

    @torch.no_grad()
    def __init__(
        self,
        convnext: torch_convnext.ConvNeXt,
        height: int,
        width: int,
        outputs: tuple[str, ...],
        pixels: Pixels | None,
    ):
        super().__init__()
        self.outputs, self.uint8_input = outputs, pixels is not None
        self.h, self.w = height // convnext.patch_size, width // convnext.patch_size
        stem, stem_norm = convnext.downsample_layers[0]
        self.stem = _first_conv(stem, pixels)
        self.register_buffer("stem_weight", stem_norm.weight.detach().clone())
        self.register_buffer("stem_bias", stem_norm.bias.detach().clone())
        self.shrink = nn.ModuleList(Shrink(norm, conv) for norm, conv in list(convnext.downsample_layers)[1:])
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvNeXtBlock(block) for block in stage)) for stage in convnext.stages
        )
        self.register_buffer("norm_weight", convnext.norm.weight.detach().clone())
        self.register_buffer("norm_bias", convnext.norm.bias.detach().clone())

    def forward(self, image_1x3xHxW: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(image_1x3xHxW.float() if self.uint8_input else image_1x3xHxW)
        x = _to_map(_standardise_map(x) * self.stem_weight + self.stem_bias, x)
        x = self.stages[0](x)
        for shrink, stage in zip(self.shrink, list(self.stages)[1:], strict=True):
            x = stage(shrink(x))
        found = {}
        if "cls" in self.outputs:
            found["cls"] = x.mean(dim=(2, 3), keepdim=True).flatten(2).transpose(1, 2)
        if "patches" in self.outputs:
            found["patches"] = x.flatten(2).transpose(1, 2)
        tokens = standardise(torch.cat([*found.values()], dim=1), torch_convnext.NORM_EPS)
        tokens = tokens * self.norm_weight + self.norm_bias
        pick = {
            "cls": lambda: tokens[:, :1].flatten(1),
            "patches": lambda: tokens[:, -self.h * self.w :].reshape(1, self.h, self.w, -1),
        }
        return tuple(pick[name]() for name in self.outputs)


def for_export(
    module: torch_vit.VisionTransformer | torch_convnext.ConvNeXt,
    height: int,
    width: int,
    *,
    outputs: Sequence[str] | None = None,
    uint8_input: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ExportVit | ExportConvNeXt:
    """The rewritten network for one image of [1, 3, height, width]; `outputs` names what its forward returns.

    Args:
      outputs: which of "cls", "storage", "patches" to return; always in that order. Default: all that the model has.
      uint8_input: forward takes uint8 RGB of 0..255; the normalisation by mean and std is in the first convolution.
      mean, std: of each channel, for pixels in [0, 1]; needed with `uint8_input`.

    Raises:
      ValueError: a side is not a positive multiple of the patch size (a phone would silently see a cropped image), an
        output that the model does not have, or `uint8_input` without mean and std.
    """
    for name, side in (("height", height), ("width", width)):
        if side <= 0 or side % module.patch_size:
            raise ValueError(f"{name} {side} is not a positive multiple of the patch size, {module.patch_size}")
    is_vit = isinstance(module, torch_vit.VisionTransformer)
    available = TOKENS if is_vit and module.storage_tokens.shape[1] else ("cls", "patches")
    chosen = available if outputs is None else tuple(outputs)
    if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(available):
        raise ValueError(f"outputs {', '.join(chosen) or 'none'}: name some of {', '.join(available)}, each once")
    chosen = tuple(name for name in TOKENS if name in chosen)
    if uint8_input and (mean is None or std is None):
        raise ValueError("uint8_input needs the mean and std of the pixels")
    kind = ExportVit if is_vit else ExportConvNeXt
    network = kind(module, height, width, chosen, (mean, std) if uint8_input else None)
    return network.eval().requires_grad_(False)
