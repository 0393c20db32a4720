"""ConvNeXt in the form that XNNPACK takes whole and runs fastest: maps stay channels-last from the stem to the end."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convert import folding, torch_convnext

# XNNPACK has depthwise kernels of at most 25 taps and runs anything larger as a matrix product of one useful column in
# sixteen. These three combs, (rows, columns) of the 7x7 kernel, cover each of its taps once; as dilated convolutions
# with symmetric padding they need 25, 25 and 9 taps of such kernels.
COMBS = (
    ((0, 2, 4, 6), (1, 2, 3, 4, 5)),
    ((1, 3, 5), (0, 1, 2, 3, 4, 5, 6)),
    ((0, 2, 4, 6), (0, 6)),
)


class Standardise(nn.Module):
    """LayerNorm over the channels of a map without its affine part; both means are convolutions of one output."""

    def __init__(self, dim: int, eps: float = torch_convnext.NORM_EPS):
        super().__init__()
        self.register_buffer("average", torch.full((1, dim, 1, 1), 1 / dim))
        self.register_buffer("eps", torch.full((1,), eps))

    def forward(self, x_1xCxHxW: Tensor) -> Tensor:
        x = x_1xCxHxW - F.conv2d(x_1xCxHxW, self.average)
        return x * torch.rsqrt(F.conv2d(x * x, self.average, self.eps))


class Depthwise(nn.Module):
    """The 7x7 depthwise convolution as a sum of three."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.parts = nn.ModuleList()
        for rows, columns in COMBS:
            part = nn.Conv2d(
                conv.in_channels,
                conv.out_channels,
                (len(rows), len(columns)),
                padding=(3 - rows[0], 3 - columns[0]),
                dilation=(rows[1] - rows[0], columns[1] - columns[0]),
                groups=conv.groups,
                bias=not self.parts,
            )
            part.weight = nn.Parameter(conv.weight.detach()[:, :, rows][..., columns].contiguous())
            self.parts.append(part)
        self.parts[0].bias = nn.Parameter(conv.bias.detach().clone())

    def forward(self, x_1xCxHxW: Tensor) -> Tensor:
        first, *others = self.parts
        y = first(x_1xCxHxW)
        for part in others:
            y = y + part(x_1xCxHxW)
        return y


class ConvNeXtBlock(nn.Module):
    """A block with its norm, biases and LayerScale folded into its convolutions: [1, C, H, W] to the same."""

    @torch.no_grad()
    def __init__(self, block: torch_convnext.Block):
        super().__init__()
        first, second = block.pwconv1, block.pwconv2
        self.dwconv = Depthwise(block.dwconv)
        self.standardise = Standardise(first.in_features)
        self.pwconv1 = folding.pointwise(*folding.after_norm(block.norm, first.weight, first.bias))
        self.pwconv2 = folding.pointwise(*folding.before_scale(block.gamma, second.weight, second.bias))

    def forward(self, x_1xCxHxW: Tensor) -> Tensor:
        y = self.standardise(self.dwconv(x_1xCxHxW))
        return x_1xCxHxW + self.pwconv2(F.gelu(self.pwconv1(y)))


class Shrink(nn.Module):
    """Norm, then 2x2 convolution of stride 2; the norm's affine part is in the convolution."""

    @torch.no_grad()
    def __init__(self, norm: torch_convnext.ChannelNorm, conv: nn.Conv2d):
        super().__init__()
        bias = conv.bias + torch.einsum("oikl,i->o", conv.weight, norm.bias)
        self.standardise = Standardise(conv.in_channels)
        self.conv = folding.conv(conv, conv.weight * norm.weight[:, None, None], bias)

    def forward(self, x_1xCxHxW: Tensor) -> Tensor:
        return self.conv(self.standardise(x_1xCxHxW))


class Norm(nn.Module):
    """LayerNorm over the channels of a map where no layer that follows could take its affine part."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.standardise = Standardise(norm.weight.shape[0])
        self.register_buffer("weight", norm.weight.detach().clone()[:, None, None])
        self.register_buffer("bias", norm.bias.detach().clone()[:, None, None])

    def forward(self, x_1xCxHxW: Tensor) -> Tensor:
        return self.standardise(x_1xCxHxW) * self.weight + self.bias


class ExportConvNeXt(nn.Module):
    """forward(image [1, 3, H, W]) -> those of cls [1, C], patches [1, H/32, W/32, C] in `outputs`."""

    @torch.no_grad()
    def __init__(
        self,
        convnext: torch_convnext.ConvNeXt,
        outputs: tuple[str, ...],
        pixels: folding.Pixels | None,
    ):
        super().__init__()
        self.outputs, self.uint8_input = outputs, pixels is not None
        (stem, stem_norm), *shrink = convnext.downsample_layers
        self.stem = nn.Sequential(folding.conv(stem, *folding.of_pixels(stem, pixels)), Norm(stem_norm))
        self.shrink = nn.ModuleList(Shrink(norm, conv) for norm, conv in shrink)
        self.stages = nn.ModuleList(nn.Sequential(*map(ConvNeXtBlock, stage)) for stage in convnext.stages)
        self.norm = Norm(convnext.norm)

    def forward(self, image_1x3xHxW: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(image_1x3xHxW.float() if self.uint8_input else image_1x3xHxW)
        x = self.stages[0](x)
        for shrink, stage in zip(self.shrink, list(self.stages)[1:], strict=True):
            x = stage(shrink(x))
        pick = {
            "cls": lambda: self.norm(x.mean(dim=(2, 3), keepdim=True)).flatten(1),
            "patches": lambda: self.norm(x).permute(0, 2, 3, 1),
        }
        return tuple(pick[name]() for name in self.outputs)
