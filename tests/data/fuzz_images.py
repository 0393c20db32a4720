"""Damaged image files by the hundred, decoded in a process of its own with bounded memory.

  python -m tests.data.fuzz_images --count 300 --seed 0

Prints one JSON object: how the files fared, by whom they were counted, the slowest of them, and resident memory after
every pass over all files. A crash or a hang is seen by whoever started the process.
"""

import argparse
import io
import json
import resource
import struct
import time
import zlib
from collections import Counter

import numpy as np
from PIL import Image

from eupe_jax.data.host import BrokenRecord, HostConfig, RecordReader, decode, make_image, random_generator
from eupe_jax.data.sources import Record

CONFIG = HostConfig(size=64, max_pixels=4_000_000, max_broken_fraction=1.0)


def _save(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def whole_files(rng: np.random.Generator) -> dict[str, bytes]:
    """Undamaged files of every format and flavour."""
    y, x = np.mgrid[:90, :130]
    noise = rng.integers(0, 40, (90, 130, 3))
    rgb = Image.fromarray((np.stack([x, 2 * y, x + y], -1) % 216 + noise).astype(np.uint8))
    grey, alpha = rgb.convert("L"), rgb.convert("RGBA")
    alpha.putalpha(grey)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    more = [rgb.rotate(90), rgb.rotate(180)]
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "jpeg": _save(rgb, "JPEG", quality=90),
        "jpeg 4:4:4, turned": _save(rgb, "JPEG", subsampling=0, exif=exif),
        "jpeg progressive": _save(rgb, "JPEG", progressive=True),
        "jpeg grey": _save(grey, "JPEG"),
        "jpeg CMYK": _save(rgb.convert("CMYK"), "JPEG"),
        "jpeg restarts": _save(rgb, "JPEG", restart_marker_blocks=4),
        "jpeg multi-picture": _save(rgb, "MPO", save_all=True, append_images=more),
        "png": _save(rgb, "PNG"),
        "png alpha": _save(alpha, "PNG"),
        "png palette": _save(rgb.convert("P"), "PNG", transparency=3),
        "png 16 bits": _save(deep, "PNG"),
        "png 1 bit": _save(rgb.convert("1"), "PNG"),
        "png animated": _save(rgb, "PNG", save_all=True, append_images=more),
        "webp": _save(rgb, "WEBP"),
        "webp lossless": _save(alpha, "WEBP", lossless=True),
        "webp animated": _save(rgb, "WEBP", save_all=True, append_images=more),
        "gif": _save(rgb.convert("P"), "GIF", save_all=True, append_images=[m.convert("P") for m in more]),
        "bmp": _save(rgb, "BMP"),
        "tiff": _save(rgb, "TIFF"),
        "tiff lzw": _save(rgb, "TIFF", compression="tiff_lzw"),
        "tiff deflate": _save(deep, "TIFF", compression="tiff_adobe_deflate"),
        "tiff jpeg": _save(rgb, "TIFF", compression="jpeg"),
        "tiff fax": _save(rgb.convert("1"), "TIFF", compression="group4"),
        "ppm": _save(rgb, "PPM"),
    }


def flip_bits(data: bytearray, rng: np.random.Generator) -> bytearray:
    end = len(data) if rng.random() < 0.5 else min(len(data), 700)  # half of them in the headers
    for _ in range(int(rng.integers(1, 30))):
        data[int(rng.integers(end))] ^= 1 << int(rng.integers(8))
    return data


def truncate(data: bytearray, rng: np.random.Generator) -> bytearray:
    return data[: int(len(data) * rng.random())]


def shuffle_parts(data: bytearray, rng: np.random.Generator) -> bytearray:
    a, b = sorted(int(i) for i in rng.integers(len(data), size=2))
    return [data[:a] + data[b:], data[:b] + data[a:], data[:a] + bytes(b - a) + data[b:]][int(rng.integers(3))]


