"""The ConvNeXt students in PyTorch, readable first: arithmetic and weight names of the released ones.

`convert/export_modules.py` rewrites this module for a phone; this one is the meaning both must agree with.
"""

import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of a [B, C, H, W] map."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x_BxCxHxW: Tensor) -> Tensor:
        x = F.layer_norm(x_BxCxHxW.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, NORM_EPS)
        return x.permute(0, 3, 1, 2)


class Block(nn.Module):
    """7x7 depthwise convolution, norm, MLP over channels, layer scale, residual."""

    def __init__(self, dim: int):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x_BxCxHxW: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x_BxCxHxW).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return x_BxCxHxW + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """EUPE ConvNeXt-T/S/B and any relative.

    Args:
      depths: blocks in each of the four stages.
      dims: width of each of the four stages.
    """

    patch_size = 32  # output stride

    def __init__(self, depths: Sequence[int], dims: Sequence[int]):
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, dims[0], 4, 4), ChannelNorm(dims[0]))
        shrink = (
            nn.Sequential(ChannelNorm(a), nn.Conv2d(a, b, 2, 2)) for a, b in zip(dims[:-1], dims[1:], strict=True)
        )
        self.downsample_layers = nn.ModuleList([stem, *shrink])
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(dim) for _ in range(depth))) for depth, dim in zip(depths, dims, strict=True)
        )
        self.norm = nn.LayerNorm(dims[-1], eps=NORM_EPS)
        # The released weights carry the final norm twice, under the name of the last of four per-stage norms as well.
        self.norms = nn.ModuleList([nn.Identity(), nn.Identity(), nn.Identity(), self.norm])

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor]) -> "ConvNeXt":
        """Builds the module whose dimensions the tensors spell out, and loads them strictly.

        Raises:
          ValueError: a tensor is missing, unexpected or misshapen (all of them are named).
        """
        depths, dims = [0] * 4, [0] * 4
        for name, tensor in state_dict.items():
            if m := re.fullmatch(r"stages\.([0-3])\.\d+\.gamma", name):
                stage = int(m[1])
                depths[stage], dims[stage] = depths[stage] + 1, tensor.shape[0]
        if not all(depths):
            raise ValueError("not the weights of a ConvNeXt student: a tensor 'stages.S.B.gamma' is missing in a stage")
        module = cls(depths, dims)
        try:
            module.load_state_dict(state_dict, strict=True)
        except RuntimeError as e:
            raise ValueError(f"weights do not fit a ConvNeXt student: {e}") from None
        if not torch.equal(state_dict["norm.weight"], state_dict["norms.3.weight"]) or not torch.equal(
            state_dict["norm.bias"], state_dict["norms.3.bias"]
        ):
            raise ValueError("'norm' and 'norms.3' name one and the same final norm, but these weights differ")
        return module.eval()

    def forward(self, images_Bx3xHxW: Tensor) -> dict[str, Tensor]:
        """Features after the final norm: cls [B, C] (the pooled map), storage [B, 0, C], patches [B, H/32, W/32, C]."""
        x = images_Bx3xHxW
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        pooled, patches = self.norm(x.mean(dim=(2, 3))), self.norm(x.permute(0, 2, 3, 1))
        return {"cls": pooled, "storage": pooled[:, None][:, :0], "patches": patches}
