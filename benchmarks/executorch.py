"""Latency, size and memory of the students' phone programs, beside other runtimes on the same machine in one run.

  python benchmarks/executorch.py --models eupe_vitt16,eupe_convnext_tiny --resolutions 256 --json executorch.json

All runtimes of a model and a size take turns, one run each a round, so that whatever else the machine does meets all
alike. Weights are random; LayerScale, norms and biases are off their initial values. Exports are kept in --workdir:
the first benchmark of a model makes them (minutes for the large ones), later ones only measure. Runtimes that are not
installed, or fail, are left out, which is said; int8 is measured in ExecuTorch and onnxruntime. For vision transformers
the time of the matrix products alone is measured too, in the fastest library for each shape.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not this script's folder, which holds a file of the name of a package: executorch
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"

import argparse  # noqa: E402
import contextlib  # noqa: E402
import json  # noqa: E402
import platform  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable, Iterator, Mapping  # noqa: E402
from importlib import metadata  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks import matmul_bound, runtimes  # noqa: E402
from convert import cli, torch_vit, weights  # noqa: E402
from eupe_jax.evals.pte import set_threads  # noqa: E402

MODELS = (
    "eupe_vitt16",
    "eupe_vits16",
    "eupe_vitb16",
    "eupe_convnext_tiny",
    "eupe_convnext_small",
    "eupe_convnext_base",
)
PRECISIONS = ("fp32", "int8")
KEY = ("model", "resolution", "precision", "runtime", "threads")
# iPhone 15 Pro, CPU, ExecuTorch: milliseconds at 256 and 512 pixels (arXiv 2603.22387, table 11).
PAPER = {
    "eupe_vitt16": (6.8, 38.3),
    "eupe_vits16": (17.1, 97.9),
    "eupe_vitb16": (55.2, 305.2),
    "eupe_convnext_tiny": (22.4, 82.4),
    "eupe_convnext_small": (38.5, 141.9),
    "eupe_convnext_base": (59.3, 222.7),
}
Record = dict[str, Any]


def take_turns(
    runs: Mapping[Any, Callable[[], object]], rounds: int, seconds: float, label: str, warm: bool = False
) -> dict[Any, list]:
    """Milliseconds of every run, after a warm-up: all of them in turn, `rounds` times or until `seconds` have passed
    (then at least three). Pairs: of the wall clock, and of this process on all its processors. With `warm` each runs
    untimed right before, so that short ones find their data in the caches as they would inside a model."""
    pause = 0.005 if torch.get_num_threads() > 1 else 0  # threads of the run before may still spin
    for run in runs.values():
        run()
    found: dict[Any, list] = {name: [] for name in runs}
    start = time.perf_counter()
    for count in tqdm(range(rounds), desc=label, leave=False, unit="round"):
        if count >= 3 and time.perf_counter() - start > seconds:
            break
        for name, run in runs.items():
            time.sleep(pause)
            if warm:
                run()
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            found[name].append((1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)))
    return found


def spread(times: list[tuple[float, float]]) -> Record:
    (p10, median, p90), cpu = np.percentile([t for t, _ in times], [10, 50, 90]), np.median([c for _, c in times])
    found = {"median_ms": median, "p10_ms": p10, "p90_ms": p90, "cpu_ms": cpu}
    return {name: round(float(value), 3) for name, value in found.items()} | {"runs": len(times)}


def flops(module: torch.nn.Module, image: torch.Tensor) -> int:
    """Floating-point operations of the matrix products and convolutions, two a multiply-add."""
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(image)
    return counter.get_total_flops()


def measure(encoder, module: torch.nn.Module, side: int, threads: int, args: argparse.Namespace) -> list[Record]:
    """Records of one model at one size on a number of threads."""
    torch.set_num_threads(threads)
    set_threads(threads)
    exports = runtimes.Exports(encoder, module, side, args.workdir)
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = [value for value in module(image).values() if value.numel()]
    operations, field, what = flops(module, image), {}, f"{encoder.name} {side} px, {threads} threads"
    for precision in args.precisions:
        for runtime in args.runtimes:
            if precision == "int8" and runtime not in runtimes.INT8:
                continue
            with _or_left_out(f"{what}: {runtime} {precision}"):
                contender = runtimes.MAKERS[runtime](exports, precision, threads, image)
                contender.facts |= _agreement(expected, contender.run())
                field[runtime, precision] = contender
    times = take_turns({k: c.run for k, c in field.items()}, args.runs, args.seconds, what)
    records = []
    for (runtime, precision), contender in field.items():
        record = {"model": encoder.name, "resolution": side, "precision": precision, "runtime": runtime}
        record |= {"threads": threads} | spread(times[runtime, precision]) | {"delegated_flops": None}
        record["gflops"] = round(operations / 1e9, 3)
        record["gflops_per_s"] = round(operations / 1e6 / record["median_ms"], 1)
        records.append(record | contender.facts | {"load": os.getloadavg()[0]})
    if isinstance(module, torch_vit.VisionTransformer) and args.bound and ("executorch", "fp32") in field:
        ours = next(r for r in records if (r["runtime"], r["precision"]) == ("executorch", "fp32"))
        with _or_left_out(f"{what}: the products alone"):
            ours |= bound(module, side, threads, field["executorch", "fp32"].run, args)
    return records


@contextlib.contextmanager
def _or_left_out(what: str) -> Iterator[None]:
    """Says what is being prepared, and what made it fail: the others are measured all the same."""
    tqdm.write(what)
    try:
        yield
    except Exception as e:  # of whatever kind a library raises
        tqdm.write(f"left out: {what}: {cli.one_line(e) or type(e).__name__}", file=sys.stderr)


def _agreement(expected: list[torch.Tensor], got: Any) -> Record:
    """How close a runtime's features are to the readable module's: a benchmark of wrong results is worth nothing.

    The least cosine of an output, and the largest difference on features of unit standard deviation.

    Raises:
      RuntimeError: they are others altogether.
    """
    cosine, apart = [], []
    for a, b in zip(expected, got, strict=True):
        a, b = a.double().flatten(), torch.as_tensor(b).double().flatten()
        cosine.append(float(a @ b / a.norm() / b.norm()))
        apart.append(float((a - b).abs().max() / a.std()))
    if not min(cosine) > 0.9:
        raise RuntimeError(f"a runtime computes something else: cosine {min(cosine):.4f} to the readable module")
    return {"cosine": round(min(cosine), 6), "max_abs": float(f"{max(apart):.2e}")}


def bound(vit: torch_vit.VisionTransformer, side: int, threads: int, run: Callable, args: argparse.Namespace) -> Record:
    """Milliseconds of the model's matrix products in the fastest library for each shape, and of the model, which takes
    its turn in between. On one thread of processor time, which other programs of the machine lengthen least."""
    total, model, best, clock = 0.0, [], {}, 1 if threads == 1 else 0
    for shape, count in matmul_bound.shapes(vit, side).items():
        label = "x".join(map(str, shape))
        field = {**matmul_bound.contenders(shape, threads), "model": run}
        times = take_turns(field, args.runs, args.seconds / 7, f"products {label}, {threads} threads", warm=True)
        model += [pair[clock] for pair in times.pop("model")]
        medians = {
            name: float(np.median([pair[clock] for pair in t])) / matmul_bound.COPIES for name, t in times.items()
        }
        name = min(medians, key=medians.__getitem__)
        total += count * medians[name]
        best[label] = {"count": count, "library": name} | {f"{k}_ms": round(v, 4) for k, v in medians.items()}
    found = {"matmul_bound_ms": round(total, 3), "model_beside_bound_ms": round(float(np.median(model)), 3)}
    return found | {"over_bound": round(found["model_beside_bound_ms"] / total, 3), "matmul_shapes": best}


def merge(path: Path, records: list[Record], append: bool) -> list[Record]:
    """Writes records as JSON; with `append`, those of `path` that were not measured again stay."""
    kept = json.loads(path.read_text()) if append and path.exists() else []
    fresh = {tuple(r[k] for k in KEY) for r in records}
    kept = [r for r in kept if tuple(r[k] for k in KEY) not in fresh] + records
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(kept, indent=1) + "\n")
    temporary.replace(path)
    return kept


def table(records: list[Record]) -> str:
    """Median milliseconds by model, size, precision and threads, one column a runtime; our size and memory."""
    columns = [r for r in runtimes.RUNTIMES if any(record["runtime"] == r for record in records)]
    rows: dict[tuple, dict[str, Record]] = {}
    for record in records:
        rows.setdefault(tuple(record[k] for k in KEY if k != "runtime"), {})[record["runtime"]] = record
    head = ["model", "px", "precision", "threads", *columns, "MB", "MB memory", "delegated", "x products"]
    lines = [" | ".join(head)]
    for key, row in sorted(rows.items()):
        ours = row.get("executorch", {})
        cells = [str(k) for k in key[:3]] + [str(key[3])]
        cells += [f"{row[c]['median_ms']:.1f}" if c in row else "" for c in columns]
        cells += [f"{ours[k] / 1e6:.1f}" if k in ours else "" for k in ("file_bytes", "memory_bytes")]
        cells += [f"{ours['delegated_flops']:.2%}" if ours else "", str(ours.get("over_bound", ""))]
        lines.append(" | ".join(cells))
    return "\n".join(lines)


def beside_paper(records: list[Record]) -> str:
    """Our fp32 and int8 latency on one thread and the paper's on a phone, each relative to its ViT-T at that size."""
    ours = {(r["model"], r["resolution"], r["precision"]): r["median_ms"] for r in records
            if r["runtime"] == "executorch" and r["threads"] == 1}  # fmt: skip
    lines = ["relative to ViT-T | px | iPhone 15 Pro (paper) | fp32 here | int8 here"]
    for column, side in enumerate((256, 512)):
        for model, figures in PAPER.items():
            here = []
            for precision in PRECISIONS:
                a, b = ours.get((model, side, precision)), ours.get(("eupe_vitt16", side, precision))
                here.append(f"{a / b:.2f}" if a and b else "-")
            if here != ["-", "-"]:
                ratio = figures[column] / PAPER["eupe_vitt16"][column]
                lines.append(f"{model} | {side} | {ratio:.2f} | {here[0]} | {here[1]}")
    return "\n".join(lines) if len(lines) > 1 else ""


