"""Sliding windows: where they lie, and the average of what was found in them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from eupe_jax.models.resize import resize

Box = tuple[int, int, int, int]  # y1, y2, x1, x2


def window_boxes(height: int, width: int, crop: int, stride: int) -> tuple[Box, ...]:
    """Windows in visiting order, rows outer; the last of a row or column is moved back inside.

    Where both sides are below `crop`, windows are squares of the shorter side; where one is, they are shorter there.
    """
    if height < crop and width < crop:
        crop = min(height, width)
    side_h, side_w = min(crop, height), min(crop, width)
    tops = range(0, max(height - side_h + stride - 1, 0) // stride * stride + 1, stride)
    lefts = range(0, max(width - side_w + stride - 1, 0) // stride * stride + 1, stride)
    boxes = []
    for top in tops:
        for left in lefts:
            y2, x2 = min(top + side_h, height), min(left + side_w, width)
            boxes.append((max(y2 - side_h, 0), y2, max(x2 - side_w, 0), x2))
    return tuple(boxes)


def average_windows(windows: jax.Array, boxes: tuple[Box, ...], size: tuple[int, int]) -> jax.Array:
    """[H, W, C]: the mean, at each pixel, of the windows [n, h, w, C] that cover it.

    Raises:
      ValueError: some pixel is in no window.
    """
    total = jnp.zeros((*size, windows.shape[-1]), jnp.float32)
    count = np.zeros((*size, 1), np.float32)
    for window, (y1, y2, x1, x2) in zip(windows, boxes, strict=True):
        total = total.at[y1:y2, x1:x2].add(window)
        count[y1:y2, x1:x2] += 1
    if not count.all():
        y1, y2, x1, x2 = boxes[0]
        raise ValueError(
            f"windows of {y2 - y1}x{x2 - x1} do not cover every pixel of {size[0]}x{size[1]}: lower the stride"
        )
    return total / count


@functools.partial(jax.jit, static_argnames=("padded", "offset", "boxes", "size", "out_size", "average"))
def merge(
    logits_nxhxwxC: jax.Array, *, padded: tuple[int, int], offset: tuple[int, int], boxes: tuple[Box, ...],
    size: tuple[int, int], out_size: tuple[int, int], average: str = "logits",
) -> jax.Array:  # fmt: skip
    """Scores [H, W, C] at `out_size` from the patch-resolution logits of an image's windows.

    Each window's logits are stretched (bilinear) over the window as it was encoded, `padded`, and cut at `offset`;
    windows are averaged over the image of `size`, and the whole is stretched to `out_size`.
    average: "logits", or "probabilities" (softmax before averaging).
    """
    y1, y2, x1, x2 = boxes[0]
    top, left = offset
    windows = resize(logits_nxhxwxC, padded, "bilinear")[:, top : top + y2 - y1, left : left + x2 - x1]
    if average == "probabilities":
        windows = jax.nn.softmax(windows, axis=-1)
    return resize(average_windows(windows, boxes, size)[None], out_size, "bilinear")[0]
