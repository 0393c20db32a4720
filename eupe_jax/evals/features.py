"""Frozen features of many images: batched, decoded beside the computation, kept on disk where wanted."""

import dataclasses
import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import safetensors
import safetensors.numpy
from PIL import Image
from tqdm import tqdm

from eupe_jax.data.host import BrokenRecord, decode
from eupe_jax.data.sources import ArraySource, Record, Source
from eupe_jax.evals.interface import DataError, Tokens
from eupe_jax.files import write_whole

log = logging.getLogger(__name__)

Encode = Callable[[np.ndarray], Tokens]
Span = tuple[int, int]  # images from here up to there

KINDS = ("cls", "patches", "patch_mean")


@dataclass(frozen=True)
class CentreCrop:
    """Record -> uint8 [crop, crop, 3]: decoded and turned upright, the short side resized to `resize`, the centre cut.

    Bicubic with Pillow's antialiasing; sizes and offsets are rounded as torchvision's Resize and CenterCrop do.
    """

    resize: int = 256
    crop: int = 224

    def __post_init__(self):
        if not 0 < self.crop <= self.resize:
            raise ValueError(f"a centre crop of {self.crop} pixels does not fit into a short side of {self.resize}")

    def __call__(self, record: Record) -> np.ndarray:
        image = Image.fromarray(decode(record))
        width, height = image.size
        short = min(width, height)
        width, height = self.resize * width // short, self.resize * height // short
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - self.crop) / 2), round((height - self.crop) / 2)
        return np.asarray(image.crop((left, top, left + self.crop, top + self.crop)))

    def fitted(self, patch_size: int) -> "CentreCrop":
        """The same, or with the nearest crop that is a multiple of `patch_size` where this one is not."""
        if self.crop % patch_size == 0:
            return self
        largest = self.resize // patch_size * patch_size
        return dataclasses.replace(self, crop=min(max(round(self.crop / patch_size), 1) * patch_size, largest))


@dataclass(frozen=True)
class Squash:
    """Record -> uint8 [side, side, 3]: the whole picture, decoded, turned upright and squashed; bicubic."""

    side: int = 224

    def __call__(self, record: Record) -> np.ndarray:
        return np.asarray(Image.fromarray(decode(record)).resize((self.side, self.side), Image.Resampling.BICUBIC))


def default_batch_size() -> int:
    """8 images a CPU device, 64 an accelerator: on a CPU, activations that stay in its cache are a quarter faster."""
    return jax.local_device_count() * (8 if jax.default_backend() == "cpu" else 64)