def _several(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        chosen = list(known) if text == "all" else [name for name in text.split(",") if name]
        if unknown := [name for name in chosen if name not in known] or not chosen:
            named = ", ".join(unknown) if isinstance(unknown, list) else "nothing"
            raise argparse.ArgumentTypeError(f"{named} is none of {', '.join(known)}")
        return chosen

    return parse


def _numbers(text: str) -> list[int]:
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise ValueError
    return found


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.described(__doc__)
    add = parser.add_argument
    add("--models", type=_several(MODELS), default="all", metavar="all|NAME,..", help=", ".join(MODELS))
    add("--resolutions", type=_numbers, default="256,512", metavar="S,..", help="pixels a side (default: 256,512)")
    add("--precisions", type=_several(PRECISIONS), default="all", metavar="P,..", help="fp32, int8 (default: both)")
    add("--threads", type=_numbers, default="1,2", metavar="N,..", help="default: 1,2")
    add(
        "--runtimes", type=_several(runtimes.RUNTIMES), default="all", metavar="R,..", help=", ".join(runtimes.RUNTIMES)
    )
    add("--runs", type=int, default=20, help="rounds (default: 20)")
    add("--seconds", type=float, default=30, help="stop the rounds of a model and size after this (default: 30)")
    add("--no-bound", dest="bound", action="store_false", help="leave the matrix products alone out")
    add("--workdir", type=Path, default=Path("runs/executorch_benchmark"), help="where exports are kept")
    add("--json", type=Path, metavar="FILE", help="also write the records there")
    add("--append", action="store_true", help="keep records of FILE that are not measured again")
    args = parser.parse_args(argv)
    if args.runs < 1:
        parser.error("--runs must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    for runtime in list(args.runtimes):
        if absent := runtimes.missing(runtime):
            print(f"leaving {runtime} out: {', '.join(absent)} not installed (pip install 'eupe_jax[benchmark]')")
            args.runtimes.remove(runtime)
    warnings.filterwarnings("ignore", message=r"os\.fork")  # by OpenVINO, to look at the processor
    count = len(args.models) * len(args.resolutions) * len(args.threads)
    minutes = count * args.seconds / 60 * (2 if args.bound else 1)
    print(f"{count} races of {args.seconds:.0f} s, or three rounds: about {minutes:.0f} min, new exports aside")
    start, records = time.perf_counter(), []
    about = {"machine": platform.processor() or platform.machine(), "executorch": metadata.version("executorch")}
    try:
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
        for name in args.models:
            encoder = runtimes.random_encoder(name)
            module = weights.to_module(encoder)
            for side in args.resolutions:
                for threads in args.threads:
                    records += [r | about for r in measure(encoder, module, side, threads, args)]
                    if args.json:
                        merge(args.json, records, args.append)
    except (ValueError, OSError, RuntimeError) as e:
        print(f"error: {cli.one_line(e)}", file=sys.stderr)
        return 1
    if not records:
        print("error: nothing could be measured", file=sys.stderr)
        return 1
    print("\n".join(["", table(records), "", beside_paper(records), f"{time.perf_counter() - start:.0f} s"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