def lie(data: bytearray, rng: np.random.Generator) -> bytearray:
    """Another size where the format's header keeps it; checksums are made right again."""
    sides = [int(rng.choice([0, 1, 7, 1500, 40000, 65535])) for _ in range(2)]
    if data[:2] == b"\xff\xd8":
        start = next(i for i in range(2, len(data) - 9) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC1, 0xC2))
        data[start + 5 : start + 9] = struct.pack(">HH", *sides)
    elif data[:4] == b"\x89PNG":
        data[16:24] = struct.pack(">II", *(s * int(rng.choice([1, 60000])) % 2**32 for s in sides))
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif data[:3] == b"GIF":
        at = 6 if rng.random() < 0.5 else data.index(b"\x2c") + 5
        data[at : at + 4] = struct.pack("<HH", *sides)
    elif data[:2] == b"BM":
        data[18:26] = struct.pack("<ii", sides[0], -sides[1] if rng.random() < 0.5 else sides[1])
    elif data[:4] == b"RIFF":
        at = {b"VP8 ": 26, b"VP8L": 21, b"VP8X": 24}[bytes(data[12:16])]
        data[at : at + 6] = rng.bytes(6)
    elif data[:2] == b"P6":
        data = bytearray(b"P6 %d %d 255\n" % tuple(sides)) + data[15:]
    else:  # TIFF: the value of one of the first tags
        offset = struct.unpack("<I", data[4:8])[0] + 2 + 12 * int(rng.integers(8))
        data[offset + 4 : offset + 12] = struct.pack("<II", int(rng.choice([1, 2, 2**31])), int(rng.choice(sides)))
    return data


DAMAGES = {"bit flips": flip_bits, "truncation": truncate, "shuffled parts": shuffle_parts, "lying header": lie}


def damaged_files(count: int, seed: int) -> list[Record]:
    """`count` records; every whole file meets every damage in turn."""
    rng = np.random.default_rng(seed)
    wholes = list(whole_files(rng).items())
    pairs = [(whole, damage) for damage in DAMAGES for whole in wholes]
    records = []
    for i in range(count):
        (name, data), damage = pairs[(i * 29) % len(pairs)]  # 29 has no factor in common with their number
        records.append(Record(bytes(DAMAGES[damage](bytearray(data), rng)), f"{i}: {name}, {damage}"))
    return records


class OneRecord:
    """A source whose only record is the damaged one, and whose stand-in is a good one."""

    digest = ""

    def __init__(self, record: Record):
        self._records = [record, Record(np.zeros((8, 8, 3), np.uint8), "good")]

    def __len__(self):
        return 2

    def __getitem__(self, index: int) -> Record:
        return self._records[index]


def outcome(record: Record) -> str:
    """ "fine" or the kind of BrokenRecord that the whole picture gives; anything else escapes."""
    try:
        x = decode(record, max_pixels=CONFIG.max_pixels)
    except BrokenRecord as e:
        assert record.name in str(e)
        return e.kind
    assert x.dtype == np.uint8 and x.ndim == 3 and x.shape[2] == 3 and 0 < x.size <= 3 * CONFIG.max_pixels
    return "fine"


def resident_mb() -> float:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) / 1024 for line in f if line.startswith("VmRSS"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--memory_gb", type=float, default=3.0, help="limit of this process's address space")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (int(args.memory_gb * 2**30),) * 2)

    whole = {name: outcome(Record(data, name)) for name, data in whole_files(np.random.default_rng(0)).items()}
    records = damaged_files(args.count, args.seed)
    passes, memory, slowest = [], [], (0.0, "")
    for _ in range(args.passes):
        fared = []
        for i, record in enumerate(records):
            start = time.perf_counter()
            fared.append(outcome(record))
            try:  # the crop's own road: another scale, another box
                make_image(record, CONFIG, random_generator(0, 0, i))
            except BrokenRecord as e:
                assert e.kind == fared[-1], (str(e), fared[-1])
            slowest = max(slowest, (time.perf_counter() - start, record.name))
        passes.append(fared)
        memory.append(round(resident_mb(), 1))
    reader, tally = RecordReader(CONFIG, seed=0), Counter()
    for i, record in enumerate(records):
        image, index, met = reader.read(OneRecord(record), 0, 0, i, "fuzz")
        # The drawn stand-in may be the damaged record itself, several times.
        assert set(met) <= {passes[0][i]} and bool(met) == (passes[0][i] != "fine") == (index == 1)
        assert image.shape == (64, 64, 3)
        tally.update(met)
    print(
        json.dumps(
            {
                "whole": whole,
                "fared": Counter(passes[0]),
                "passes_agree": all(p == passes[0] for p in passes),
                "reader": {kind: n for (_, kind), n in reader.counts.items()},
                "tally": tally,
                "reader_reads": reader.reads,
                "slowest": slowest,
                "resident_mb": memory,
            }
        )
    )


if __name__ == "__main__":
    main()