def extract(
    encode: Encode,
    images: np.ndarray | Source,
    batch_size: int = 0,
    *,
    kinds: Sequence[str] | None = None,
    prepare: Callable[[Record], np.ndarray] = decode,
    workdir: Path | None = None,
    chunk: int = 1024,
    threads: int = 4,
    progress: str = "",
) -> dict[str, np.ndarray]:
    """Features of all images, float32: {"cls": [N, D], "patches": [N, h, w, D], "patch_mean": [N, D]}.

    Only what `kinds` names is fetched from the device, and two batches are under way at a time, so class tokens of
    many images take no memory for patch tokens. The last batch is padded, so that one compiled program serves all.

    Args:
      encode: an encoder (`interface.Encoder`, a LoadedEncoder, a host teacher, ...): uint8 images to tokens.
      images: uint8 [N, H, W, 3], or a source of records that `prepare` turns into images of one size.
      batch_size: images a batch; 0: `default_batch_size()`.
      kinds: which of `KINDS`, "patch_mean" being the mean patch token; None: all of "cls" and "patches" that come.
      prepare: a dataclass such as `CentreCrop` (its fields go into the fingerprint of what is kept).
      workdir: keeps finished pieces of `chunk` images in workdir/features/FINGERPRINT; the same call again reads them
        and goes on after the last. The fingerprint is that of encoder, images, preparation and kinds.
      threads: decoders beside the computation.
      progress: label of a progress bar; "" for none.

    Raises:
      DataError: a broken image, by name.
      ValueError: nothing to do, images of several sizes, tokens that the encoder does not give or that are not finite,
        or `workdir` with an encoder, images or a preparation that have no fingerprint.
    """
    if len(images) == 0:
        raise ValueError("no images to extract features of")
    if unknown := set(kinds or ()) - set(KINDS):
        raise ValueError(f"unknown kinds of features {sorted(unknown)}: known are {', '.join(KINDS)}")
    if isinstance(images, np.ndarray) and prepare is not decode:
        raise ValueError("`prepare` is for sources of records, and the images are an array already")
    batch_size = batch_size or default_batch_size()
    count, chunk = len(images), -(-chunk // batch_size) * batch_size  # whole batches: padding only at the very end
    store = _Store(workdir, encode, images, prepare, kinds, chunk)
    pieces = [(start, min(start + chunk, count)) for start in range(0, count, chunk)]
    out: dict[str, np.ndarray] = {}

    def fill(span: Span, features: Mapping[str, np.ndarray]) -> None:
        for kind, x in features.items():
            if kind not in out:
                out[kind] = np.empty((count, *x.shape[1:]), np.float32)
            out[kind][slice(*span)] = x

    missing = []
    for piece in pieces:
        found = store.load(piece)
        fill(piece, found) if found else missing.append(piece)
    spans = [(i, min(i + batch_size, stop)) for start, stop in missing for i in range(start, stop, batch_size)]
    done = count - sum(stop - start for start, stop in missing)
    with tqdm(total=count, initial=done, desc=progress, unit="img", disable=not progress) as bar:
        ends = {stop: (start, stop) for start, stop in missing}
        for span, features in _run(encode, images, prepare, kinds, spans, batch_size, threads):
            fill(span, features)
            if span[1] in ends:
                piece = ends[span[1]]
                store.save(piece, {kind: x[slice(*piece)] for kind, x in out.items()})
            bar.update(span[1] - span[0])
    return out


def _run(encode, images, prepare, kinds, spans, batch_size, threads) -> Iterator[tuple[Span, dict[str, np.ndarray]]]:
    """Features of every span in turn, fetched when the next batch is already on its way."""
    waiting: tuple[Span, Tokens] | None = None
    for span, batch in zip(spans, _batches(images, prepare, spans, threads), strict=True):
        padding = batch_size - len(batch)
        batch = np.concatenate([batch, np.repeat(batch[-1:], padding, axis=0)]) if padding else batch
        ahead = (span, _select(encode(batch), kinds, getattr(encode, "name", "the encoder")))
        if waiting:
            yield waiting[0], _fetch(*waiting)
        waiting = ahead
    if waiting:
        yield waiting[0], _fetch(*waiting)


def _batches(images, prepare, spans: Sequence[Span], threads: int) -> Iterator[np.ndarray]:
    """The images of every span, uint8 [b, H, W, 3]; two spans are read ahead."""
    if isinstance(images, np.ndarray):
        yield from (images[slice(*span)] for span in spans)
        return

    def read(index: int) -> np.ndarray:
        try:
            return prepare(images[index])
        except BrokenRecord as e:
            raise DataError(str(e)) from e
        except OSError as e:
            raise DataError(f"image {index} cannot be read: {e}") from e

    pool = ThreadPoolExecutor(threads)
    shape = None
    try:
        ahead: deque = deque()
        todo = iter(spans)
        for _ in spans:
            while len(ahead) < 3 and (span := next(todo, None)):
                ahead.append([pool.submit(read, i) for i in range(*span)])
            batch = [future.result() for future in ahead.popleft()]
            shape = shape or batch[0].shape
            if other := {image.shape for image in batch} - {shape}:
                raise ValueError(
                    f"images of several sizes: {shape} and {other.pop()}; give a `prepare` that crops them"
                )
            yield np.stack(batch)
    finally:
        pool.shutdown(cancel_futures=True)


def _select(tokens: Tokens, kinds: Sequence[str] | None, name: str) -> Tokens:
    if kinds is None:
        return {kind: tokens[kind] for kind in ("cls", "patches") if tokens.get(kind) is not None}
    selected = {}
    for kind in kinds:
        source = "patches" if kind == "patch_mean" else kind
        if tokens.get(source) is None:
            raise ValueError(f"{name} gives no {source!r} tokens, only {sorted(tokens)}")
        selected[kind] = tokens[source].mean(axis=(1, 2)) if kind == "patch_mean" else tokens[source]
    return selected


def _fetch(span: Span, tokens: Tokens) -> dict[str, np.ndarray]:
    fetched = {k: np.asarray(x, np.float32)[: span[1] - span[0]] for k, x in jax.device_get(dict(tokens)).items()}
    for kind, x in fetched.items():
        if not np.isfinite(x).all():
            raise ValueError(f"{kind!r} features of images {span[0]} to {span[1] - 1} are not all finite")
    return fetched


class _Store:
    """Pieces of features on disk; without a workdir it holds nothing."""

    def __init__(self, workdir, encode, images, prepare, kinds, chunk: int):
        self._folder: Path | None = None
        if workdir is None:
            return
        if not getattr(encode, "fingerprint", ""):
            raise ValueError("features are kept by the encoder's fingerprint, and this encoder has none: omit workdir")
        if prepare is not decode and not dataclasses.is_dataclass(prepare):
            raise ValueError(f"features are kept by how images are prepared: {prepare!r} must be a dataclass")
        source = ArraySource(images) if isinstance(images, np.ndarray) else images
        facts = {
            "encoder": encode.fingerprint,
            "images": source.digest,
            "count": len(images),
            "prepare": "none" if isinstance(images, np.ndarray) else repr(prepare),
            "kinds": sorted(kinds) if kinds else None,
            "chunk": chunk,
        }
        self._fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        self._folder = Path(workdir) / "features" / self._fingerprint[:16]

    def _path(self, piece: Span) -> Path:
        return self._folder / f"images_{piece[0]:08d}.safetensors"

    def load(self, piece: Span) -> dict[str, np.ndarray] | None:
        if self._folder is None:
            return None
        found = load_arrays(self._path(piece), self._fingerprint)
        if found is not None and any(len(x) != piece[1] - piece[0] for x in found.values()):
            log.warning("%s holds another number of images; computed again", self._path(piece))
            return None
        return found

    def save(self, piece: Span, features: Mapping[str, np.ndarray]) -> None:
        if self._folder is not None:
            save_arrays(self._path(piece), features, self._fingerprint)


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], fingerprint: str) -> None:
    """Writes arrays into a file, whole; `load_arrays` gives them back for the same fingerprint only.

    Raises:
      OSError: they cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.asarray(x, order="C") for name, x in arrays.items()}
    metadata = {"fingerprint": fingerprint, "sha256": _sha256(arrays)}
    write_whole(path, safetensors.numpy.save(arrays, metadata=metadata))


def load_arrays(path: Path, fingerprint: str) -> dict[str, np.ndarray] | None:
    """What `save_arrays` wrote; None where there is no such file, or (logged, not raised) where it is damaged or
    another's."""
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}
        if metadata.get("fingerprint") != fingerprint:
            raise ValueError("it is of another fingerprint")
        if metadata.get("sha256") != _sha256(arrays):
            raise ValueError("its content changed")
    except (safetensors.SafetensorError, ValueError, OSError) as e:
        log.warning("%s cannot be used (%s); computed again", path, e)
        return None
    return arrays


def _sha256(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].shape} {arrays[name].dtype}\n".encode())
        digest.update(arrays[name].tobytes() if arrays[name].ndim == 0 else np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
