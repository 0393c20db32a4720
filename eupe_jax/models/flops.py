"""Floating-point operations of one forward pass, counted from the architecture: 2 for every multiply-add.

Counted are the matrix products, convolutions and attention products of what `module(images)` returns. Norms,
activations, softmax, rotations and position tables are left out, as is usual (a per cent or two of the total).
"""

from collections.abc import Callable

import flax.linen as nn

from eupe_jax.models.convnext import ConvNeXt
from eupe_jax.models.dune import Dune
from eupe_jax.models.layers import ffn_hidden
from eupe_jax.models.perception_encoder import PerceptionEncoder
from eupe_jax.models.radio import Radio
from eupe_jax.models.siglip import SiglipVision
from eupe_jax.models.vit import VisionTransformer


def forward_flops(module: nn.Module, side: int) -> int:
    """FLOPs of an encoder of the zoo for one image of `side` x `side` pixels.

    Raises:
      ValueError: nobody has said how to count this kind of module.
    """
    if type(module) not in _COUNTS:
        known = ", ".join(kind.__name__ for kind in _COUNTS)
        raise ValueError(f"no FLOPs are known for {type(module).__name__}: add it to models/flops.py (known: {known})")
    return _COUNTS[type(module)](module, side)


def linear_flops(tokens: int, *widths: int) -> int:
    """Linear layers one after the other, of `widths[0] -> widths[1] -> ...`, on so many tokens."""
    return sum(2 * tokens * a * b for a, b in zip(widths, widths[1:], strict=False))


def taps(size: int, kernel: int) -> int:
    """Pairs of output and input positions that a 'SAME' convolution of odd `kernel` multiplies along one axis.

    Taps that fall on the border's padding multiply nothing; XLA counts likewise.
    """
    return sum(1 for o in range(size) for t in range(kernel) if 0 <= o + t - kernel // 2 < size)


def _block(tokens: int, dim: int, ffn: int) -> int:
    """A transformer block whose feed-forward part costs `ffn`."""
    products = 2 * 2 * tokens * tokens * dim  # queries with keys, weights with values
    return linear_flops(tokens, dim, 3 * dim) + products + linear_flops(tokens, dim, dim) + ffn


def _patches(side: int, patch: int) -> int:
    return (side // patch) ** 2


def _embed(side: int, patch: int, dim: int) -> int:
    return linear_flops(_patches(side, patch), 3 * patch * patch, dim)


def _pool(tokens: int, dim: int, mlp_dim: int) -> int:
    """`attention_pool.AttentionPool`: one probe reads all tokens; the packed projection is computed whole."""
    projection = linear_flops(1 + tokens, dim, 3 * dim) + linear_flops(1, dim, dim)
    return projection + 2 * 2 * tokens * dim + linear_flops(1, dim, mlp_dim, dim)


def _vit(m: VisionTransformer, side: int) -> int:
    tokens = 1 + m.num_storage_tokens + _patches(side, m.patch_size)
    hidden = ffn_hidden(m.ffn_layer, m.embed_dim, m.ffn_ratio)
    matrices = 2 if m.ffn_layer == "mlp" else 3
    ffn = matrices * linear_flops(tokens, m.embed_dim, hidden)
    return _embed(side, m.patch_size, m.embed_dim) + m.depth * _block(tokens, m.embed_dim, ffn)


def _trunk(m: Dune | PerceptionEncoder | Radio | SiglipVision, side: int, prefix: int) -> tuple[int, int]:
    """(tokens, FLOPs) of patch embedding and blocks with `prefix` tokens before the patches."""
    tokens = prefix + _patches(side, m.patch_size)
    block = _block(tokens, m.width, linear_flops(tokens, m.width, m.mlp_dim, m.width))
    return tokens, _embed(side, m.patch_size, m.width) + m.depth * block


def _perception_encoder(m: PerceptionEncoder, side: int) -> int:
    tokens, flops = _trunk(m, side, int(m.cls_token))
    if m.cls_output != "none":
        flops += _pool(tokens, m.width, 4 * m.width)
    if m.cls_output == "proj":
        flops += linear_flops(1, m.width, m.output_dim)
    return flops


def _siglip(m: SiglipVision, side: int) -> int:
    tokens, flops = _trunk(m, side, 0)
    return flops + _pool(tokens, m.width, m.mlp_dim)


def _convnext(m: ConvNeXt, side: int) -> int:
    flops, size, width, stride = 0, side, 3, 4
    for depth, dim in zip(m.depths, m.dims, strict=True):
        size //= stride
        flops += linear_flops(size * size, stride * stride * width, dim)  # patchify
        block = 2 * taps(size, 7) ** 2 * dim + linear_flops(size * size, dim, 4 * dim, dim)
        flops, width, stride = flops + depth * block, dim, 2
    return flops


_COUNTS: dict[type, Callable[[nn.Module, int], int]] = {
    VisionTransformer: _vit,
    ConvNeXt: _convnext,
    PerceptionEncoder: _perception_encoder,
    SiglipVision: _siglip,
    Radio: lambda m, side: _trunk(m, side, m.num_cls_tokens + m.num_registers)[1],
    Dune: lambda m, side: _trunk(m, side, 1 + m.num_registers)[1],
}
