"""The same networks once more, in the forms that XNNPACK takes whole: one image, one fixed size, constants folded.

Built from the readable modules, never trained or saved. What differs, and why:
  * The delegate never takes `native_layer_norm`. Means over channels are products with a constant vector; the affine
    part moves into the layer that follows. In the vision transformer every layer that adds to the tokens puts out zero
    mean, so that its norms have no mean to take away.
  * Attention is rank-3 `bmm` over [heads, tokens, head width], with slices where the readable module splits: the
    delegate takes neither `split`, nor rank-4 products, nor the softmax of `scaled_dot_product_attention`.
  * 1 / sqrt(head width), LayerScale and the key-bias mask are folded into weights; rotary tables are constants.
  * ConvNeXt's 7x7 depthwise convolution, too large for the delegate's kernels, is the sum of three smaller ones. Its
    map is channels-last throughout, with 1x1 convolutions over the channels.
"""

from collections.abc import Sequence

from convert import torch_convnext, torch_vit
from convert.export_convnext import ExportConvNeXt
from convert.export_vit import ExportVit

TOKENS = ("cls", "storage", "patches")


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
    pixels = (mean, std) if uint8_input else None
    network = ExportVit(module, height, width, chosen, pixels) if is_vit else ExportConvNeXt(module, chosen, pixels)
    return network.eval().requires_grad_(False)
