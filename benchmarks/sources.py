"""Reads a second from every kind of source that holds the same images, in shuffled order, one thread, nothing decoded.

    python benchmarks/sources.py --tar='../shared/data/caltech101/train-*.tar' [--json FILE]

Writes the images once as a folder, parquet (row groups of 100 and 1000) and packed ArrayRecord into a temporary folder.
Files are in the page cache: what is measured is the software.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from eupe_jax.data.sources import Source, TarShards, open_source
from eupe_jax.data.sources.record_codec import pack_record


def _write(images: TarShards, tar: str, folder: Path) -> dict[str, tuple[str, str]]:
    """(kind, path) of each container by name."""
    import pyarrow as pa
    import pyarrow.parquet
    from array_record.python.array_record_module import ArrayRecordWriter

    (folder / "images").mkdir()
    (folder / "packed").mkdir()
    writer = ArrayRecordWriter(str(folder / "packed" / "x.array_record"), "group_size:1,uncompressed")
    records = [images[i] for i in range(len(images))]
    for i, record in enumerate(records):
        (folder / "images" / f"{i:07d}.jpg").write_bytes(record.data)
        writer.write(pack_record(record.name, record.data))
    writer.close()
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array([{"bytes": r.data, "path": None} for r in records], struct)})
    for rows in (100, 1000):
        pyarrow.parquet.write_table(table, folder / f"{rows}.parquet", row_group_size=rows)
    return {
        "array_record": ("array_record", str(folder / "packed")),
        "tar": ("tar", tar),
        "images": ("images", str(folder / "images")),
        "parquet_groups_of_100": ("parquet", str(folder / "100.parquet")),
        "parquet_groups_of_1000": ("parquet", str(folder / "1000.parquet")),
        "parquet_groups_of_1000_all_in_cache": ("parquet", str(folder / "1000.parquet")),
    }


def _rate(source: Source, order: np.ndarray, limit_s: float) -> float:
    begin, done = time.perf_counter(), 0
    for i in order:
        source[int(i)]
        done += 1
        if time.perf_counter() - begin > limit_s:
            break
    return done / (time.perf_counter() - begin)


def _open_seconds(kind: str, path: str, index: Path) -> float:
    begin = time.perf_counter()
    open_source(kind, path, index_dir=str(index))
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tar", required=True, help="WebDataset shards: folder, file, glob or brace pattern")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--rounds", type=int, default=5, help="the median of so many rounds counts")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="sources_"))
    try:
        images = TarShards(arguments.tar, index_dir=str(folder / "first"))
        places = _write(images, arguments.tar, folder)
        figures, sources = {}, {}
        for name, (kind, path) in places.items():
            index = folder / f"index_{name}"
            cold, warm = _open_seconds(kind, path, index), _open_seconds(kind, path, index)
            options = {"cache_mib": 0} if kind == "parquet" and not name.endswith("in_cache") else {}
            sources[name] = open_source(kind, path, index_dir=str(index), **options)
            figures[name] = {"open_first_s": cold, "open_again_s": warm}
        orders = [np.random.default_rng(r).permutation(len(images)) for r in range(arguments.rounds)]
        rates = {name: [] for name in sources}
        for order in orders:  # rounds are interleaved: a busy machine slows all alike
            for name, source in sources.items():
                rates[name].append(_rate(source, order, 1.0))
        size = float(np.mean([len(images[i].data) for i in range(0, len(images), 7)]))
        for name in sources:
            figures[name]["reads_per_s"] = float(np.median(rates[name]))
            first, again = figures[name]["open_first_s"], figures[name]["open_again_s"]
            print(
                f"{name:38s} {figures[name]['reads_per_s']:9.0f} reads/s; opened in {first:.4f} s, again {again:.4f} s"
            )
        print(f"{len(images)} images of {size / 1000:.1f} kB on average")
        if arguments.json:
            arguments.json.write_text(json.dumps({"images": len(images), "mean_bytes": size, **figures}, indent=1))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
