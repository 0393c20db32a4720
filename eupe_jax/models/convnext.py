"""ConvNeXt as EUPE and DINOv3 use it (official behaviour). Its class token is the normed average of the last map.

The blocks of each stage are scanned: their parameters have a leading axis of the stage's depth.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from eupe_jax.models.depthwise import DepthwiseConv
from eupe_jax.models.layers import (
    Activation,
    LayerNorm,
    check_fit,
    dense_init,
    exact_gelu,
    stack_blocks,
    written_out,
)
from eupe_jax.models.spec import EUPE_EXTRAS, EUPE_PREFIXES, EncoderSpec, Family, Layout, Tensor

NORM_EPS = 1e-6


def output_stride(dims: Sequence[int]) -> int:
    """Pixels a token: 4 after the stem, doubled by every further stage (32 for the four of the published models)."""
    return 4 * 2 ** (len(dims) - 1)


class Block(nn.Module):
    """x + gamma * mlp(norm(7x7 depthwise convolution(x))). One step of the scan."""

    layerscale_init: float
    depthwise: str
    dtype: Any
    gelu: Activation
    materialize: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        dim = x.shape[-1]
        y = checkpoint_name(DepthwiseConv(self.depthwise, self.dtype, dense_init, name="dwconv")(x), "depthwise")
        y = written_out(LayerNorm(NORM_EPS, self.dtype, name="norm")(y), self.materialize)
        y = checkpoint_name(nn.Dense(4 * dim, dtype=self.dtype, kernel_init=dense_init, name="pwconv1")(y), "hidden")
        y = written_out(self.gelu(y), self.materialize)
        y = nn.Dense(dim, dtype=self.dtype, kernel_init=dense_init, name="pwconv2")(y)
        y = checkpoint_name(y, "branch")
        gamma = self.param("gamma", nn.initializers.constant(self.layerscale_init), (dim,))
        # The factor starts at 1e-6: applied in float32, whatever the compute dtype.
        return (x + y.astype(jnp.float32) * gamma).astype(x.dtype), None


class Downsample(nn.Module):
    """Patchify by a strided convolution: stem (4x4, then norm) or between stages (norm, then 2x2)."""

    dim: int
    stride: int
    norm_first: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        side = (self.stride, self.stride)
        conv = nn.Conv(
            self.dim, side, strides=side, padding="VALID", dtype=self.dtype, kernel_init=dense_init, name="conv"
        )
        norm = LayerNorm(NORM_EPS, name="norm")
        return conv(norm(x).astype(self.dtype)) if self.norm_first else norm(conv(x.astype(self.dtype)))


class ConvNeXt(nn.Module):
    """ConvNeXt encoder; stride 32 with the four stages of the published models.

    Attributes:
      depths, dims: blocks and width of each stage.
      layerscale_init: initial value of every block's `gamma`.
      depthwise: "conv", or "matmul", which is many times faster on CPUs (see depthwise.py).
      dtype, residual_dtype, remat, scan_unroll, gelu, materialize: as for `vit.VisionTransformer`.
    """

    depths: Sequence[int] = (3, 3, 9, 3)
    dims: Sequence[int] = (96, 192, 384, 768)
    layerscale_init: float = 1e-6
    depthwise: str = "conv"
    dtype: Any = jnp.float32
    residual_dtype: Any = jnp.float32
    remat: str = "none"
    scan_unroll: int = 1
    gelu: Activation = exact_gelu
    materialize: bool = False

    @nn.compact
    def features(
        self,
        images: jax.Array,
        *,
        train: bool = False,
        layers: Sequence[int] = (),
        patch_size: int | None = None,
    ) -> dict[str, Any]:
        """Final tokens and the maps of chosen stages.

        Args:
          images: float [B, H, W, 3], pixel-normalised; at least the stride a side, rests are cut off.
          train: accepted for the common interface; nothing here depends on it.
          layers: stages whose map is wanted, negative ones counted from the end.
          patch_size: resize the maps of `layers` to [H // patch_size, W // patch_size], antialiased bilinear.

        Returns:
          "cls" [B, C], "storage" [B, 0, C], "patches" [B, h, w, C] after the final norm; "prenorm" [B, h, w, C];
          "layers", "layers_prenorm": lists of {"cls": average-pooled map [B, C_s], "patches": map [B, h_s, w_s, C_s]},
            with and without the final norm, which only the last stage has.

        Raises:
          ValueError: image smaller than the stride, depths and dims of different lengths, or `layers` out of range.
        """
        n_stages, stride = len(self.dims), output_stride(self.dims)
        if not n_stages or len(self.depths) != n_stages:
            raise ValueError(f"ConvNeXt takes one depth a stage, got depths {self.depths} and dims {self.dims}")
        if any(not -n_stages <= i < n_stages for i in layers):
            raise ValueError(f"layers {tuple(layers)} out of range for a model of {n_stages} stages")
        batch, height, width, _ = images.shape
        if min(height, width) < stride:
            raise ValueError(f"image of {height}x{width} pixels is smaller than the stride of {stride}")

        x, maps = images, []
        for s, (depth, dim) in enumerate(zip(self.depths, self.dims, strict=True)):
            x = Downsample(dim, 2 if s else 4, bool(s), self.dtype, name=f"downsample_{s}")(x)
            stage = stack_blocks(Block, depth, remat=self.remat, unroll=self.scan_unroll)
            stage = stage(
                self.layerscale_init, self.depthwise, self.dtype, self.gelu, self.materialize, name=f"stages_{s}"
            )
            x, _ = stage(x.astype(self.residual_dtype))
            maps.append(x)
        norm = LayerNorm(NORM_EPS, name="norm")

        def stage_output(s, normed):
            feature_map = maps[s]
            pooled = feature_map.mean(axis=(1, 2), dtype=jnp.float32)
            if patch_size is not None:
                size = (batch, height // patch_size, width // patch_size, feature_map.shape[-1])
                feature_map = jax.image.resize(feature_map, size, "linear", antialias=True)
            if normed and s % n_stages == n_stages - 1:
                pooled, feature_map = norm(pooled), norm(feature_map)
            return {"cls": pooled, "patches": feature_map}

        return {
            "cls": norm(x.mean(axis=(1, 2), dtype=jnp.float32)),
            "storage": jnp.zeros((batch, 0, self.dims[-1]), jnp.float32),
            "patches": norm(x),
            "prenorm": x,
            "layers": [stage_output(s, True) for s in layers],
            "layers_prenorm": [stage_output(s, False) for s in layers],
        }

    def __call__(self, images: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """[B, H, W, 3] -> {"cls": [B, C], "storage": [B, 0, C], "patches": [B, h, w, C]}, float32; see `features`.

        Raises:
          ValueError: as `features`, and for sides that are no multiple of the stride.
        """
        check_fit(images, output_stride(self.dims))
        out = self.features(images, train=train)
        return {name: out[name] for name in ("cls", "storage", "patches")}


def _describe(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    dims = ConvNeXt(**kwargs).dims
    return {"cls_dim": dims[-1], "patch_dim": dims[-1], "patch_size": output_stride(dims), "num_storage_tokens": 0}


def _affine(path: str, name: str, leaf: str, transform: str) -> tuple[Tensor, Tensor]:
    return Tensor(f"params/{path}/{leaf}", f"{name}.weight", transform), Tensor(f"params/{path}/bias", f"{name}.bias")


def _table(downsample: str, block: str, names: Mapping[str, str], norm: str) -> tuple[Tensor, ...]:
    """Rows of all stages; `downsample` and `block` hold the stage as {s}, `names` calls the parts of a block."""
    rows: list[Tensor] = []
    for s in range(4):
        # The stem is (convolution, norm), the other downsamplers are (norm, convolution).
        layers, stage = downsample.replace("{s}", str(s)), block.replace("{s}", str(s))
        rows += _affine(f"downsample_{s}/conv", f"{layers}.{min(s, 1)}", "kernel", "conv")
        rows += _affine(f"downsample_{s}/norm", f"{layers}.{1 - min(s, 1)}", "scale", "copy")
        rows.append(Tensor(f"params/stages_{s}/gamma", f"{stage}.gamma"))
        rows += _affine(f"stages_{s}/dwconv", f"{stage}.{names['dwconv']}", "kernel", "conv")
        rows += _affine(f"stages_{s}/norm", f"{stage}.{names['norm']}", "scale", "copy")
        for part in ("pwconv1", "pwconv2"):
            rows += _affine(f"stages_{s}/{part}", f"{stage}.{names[part]}", "kernel", "linear")
    return (*rows, *_affine("norm", norm, "scale", "copy"))


_PARTS = ("dwconv", "norm", "pwconv1", "pwconv2")
_HF_PARTS = ("depthwise_conv", "layer_norm", "pointwise_conv1", "pointwise_conv2")
LAYOUTS = {
    "official": Layout(
        _table("downsample_layers.{s}", "stages.{s}.{i}", dict(zip(_PARTS, _PARTS, strict=True)), "norm"),
        aliases={f"norms.3.{part}": f"norm.{part}" for part in ("weight", "bias")},
        prefixes=EUPE_PREFIXES,
        extras=EUPE_EXTRAS,
    ),
    "transformers": Layout(
        _table(
            "stages.{s}.downsample_layers",
            "stages.{s}.layers.{i}",
            dict(zip(_PARTS, _HF_PARTS, strict=True)),
            "layer_norm",
        ),
        renames={"model.stages.": "stages."},  # files and modules of one version have either
    ),
}

_SIZES = {
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
}


def _spec(name: str, size: str, **fields) -> EncoderSpec:
    depths, dims = _SIZES[size]
    kwargs = {"depths": depths, "dims": dims}
    return EncoderSpec(name, "convnext", kwargs, **_describe(kwargs), **fields)


def _eupe(size: str) -> EncoderSpec:
    repo = f"EUPE-ConvNeXt-{size[0].upper()}"
    licence = "FAIR Noncommercial Research License"
    return _spec(f"eupe_convnext_{size}", size, licence=licence, hub_repo=f"facebook/{repo}", hub_file=f"{repo}.pt")


def _dinov3(size: str, sha: str) -> EncoderSpec:
    name = f"dinov3_convnext_{size}"
    repo, file = f"facebook/dinov3-convnext-{size}-pretrain-lvd1689m", f"{name}_pretrain_lvd1689m-{sha}.pth"
    return _spec(name, size, licence="DINOv3 License", hub_repo=repo, hub_file=file)


SPECS = (
    *(_eupe(size) for size in ("tiny", "small", "base")),
    _dinov3("tiny", "21b726bb"),
    _dinov3("small", "296db49d"),
    _dinov3("base", "801f2ba9"),
    _dinov3("large", "61fa432d"),
)

FAMILY = Family("convnext", ConvNeXt, SPECS, _describe, LAYOUTS)
