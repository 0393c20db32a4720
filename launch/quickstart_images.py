"""Images for the quickstart: a training folder, and held-out pictures that training never sees."""

import io
import shutil
import socket
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from eupe_jax.data.host import BrokenRecord, decode
from eupe_jax.data.sources import ImageFolder, PackagedPhotos, Record, Source, Tfds

MAX_TRAIN, MAX_HELDOUT, MIN_IMAGES = 2000, 250, 40
STORED_SHORT_SIDE = (
    256  # larger pictures are stored shrunk: decoding 12 megapixels at every step would be the whole run
)
PUBLIC_SET = "imagenette/160px-v2"  # 9,469 training photographs, 99 MB
SEED = 0


@dataclass(frozen=True)
class Corpus:
    """train: folder. heldout: {name: (images uint8 [N, S, S, 3], what they are)}. source: where it all comes from."""

    train: Path
    train_count: int
    heldout: dict[str, tuple[np.ndarray, str]]
    source: str


def prepare(images: str | None, folder: Path, side: int, limit: int = MAX_TRAIN) -> Corpus:
    """Writes `folder/train` and returns the corpus; everything is rewritten from the same seed each time.

    Args:
      images: a folder of the user's; None: a small public set where the network has it, else packaged photographs.
      side: of the held-out pictures, squashed, in pixels.
      limit: training images at most.

    Raises:
      FileNotFoundError, ValueError: no folder, too few images, or one that cannot be read (named).
    """
    if images is not None:
        return _from_source(ImageFolder(images), f"images from {images}", folder, side, limit)
    public = _public_set(folder.parent / "tfds")
    if public is not None:
        return _from_source(public, f"{PUBLIC_SET} through TensorFlow Datasets", folder, side, limit)
    return _from_photographs(folder, side, limit)


def _from_source(source: Source, what: str, folder: Path, side: int, limit: int) -> Corpus:
    if len(source) < MIN_IMAGES:
        raise ValueError(f"{what}: only {len(source)} found, the quickstart needs at least {MIN_IMAGES}")
    order = np.random.default_rng(SEED).permutation(len(source))
    heldout_count = min(MAX_HELDOUT, len(source) // 8)
    chosen = order[: min(limit, len(source) - heldout_count) + heldout_count]
    records, broken = [], []
    for index in tqdm(chosen, desc="reading images", unit="img"):
        try:
            records.append(_stored(source[int(index)]))
        except BrokenRecord as error:
            broken.append(str(error))
    if broken:
        raise ValueError(f"{len(broken)} of {len(chosen)} images cannot be read: {'; '.join(broken[:3])}; remove them")
    held, train = records[:heldout_count], records[heldout_count:]
    pictures = np.stack([np.asarray(_square(Image.open(io.BytesIO(r)), side)) for r in held])
    return _write(folder, train, {"images": (pictures, "images of the same collection, never trained on")}, what)


def _stored(record: Record) -> bytes:
    """The record as it is kept: as it came when small, else shrunk and re-encoded.

    Raises:
      BrokenRecord: it cannot be decoded.
    """
    image = Image.fromarray(decode(record))
    if isinstance(record.data, bytes) and min(image.size) <= STORED_SHORT_SIDE and record.data[:2] == b"\xff\xd8":
        return record.data
    scale = min(1.0, STORED_SHORT_SIDE / min(image.size))
    return _encode(image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS))


def _encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def _square(image: Image.Image, side: int) -> Image.Image:
    return image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)


def _write(folder: Path, train: list[bytes], heldout: dict, source: str) -> Corpus:
    partial = folder / ".train.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for i, data in enumerate(train):
        (partial / f"{i:06d}.jpg").write_bytes(data)
    shutil.rmtree(folder / "train", ignore_errors=True)
    partial.rename(folder / "train")
    return Corpus(folder / "train", len(train), heldout, source)


def _public_set(cache: Path) -> Source | None:
    """The public set, downloaded once; None without a network."""
    if not cache.exists():
        try:
            socket.create_connection(("storage.googleapis.com", 443), timeout=3).close()
        except OSError:
            print("no network beyond the package index: using packaged photographs")
            return None
    try:
        import tensorflow_datasets as tfds

        builder = tfds.builder(PUBLIC_SET, data_dir=cache, file_format="array_record")
        builder.download_and_prepare()
        return Tfds(PUBLIC_SET, "train", str(cache))
    except Exception as error:  # tfds raises many kinds; the photographs always work
        shutil.rmtree(cache, ignore_errors=True)
        why = next(iter(str(error).splitlines()), type(error).__name__)
        print(f"{PUBLIC_SET} could not be prepared ({why}): using packaged photographs")
        return None


