"""Pictures of maps beside the images they belong to, drawn with Pillow."""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from eupe_jax.evals.seg_metrics import IGNORE

_GAP = 6
_TEXT = 16
# viridis at equal distances
_SCALE = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], np.float64)


def palette(classes: int) -> np.ndarray:
    """uint8 [256, 3]: distinct colours for the classes (hues a golden angle apart), black for IGNORE."""
    colours = np.zeros((256, 3), np.uint8)
    for i in range(classes):
        ring = i // 6 % 3
        rgb = colorsys.hsv_to_rgb(i * 0.618034 % 1.0, (0.85, 0.5, 0.95)[ring], (0.95, 0.9, 0.6)[ring])
        colours[i] = [round(255 * x) for x in rgb]
    colours[IGNORE] = 0
    return colours


def label_picture(label_HxW: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """A map of classes in colours, uint8 [H, W, 3]."""
    return colours[label_HxW]


def map_picture(values_HxW: np.ndarray, low: float, high: float, known: np.ndarray | None = None) -> np.ndarray:
    """A map of numbers, dark at `low` and bright at `high`, uint8 [H, W, 3]; black where not `known`."""
    place = np.clip((values_HxW - low) / max(high - low, 1e-9), 0, 1) * (len(_SCALE) - 1)
    stops = np.arange(len(_SCALE))
    picture = np.stack([np.interp(place, stops, _SCALE[:, c]) for c in range(3)], axis=-1).round().astype(np.uint8)
    return picture if known is None else np.where(known[..., None], picture, np.uint8(0))


def grid(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], width: int = 320) -> np.ndarray:
    """Rows of pictures under column titles; each picture is `width` pixels wide."""
    sized = [[_to_width(picture, width) for picture in row] for row in rows]
    heights = [max(p.shape[0] for p in row) for row in sized]
    columns = max(len(row) for row in sized)
    size = (columns * (width + _GAP) + _GAP, sum(h + _GAP for h in heights) + _TEXT + 2 * _GAP)
    canvas = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(_TEXT - 3)
    for column, title in enumerate(titles):
        draw.text((_GAP + column * (width + _GAP), _GAP - 2), title, "black", font)
    top = _TEXT + _GAP
    for row, height in zip(sized, heights, strict=True):
        for column, picture in enumerate(row):
            canvas.paste(Image.fromarray(picture), (_GAP + column * (width + _GAP), top))
        top += height + _GAP
    return np.asarray(canvas)


def with_legend(picture: np.ndarray, names: Sequence[str], colours: np.ndarray) -> np.ndarray:
    """The picture [H, W, 3] with a key of names and colours [N, 3] below it; uint8."""
    font = ImageFont.load_default(_TEXT - 3)
    places, x, y, width = [], _GAP, _GAP, picture.shape[1]
    for name in names:
        length = _TEXT + 2 * _GAP + int(font.getlength(name))
        if x + length > width and x > _GAP:
            x, y = _GAP, y + _TEXT + 4
        places.append((x, y))
        x += length + _GAP
    strip = Image.new("RGB", (width, y + _TEXT + _GAP), "white")
    draw = ImageDraw.Draw(strip)
    for (left, top), name, colour in zip(places, names, colours, strict=False):
        draw.rectangle((left, top, left + _TEXT - 4, top + _TEXT - 4), tuple(int(c) for c in colour))
        draw.text((left + _TEXT, top - 2), name, "black", font)
    return np.concatenate([picture, np.asarray(strip)])


def with_scale(picture: np.ndarray, captions: Sequence[tuple[str, float, float]]) -> np.ndarray:
    """The picture [H, W, 3], uint8, with a colour bar below it for each (unit or name, low, high)."""
    width = picture.shape[1]
    strips = [picture]
    for caption, low, high in captions:
        strip = Image.new("RGB", (width, _TEXT + _GAP), "white")
        draw, font = ImageDraw.Draw(strip), ImageFont.load_default(_TEXT - 3)
        bar = map_picture(np.tile(np.linspace(0, 1, 160), (_TEXT - 4, 1)), 0, 1)
        text = f"{caption}: {low:.2f}"
        draw.text((_GAP, 0), text, "black", font)
        left = 2 * _GAP + int(font.getlength(text))
        strip.paste(Image.fromarray(bar), (left, 2))
        draw.text((left + 160 + _GAP, 0), f"{high:.2f}", "black", font)
        strips.append(np.asarray(strip))
    return np.concatenate(strips)


def _to_width(picture: np.ndarray, width: int) -> np.ndarray:
    height = max(round(picture.shape[0] * width / picture.shape[1]), 1)
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST))
