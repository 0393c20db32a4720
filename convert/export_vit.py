"""The vision transformer in the form that XNNPACK takes whole and runs fastest."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convert import folding, torch_vit


class Standardise(nn.Module):
    """LayerNorm of centred tokens without its affine part; the mean square is a linear layer of one output."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.register_buffer("average", torch.full((1, dim), 1 / dim))
        self.register_buffer("eps", torch.full((1,), eps))

    def forward(self, x_1xTxD: Tensor) -> Tensor:
        return x_1xTxD * torch.rsqrt(F.linear(x_1xTxD * x_1xTxD, self.average, self.eps))


class VitBlock(nn.Module):
    """Takes and returns tokens of zero mean over their channels."""

    @torch.no_grad()
    def __init__(self, block: torch_vit.Block):
        super().__init__()
        qkv, proj, mlp = block.attn.qkv, block.attn.proj, block.mlp
        weight, bias = folding.after_norm(block.norm1, qkv.weight, qkv.bias * qkv.bias_mask)
        dim, self.num_heads = weight.shape[1], block.attn.num_heads
        q_scale = torch.ones(3 * dim)
        q_scale[:dim] = (dim // self.num_heads) ** -0.5
        self.standardise = Standardise(dim, block.norm1.eps)
        self.qkv = folding.linear(weight * q_scale[:, None], bias * q_scale)
        self.proj = folding.linear(*folding.centred(*folding.before_scale(block.ls1.gamma, proj.weight, proj.bias)))
        self.fc1 = folding.linear(*folding.after_norm(block.norm2, mlp.fc1.weight, mlp.fc1.bias))
        fc2 = folding.before_scale(block.ls2.gamma, mlp.fc2.weight, mlp.fc2.bias)
        self.fc2 = folding.linear(*folding.centred(*fc2))

    def forward(self, x_1xTxD: Tensor, sin_Tx1xK: Tensor, cos_Tx1xK: Tensor) -> Tensor:
        _, T, D = x_1xTxD.shape
        K = D // self.num_heads
        qkv = self.qkv(self.standardise(x_1xTxD))
        q, k, v = (qkv[:, :, i * D : (i + 1) * D].reshape(T, self.num_heads, K) for i in range(3))
        q, k = (t * cos_Tx1xK + torch.cat([t[:, :, K // 2 :], t[:, :, : K // 2]], 2) * sin_Tx1xK for t in (q, k))
        attention = torch.softmax(torch.bmm(q.transpose(0, 1), k.permute(1, 2, 0)), dim=-1)  # [heads, T, T]
        y = torch.bmm(attention, v.transpose(0, 1)).transpose(0, 1).reshape(1, T, D)
        x = x_1xTxD + self.proj(y)
        return x + self.fc2(F.gelu(self.fc1(self.standardise(x))))


class ExportVit(nn.Module):
    """forward(image [1, 3, H, W]) -> those of cls [1, D], storage [1, R, D], patches [1, h, w, D] in `outputs`."""

    @torch.no_grad()
    def __init__(
        self,
        vit: torch_vit.VisionTransformer,
        height: int,
        width: int,
        outputs: tuple[str, ...],
        pixels: folding.Pixels | None,
    ):
        super().__init__()
        self.outputs, self.uint8_input = outputs, pixels is not None
        self.h, self.w = height // vit.patch_size, width // vit.patch_size
        first = vit.patch_embed.proj
        self.patch_embed = folding.conv(first, *folding.centred(*folding.of_pixels(first, pixels)))
        prefix = torch.cat([vit.cls_token, vit.storage_tokens], dim=1)
        self.register_buffer("prefix", prefix - prefix.mean(-1, keepdim=True))
        sin, cos = vit.rope_embed(self.h, self.w)
        sin[:, : sin.shape[1] // 2] *= -1  # the sign of the rotation's second half, so that halves are only swapped
        still = torch.zeros(prefix.shape[1], sin.shape[1])
        self.register_buffer("sin", torch.cat([still, sin])[:, None])
        self.register_buffer("cos", torch.cat([still + 1, cos])[:, None])
        self.blocks = nn.ModuleList(VitBlock(block) for block in vit.blocks)
        self.standardise = Standardise(prefix.shape[-1], vit.norm.eps)
        self.register_buffer("norm_weight", vit.norm.weight.detach().clone())
        self.register_buffer("norm_bias", vit.norm.bias.detach().clone())

    def forward(self, image_1x3xHxW: Tensor) -> tuple[Tensor, ...]:
        image = image_1x3xHxW.float() if self.uint8_input else image_1x3xHxW
        x = torch.cat([self.prefix, self.patch_embed(image).flatten(2).transpose(1, 2)], dim=1)
        for block in self.blocks:
            x = block(x, self.sin, self.cos)
        x = self.standardise(x) * self.norm_weight + self.norm_bias
        prefix = self.prefix.shape[1]
        pick = {
            "cls": lambda: x[:, :1].flatten(1),
            "storage": lambda: x[:, 1:prefix],
            "patches": lambda: x[:, prefix:].reshape(1, self.h, self.w, -1),
        }
        return tuple(pick[name]() for name in self.outputs)