# ---- offline: a few photographs made varied

HELDOUT_PHOTOS = ("coffee", "chelsea", "flower")
REGION = 0.25  # of each training photograph's width, at its right, is never trained on
MARGIN = 0.03  # left unused between the two, so that no crop touches both
LETTERS = list(string.ascii_letters + string.digits + " ")
MOSAICS, PAGES = 0.45, 0.1  # shares of the training set


def _from_photographs(folder: Path, side: int, limit: int) -> Corpus:
    rng = np.random.default_rng(SEED)
    source = PackagedPhotos()
    photos = {name: Image.fromarray(decode(source[i])) for i, name in enumerate(source.names)}
    unseen = [photos.pop(name) for name in HELDOUT_PHOTOS]
    seen = [p.crop((0, 0, round(p.width * (1 - REGION - MARGIN)), p.height)) for p in photos.values()]
    regions = [p.crop((round(p.width * (1 - REGION)), 0, p.width, p.height)) for p in photos.values()]
    heldout = {
        "regions": (_crops(regions, side, 200, rng), "regions of the training photographs that no crop touched"),
        "photos": (_crops(unseen, side, 100, rng), "crops of three photographs never trained on"),
    }
    train = [_encode(image) for image in tqdm(_varied(seen, side, limit, rng), total=limit, desc="making images")]
    return _write(folder, train, heldout, "photographs packaged with scikit-image and scikit-learn, made varied")


def _crop(image: Image.Image, side: int, rng: np.random.Generator, low: float = 0.02, high: float = 0.6) -> Image.Image:
    """A crop of log-uniform area and aspect ratio."""
    area = np.exp(rng.uniform(np.log(low), np.log(high))) * image.width * image.height
    ratio = np.exp(rng.uniform(-0.3, 0.3))
    width = int(np.clip(np.sqrt(area * ratio), 24, image.width))
    height = int(np.clip(np.sqrt(area / ratio), 24, image.height))
    left, top = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
    return _square(image.crop((left, top, left + width, top + height)), side)


def _crops(photos: list[Image.Image], side: int, count: int, rng: np.random.Generator) -> np.ndarray:
    return np.stack([np.asarray(_crop(photos[i % len(photos)], side, rng, low=0.1)) for i in range(count)])


def _varied(photos: list[Image.Image], side: int, count: int, rng: np.random.Generator) -> Iterator[Image.Image]:
    for _ in range(count):
        kind = rng.random()
        if kind < PAGES:
            yield _page(photos, side, rng)
        elif kind < PAGES + MOSAICS:
            tile = Image.new("RGB", (side, side))
            for x in (0, side // 2):
                for y in (0, side // 2):
                    tile.paste(_crop(photos[rng.integers(len(photos))], side // 2, rng), (x, y))
            yield tile
        else:
            yield _crop(photos[rng.integers(len(photos))], side, rng)


def _page(photos: list[Image.Image], side: int, rng: np.random.Generator) -> Image.Image:
    """Words in a packaged font, over plain paper or over a photograph: something for the text expert to find."""
    from matplotlib import font_manager

    plain = rng.random() < 0.5
    paper = tuple(int(v) for v in rng.integers(200, 256, 3))
    page = Image.new("RGB", (side, side), paper) if plain else _crop(photos[rng.integers(len(photos))], side, rng)
    draw = ImageDraw.Draw(page)
    family = str(rng.choice(["DejaVu Sans", "DejaVu Serif", "DejaVu Sans Mono"]))
    font = ImageFont.truetype(font_manager.findfont(family), int(rng.integers(side // 12, side // 4)))
    ink = tuple(int(v) for v in rng.integers(0, 120, 3)) if plain else (255, 255, 255)
    y = int(rng.integers(0, side // 3))
    while y < side - 8 and rng.random() < 0.85:
        word = "".join(rng.choice(LETTERS, rng.integers(3, 14)))
        draw.text((int(rng.integers(-side // 8, side // 2)), y), word, fill=ink, font=font)
        y += int(font.size * rng.uniform(1.1, 1.8))
    return page
