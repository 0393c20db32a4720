"""One ArrayRecord shard of a pack: images checked, bounded in size if wanted, written, read back and hashed.

A shard is a function of the source's records and the options: whoever writes it, and however often, it has the same
bytes.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from eupe_jax.data.decode import BrokenRecord, Picture, naming, open_picture
from eupe_jax.data.shard_files import ShardWriter, open_shard
from eupe_jax.data.sources.base import Record, RecordError, Source
from eupe_jax.data.sources.record_codec import pack_record, unpack_record
from eupe_jax.hashing import sha256_file


@dataclass(frozen=True)
class ImageOptions:
    """What is done to images.

    max_side: bound on the longest or shortest `side` in pixels; larger images are shrunk to it, upright, and stored as
      JPEG of `quality` without metadata. Smaller ones, and all of them where it is 0, are stored byte for byte.
    check: what is read of images that are stored as they are: "header" (of a JPEG; other formats are decoded), or
      "decode", every pixel. max_pixels: more than that count as broken.
    """

    max_side: int = 0
    side: Literal["longest", "shortest"] = "longest"
    quality: int = 90
    check: Literal["header", "decode"] = "header"
    max_pixels: int = 80_000_000

    def __post_init__(self):
        if self.max_side < 0:
            raise ValueError(f"max_side must be 0 (images as they are) or positive, got {self.max_side}")
        if self.side not in ("longest", "shortest"):
            raise ValueError(f"side must be 'longest' or 'shortest', got {self.side!r}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be in 1..100, got {self.quality}")
        if self.check not in ("header", "decode"):
            raise ValueError(f"check must be 'header' or 'decode', got {self.check!r}")
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels must be positive, got {self.max_pixels}")


class Shard(NamedTuple):
    """file: its name. first, stop: the source's records that it holds."""

    file: str
    first: int
    stop: int


class BrokenImages(ValueError):
    """More images than allowed are broken; the message lists them."""


def prepare(record: Record, options: ImageOptions) -> tuple[bytes, bool]:
    """The image as it is stored, and whether it was encoded anew. Raises BrokenRecord, which names the record."""
    with naming(record):
        picture = open_picture(record.data, options.max_pixels)
        side = (max if options.side == "longest" else min)(picture.width, picture.height)
        if options.max_side and side > options.max_side:
            return _encode(_shrink(picture, options.max_side / side), "JPEG", quality=options.quality), True
        if isinstance(record.data, np.ndarray):
            return _encode(Image.fromarray(picture.decode(1)), "PNG"), True
        if options.check == "decode":
            picture.decode(1)
        return bytes(record.data), False


def _shrink(picture: Picture, factor: float) -> Image.Image:
    """At `factor` of its size. A JPEG is decoded at no less than twice the result, which cannot be told by eye."""
    scale = max(n for n in (1, 2, 4, 8) if n == 1 or (picture.can_shrink and n * factor <= 0.5))
    size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
    return Image.fromarray(picture.decode(scale)).resize(size, Image.Resampling.LANCZOS)


