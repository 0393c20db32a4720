"""The vision transformer students in PyTorch, readable first: arithmetic and weight names of the released ones.

`convert/export_modules.py` rewrites this module for a phone; this one is the meaning both must agree with.
Shapes: B images, T = 1 + R + h * w tokens (class, storage, patches), D width, N heads of size hd = D / N.
"""

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaskedBiasLinear(nn.Linear):
    """The qkv projection. Its key bias never acts: `bias_mask` is 1 for queries and values and 0 for keys."""

    def __init__(self, dim: int):
        super().__init__(dim, 3 * dim)
        mask = torch.ones(3 * dim)
        mask[dim : 2 * dim] = 0
        self.register_buffer("bias_mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias * self.bias_mask)


class RopeEmbedding(nn.Module):
    """Axial rotary angles of patch centres in [-1, 1] x [-1, 1]. The periods are weights: loaded, not computed."""

    def __init__(self, head_dim: int, base: float = 100.0):
        super().__init__()
        count = head_dim // 4
        self.register_buffer("periods", base ** (torch.arange(count, dtype=torch.float32) / count))

    def forward(self, h: int, w: int) -> tuple[Tensor, Tensor]:
        """Sine and cosine tables, each [h * w, hd], rows in raster order."""
        ys = (torch.arange(h, device=self.periods.device) + 0.5) / h * 2 - 1
        xs = (torch.arange(w, device=self.periods.device) + 0.5) / w * 2 - 1
        centres_PxA = torch.stack(torch.meshgrid(ys, xs, indexing="ij"), dim=-1).reshape(h * w, 2)
        angles_PxAxF = 2 * math.pi * centres_PxA[:, :, None] / self.periods
        angles = angles_PxAxF.reshape(h * w, -1).tile(2)
        return angles.sin(), angles.cos()


def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Rotates [..., P, hd] by pairing channel i with channel i + hd / 2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    """Self-attention over [B, T, D] with rotary positions for patch tokens, which come last."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = MaskedBiasLinear(dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BxTxD: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        B, T, D = x_BxTxD.shape
        prefix = T - sin.shape[0]  # the class and storage tokens have no place in the image: not rotated
        q, k, v = self.qkv(x_BxTxD).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = (torch.cat([t[:, :, :prefix], rotate(t[:, :, prefix:], sin, cos)], dim=2) for t in (q, k))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, D))


class Mlp(nn.Module):
    """Two layers with an exact GELU between, over the last axis."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor for every channel of the last axis."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block: [B, T, D] to the same."""

    def __init__(self, dim: int, num_heads: int, hidden: int, norm_eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, hidden)
        self.ls2 = LayerScale(dim)

    def forward(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), sin, cos))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbedding(nn.Module):
    """[B, 3, H, W] -> [B, D, H / p, W / p]."""

    def __init__(self, dim: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images)


class VisionTransformer(nn.Module):
    """EUPE ViT-T/S/B and every relative with a plain MLP, a masked key bias and one final norm.

    Args:
      dim, depth, num_heads: width, number of blocks, heads; dim / num_heads must be a multiple of 4.
      hidden: width inside the MLP (4 * dim in the released models).
      patch_size: side of a patch in pixels.
      num_storage_tokens: storage (register) tokens after the class token.
      norm_eps: epsilon of every LayerNorm (1e-5 in the released models).
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        hidden: int | None = None,
        patch_size: int = 16,
        num_storage_tokens: int = 4,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if num_storage_tokens:
            self.storage_tokens = nn.Parameter(torch.zeros(1, num_storage_tokens, dim))
        else:  # such a model has no tensor of that name
            self.register_buffer("storage_tokens", torch.zeros(1, 0, dim), persistent=False)
        self.mask_token = nn.Parameter(torch.zeros(1, dim))  # only for masked training; kept so that weights round-trip
        self.patch_embed = PatchEmbedding(dim, patch_size)
        self.rope_embed = RopeEmbedding(dim // num_heads)
        self.blocks = nn.ModuleList(Block(dim, num_heads, hidden or 4 * dim, norm_eps) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=norm_eps)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], norm_eps: float = 1e-5) -> "VisionTransformer":
        """Builds the module whose dimensions the tensors spell out, and loads them strictly.

        Raises:
          ValueError: a tensor is missing, unexpected or misshapen (all of them are named).
        """
        try:
            dim, _, patch_size, _ = state_dict["patch_embed.proj.weight"].shape
            head_dim = 4 * state_dict["rope_embed.periods"].shape[0]
            hidden = state_dict["blocks.0.mlp.fc1.weight"].shape[0]
            num_storage_tokens = state_dict["storage_tokens"].shape[1] if "storage_tokens" in state_dict else 0
        except KeyError as e:
            kind = "a vision transformer student (plain MLP, masked key bias)"
            raise ValueError(f"not the weights of {kind}: tensor {e} is missing") from None
        if dim % head_dim:
            raise ValueError(f"width {dim} does not divide into heads of {head_dim}, as 'rope_embed.periods' says")
        depth = sum(re.fullmatch(r"blocks\.\d+\.norm1\.weight", name) is not None for name in state_dict)
        module = cls(dim, depth, dim // head_dim, hidden, patch_size, num_storage_tokens, norm_eps)
        try:
            module.load_state_dict(state_dict, strict=True)
        except RuntimeError as e:
            raise ValueError(f"weights do not fit a vision transformer student: {e}") from None
        return module.eval()

    def forward(self, images_Bx3xHxW: Tensor) -> dict[str, Tensor]:
        """Features after the final norm: cls [B, D], storage [B, R, D], patches [B, h, w, D].

        Images are already normalised with the model's pixel mean and std; rows and columns beyond a whole patch are
        left out, as in the released models.
        """
        x = self.patch_embed(images_Bx3xHxW)
        B, D, h, w = x.shape
        patches = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(B, -1, -1), self.storage_tokens.expand(B, -1, -1), patches], dim=1)
        sin, cos = self.rope_embed(h, w)
        for block in self.blocks:
            x = block(x, sin, cos)
        x = self.norm(x)
        prefix = x.shape[1] - h * w
        return {"cls": x[:, 0], "storage": x[:, 1:prefix], "patches": x[:, prefix:].reshape(B, h, w, D)}
