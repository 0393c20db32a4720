"""What the loader itself costs: start-up on a corpus of full size, memory over thousands of batches, time per image.

  python benchmarks/loader.py --json=loader.json

The corpus is virtual: 1.7 billion records, each one of 64 small JPEGs, mixed with 1.28 million as EUPE mixes
ImageNet-1k (10% of batches). Pictures are tiny, so that what is left is the loader: order, mixture, random crops,
threads, worker processes. Bars: the first batch within 5 s, and memory that does not grow from the thousandth batch to
the last by more than 16 MB a process.
"""

import argparse
import io
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from convert import cli
from eupe_jax.data.host import HostConfig, RecordReader
from eupe_jax.data.loader import Loader
from eupe_jax.data.mixture import MIXINGS
from eupe_jax.data.sources import Record

LVD, IMAGENET = 1_700_000_000, 1_281_167
STARTUP_BAR, GROWTH_BAR = 5.0, 16e6  # seconds, bytes a process
FAR = 390_000  # step of a resumed run


class Virtual:
    """`length` records, each one of 64 small JPEGs."""

    def __init__(self, length: int, side: int = 32):
        self._length, self.digest = length, f"virtual {length}"
        noise = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
        self._files = [_jpeg(x.repeat(side // 8, 0).repeat(side // 8, 1)) for x in noise]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        return Record(self._files[index % 64], f"virtual[{index}]")


def _jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG")
    return buffer.getvalue()


def make_loader(mixing: str, args: argparse.Namespace, **settings) -> Loader:
    return Loader(
        {"imagenet": Virtual(IMAGENET), "lvd": Virtual(LVD)},
        HostConfig(size=args.size),
        **{"batch_size": args.batch_size, "seed": 0, "threads": 2, **settings},
        weights={"imagenet": 0.1, "lvd": 0.9},
        mixing=mixing,
    )


def measure_startup(mixing: str, step: int, args: argparse.Namespace) -> float:
    """Seconds from nothing to the first batch."""
    began = time.perf_counter()
    batches = make_loader(mixing, args).batches(step)
    next(batches)
    seconds = time.perf_counter() - began
    batches.close()
    return seconds


def resident() -> tuple[int, int]:
    """(bytes of resident memory of this process and its workers, how many processes)."""
    pids = [os.getpid(), *(p.pid for p in multiprocessing.active_children())]
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE"), len(pids)


def measure_memory(workers: int, args: argparse.Namespace) -> dict:
    """Resident memory along the way."""
    marks = sorted({n for n in (100, 1000, *range(2000, args.batches, 2000), args.batches) if n <= args.batches})
    batches = make_loader("record", args, workers=workers).batches()
    began, found = time.perf_counter(), {}
    for done in range(1, args.batches + 1):
        next(batches)
        if done in marks:
            found[done], processes = resident()
            print(f"  workers {workers}: {found[done] / 1e6:8.1f} MB after {done:6} batches", flush=True)
    seconds = time.perf_counter() - began
    batches.close()
    growth = found[marks[-1]] - found[min(1000, marks[-1])]
    return {
        "workers": workers,
        "processes": processes,
        "resident_bytes": found,
        "growth_from_1000th": growth,
        "flat": growth <= GROWTH_BAR * processes,
        "microseconds_per_image": round(seconds / args.batches / args.batch_size * 1e6, 1),
    }


def measure_cost(mixing: str, args: argparse.Namespace) -> dict:
    """Microseconds per image, medians of interleaved rounds: choosing records, reading them, and all that the loader
    does, in one thread. A host's part of a batch is 128 images."""
    images, steps = 128, 4
    loader = make_loader(mixing, args, batch_size=images, threads=1)
    reader, source = RecordReader(HostConfig(size=args.size), 0), Virtual(LVD)

    def consume(first: int) -> None:
        batches = loader.batches(first)
        for _ in range(steps):
            next(batches)
        batches.close()

    works = {
        "choose": lambda step: loader.record_ids(step),
        "read": lambda step: [reader(source, i, step, i) for i in range(images)],
        "all": consume,
    }
    rounds: dict[str, list[float]] = {name: [] for name in works}
    for i in range(args.rounds + 1):
        for name, work in works.items():
            began = time.perf_counter()
            for step in range(i * steps, (i + 1) * steps) if name != "all" else (i * steps,):
                work(step)
            if i:  # the first round warms up
                rounds[name].append((time.perf_counter() - began) / images / steps * 1e6)
    return {"mixing": mixing, **{name: round(statistics.median(times), 2) for name, times in rounds.items()}}


def main(argv: list[str] | None = None) -> int:
    parser = cli.described(__doc__)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--batches", type=int, default=10_000, help="batches of the memory test (default: 10000)")
    parser.add_argument("--batch_size", type=int, default=8, help="of the memory test (default: 8)")
    parser.add_argument("--size", type=int, default=16, help="side of the images (default: 16)")
    parser.add_argument("--rounds", type=int, default=15, help="of the timings (default: 15)")
    args = parser.parse_args(argv)
    for name in ("batches", "batch_size", "size", "rounds"):
        if getattr(args, name) < 1:
            raise SystemExit(f"error: --{name} must be positive, got {getattr(args, name)}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    startup = {
        f"{mixing}, step {step}": round(measure_startup(mixing, step, args), 3)
        for mixing in MIXINGS
        for step in (0, FAR)
    }
    for what, seconds in startup.items():
        print(f"first batch of {LVD + IMAGENET} records ({what}): {seconds:.3f} s")
    costs = [measure_cost(mixing, args) for mixing in MIXINGS]
    for cost in costs:
        print(
            f"microseconds per image, mixing by {cost['mixing']}: choosing it {cost['choose']}, reading it "
            f"{cost['read']}, all that the loader does {cost['all']}"
        )
    memory = [measure_memory(workers, args) for workers in (0, 2)]
    met = max(startup.values()) < STARTUP_BAR and all(m["flat"] for m in memory)
    growth = ", ".join(f"{m['growth_from_1000th'] / 1e6:+.1f} MB with {m['workers']} workers" for m in memory)
    print(f"growth of memory after the first 1000 batches: {growth}; bars {'met' if met else 'MISSED'}")
    if args.json:
        figures = {
            "records": LVD + IMAGENET,
            "startup_seconds": startup,
            "cost": costs,
            "memory": memory,
            "bars_met": met,
            "load": os.getloadavg()[0],
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
        }
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