def _encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_shard(
    source: Source,
    shard: Shard,
    options: ImageOptions,
    folder: Path,
    temporary: Path,
    *,
    roots: tuple[str, ...],
    keep_broken: bool,
    most_broken: int,
    tick: Callable[[int], None],
) -> dict:
    """Writes one shard into `folder` and returns what the manifest says of it.

    It is written to `temporary`, read back, flushed to the disk and only then renamed; `temporary` is gone afterwards
    in any case. roots: folders that names of records are given relative to, the first that fits. keep_broken: whether
    broken images are stored as they are or left out. tick: called with the bytes of every record once it is done.
    Raises BrokenImages, OSError (disk full, unreadable source), and what `tick` raises.
    """
    broken, encoded = [], 0
    with ShardWriter(folder / shard.file, temporary) as writer:
        for index in range(shard.first, shard.stop):
            record, problem = _read(source, index)
            name = _relative(record.name, roots)
            data, anew = record.data, False
            if problem is None:
                try:
                    data, anew = prepare(record, options)
                except BrokenRecord as e:
                    problem = e
            if problem is not None:
                broken.append({"index": index, "name": name, "kind": problem.kind, "reason": problem.reason})
                check_broken(broken, most_broken)
                if keep_broken and not isinstance(data, bytes):
                    raise ValueError(f"{problem}: it cannot be kept, for there is no file to keep; leave it out")
            size = 0
            if problem is None or keep_broken:
                packed = pack_record(name, data)
                writer.write(packed)
                encoded, size = encoded + anew, len(packed)
            tick(size)
    written = writer.entry
    return {
        "file": shard.file,
        "first": shard.first,
        "stop": shard.stop,
        "records": written["records"],
        "encoded_anew": encoded,
        "bytes": written["bytes"],
        "sha256": written["sha256"],
        "broken": broken,
    }


def _read(source: Source, index: int) -> tuple[Record, BrokenRecord | None]:
    """The record, or what is wrong with it alone. Raises Unavailable and Changed: they say nothing of the record."""
    try:
        return source[index], None
    except RecordError as e:
        return Record(None, e.name), BrokenRecord(e.name, e.reason, "unreadable")


def _relative(name: str, roots: tuple[str, ...]) -> str:
    """Without the folder that everything is in: the same images elsewhere make the same shards."""
    return next((name[len(root) :] for root in roots if root and name.startswith(root)), name)


def check_broken(broken: list[dict], most: int) -> None:
    """Raises BrokenImages, which lists them, when there are more than `most`."""
    if len(broken) > most:
        raise BrokenImages(
            f"more broken images than --max_broken_fraction allows ({most}); look at them, then raise it or choose "
            f"--on_broken=drop or keep (finished shards stay): {_listed(broken)}"
        )


def check_any(records: int, broken: list[dict]) -> None:
    """Raises BrokenImages, which lists them, when there is no other image."""
    if not records:
        raise BrokenImages(f"every image is broken, so there is nothing to pack: {_listed(broken)}")


def _listed(broken: list[dict]) -> str:
    names = "; ".join(f"{b['name']} ({b['reason']})" for b in broken[:20])
    return names + (f"; and {len(broken) - 20} more" if len(broken) > 20 else "")


def find_damage(folder: Path, entry: dict, options: ImageOptions, tick: Callable[[int], None]) -> list[str]:
    """What is wrong with a finished shard, one line a finding: the file as a whole, then every damaged record.

    Broken images that were kept are none. tick: called with the bytes of every record.
    """
    path = folder / entry["file"]
    if not path.is_file():
        return [f"{entry['file']}: missing"]
    found = []
    if path.stat().st_size != entry["bytes"]:
        found.append(f"{entry['file']}: {path.stat().st_size} bytes, should be {entry['bytes']}")
    elif sha256_file(path) != entry["sha256"]:
        found.append(f"{entry['file']}: sha256 differs from the manifest's")
    reader = open_shard(path)
    if not reader.ok():
        return [*found, f"{entry['file']}: not a whole ArrayRecord file"]
    if reader.num_records() != entry["records"]:
        return [*found, f"{entry['file']}: {reader.num_records()} records, should be {entry['records']}"]
    kept = {b["index"] - entry["first"] for b in entry["broken"]} if _keeps(entry) else set()
    for number in range(entry["records"]):
        size = 0
        try:
            data = reader.read([number])[0]
            size = len(data)
            record = unpack_record(data, f"{entry['file']}[{number}]")
            if number not in kept:
                with naming(record):
                    open_picture(record.data, options.max_pixels)
        except (RuntimeError, RecordError, BrokenRecord) as e:
            found.append(f"{entry['file']}[{number}]: {getattr(e, 'reason', e)}")
        tick(size)
    return found


def _keeps(entry: dict) -> bool:
    return entry["records"] == entry["stop"] - entry["first"]
