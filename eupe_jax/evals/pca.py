"""Patch tokens as pictures: their first three principal components as red, green and blue (EUPE Fig. 4)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from eupe_jax.evals.features import CentreCrop, extract
from eupe_jax.evals.folders import Subset, read_folder
from eupe_jax.evals.interface import Encoder, Result
from eupe_jax.models.resize import resize

FITS = ("image", "all")


def pca_to_rgb(patches_NxHxWxD: np.ndarray, side: int = 0) -> np.ndarray:
    """[N, h, w, 3] (or [N, side, side, 3], bicubic) in [0, 1]; components are fitted on all N images together.

    Colours are stretched between the 2nd and 98th percentile of each component. Signs are fixed by the largest
    coefficient, so that the same tokens always give the same colours.
    """
    return principal_colours(patches_NxHxWxD, side)[0]


def principal_colours(patches_NxHxWxD: np.ndarray, side: int = 0) -> tuple[np.ndarray, float]:
    """As `pca_to_rgb`, and the share of the tokens' variance that the three components hold."""
    n, h, w, d = patches_NxHxWxD.shape
    x = patches_NxHxWxD.reshape(-1, d).astype(np.float64)
    x = x - x.mean(0)
    values, vectors = np.linalg.eigh(x.T @ x)
    components = vectors[:, ::-1][:, :3]
    components = components * np.sign(components[np.abs(components).argmax(0), np.arange(components.shape[1])])
    y = x @ components
    low, high = np.percentile(y, [2, 98], axis=0)
    y = ((y - low) / np.maximum(high - low, 1e-9)).reshape(n, h, w, -1)
    if y.shape[-1] < 3:
        y = np.concatenate([y, np.zeros((n, h, w, 3 - y.shape[-1]))], axis=-1)
    if side:
        y = np.asarray(resize(y, (side, side)))
    return np.clip(y, 0.0, 1.0), float(values[-3:].sum() / max(values.sum(), 1e-30))


@dataclass(frozen=True)
class Settings:
    """The paper shows such pictures without saying at which resolution.

    Attributes:
      resolutions: sides of the centre crops that the encoders see, in pixels; each takes the nearest multiple of its
        patch size.
      images: how many pictures, evenly spread over the folder.
      fit: components fitted on each image alone ("image") or on all of them ("all", so that colours can be compared).
      cell: side of a picture in the grid, in pixels; maps are enlarged to it bicubically.
      batch_size: images a forward pass.
    """

    resolutions: tuple[int, ...] = (256, 512)
    images: int = 6
    fit: str = "image"
    cell: int = 192
    batch_size: int = 2

    def __post_init__(self):
        if self.fit not in FITS:
            raise ValueError(f"fit must be one of {FITS}, got {self.fit!r}")
        if not self.resolutions or min(*self.resolutions, self.images, self.cell, self.batch_size) < 1:
            raise ValueError(f"resolutions, images, cell and batch_size must be positive, got {self}")


@dataclass(frozen=True)
class Data:
    """images: the pictures shown."""

    images: Subset


def load(folder: Path, settings: Settings) -> Data:
    """`settings.images` pictures from anywhere below a folder; raises DataError where there are none."""
    source = read_folder(Path(folder))
    count = min(settings.images, len(source))
    return Data(Subset(source, np.linspace(0, len(source) - 1, count).astype(int)))


def run(
    encoders: Encoder | Sequence[Encoder], data: Data, settings: Settings, *, workdir: Path | None = None
) -> Result:
    """One grid: a row an image, beside it every encoder at every resolution.

    An encoder that does not take a resolution gets a grey column, and details["refused"] says why.

    Raises:
      ValueError: no encoder takes any of the resolutions. DataError: a picture that cannot be decoded.
    """
    encoders = list(encoders) if isinstance(encoders, Sequence) else [encoders]
    names = _distinct([encoder.name for encoder in encoders])
    titles, rows, refused = ["image"], [], {}
    columns = [extract(_Pixels(), data.images, settings.batch_size, prepare=_crop(settings.cell))["patches"]]
    todo = [(*named, resolution) for named in zip(names, encoders, strict=True) for resolution in settings.resolutions]
    for name, encoder, resolution in tqdm(todo, desc="pca", disable=None):
        side = max(round(resolution / encoder.patch_size), 1) * encoder.patch_size
        titles.append(f"{name}\n{side} px")
        try:  # the size alone: whatever goes wrong with the pictures is an error
            encoder(np.zeros((settings.batch_size, side, side, 3), np.uint8))
        except ValueError as error:
            refused[f"{name} at {side}"] = str(error)
            columns.append(np.full_like(columns[0], 0.5))
            continue
        options = {"kinds": ("patches",), "prepare": _crop(side), "workdir": workdir}
        patches = extract(encoder, data.images, settings.batch_size, **options)["patches"]
        parts = [patches] if settings.fit == "all" else np.split(patches, len(patches))
        pictures, shares = zip(*(principal_colours(part, settings.cell) for part in parts), strict=True)
        columns.append(np.concatenate(pictures))
        rows.append({"encoder": name, "resolution": side, "explained": float(np.mean(shares))})
    if not rows:
        raise ValueError(f"no encoder takes any of these resolutions: {refused}")
    metrics = {f"explained_{row['encoder']}_{row['resolution']}": row["explained"] for row in rows}
    return Result(metrics, {"explained": rows}, {"pca": grid(titles, columns)}, {"refused": refused})


class _Pixels:
    """The pictures themselves, as `extract` takes encoders."""

    name = "pixels"

    def __call__(self, images_BxHxWx3: np.ndarray) -> dict[str, np.ndarray]:
        return {"patches": images_BxHxWx3 / np.float32(255)}


def _crop(side: int) -> CentreCrop:
    return CentreCrop(side, side)


def _distinct(names: list[str]) -> list[str]:
    """Names that occur again get a number."""
    return [f"{n} ({names[:i].count(n) + 1})" if n in names[:i] else n for i, n in enumerate(names)]


def grid(titles: Sequence[str], columns: Sequence[np.ndarray], gap: int = 4) -> np.ndarray:
    """Columns of pictures [N, S, S, 3] in [0, 1] under their titles: uint8 RGB.

    Titles are cut to the width of a column.
    """
    count, side = columns[0].shape[:2]
    font, head = ImageFont.load_default(12), 34
    canvas = Image.new("RGB", (len(columns) * (side + gap) - gap, head + count * (side + gap) - gap), "white")
    pen = ImageDraw.Draw(canvas)
    for c, (title, column) in enumerate(zip(titles, columns, strict=True)):
        x = c * (side + gap)
        for line, text in enumerate(title.split("\n")):
            while text and pen.textlength(text, font) > side:
                text = text[:-1]
            pen.text((x, 2 + 15 * line), text, fill="black", font=font)
        for r, picture in enumerate(column):
            canvas.paste(Image.fromarray(np.round(picture * 255).astype(np.uint8)), (x, head + r * (side + gap)))
    return np.asarray(canvas)
