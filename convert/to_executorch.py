"""From a checkpoint to an ExecuTorch program (.pte) for mobile CPUs.

  python convert/to_executorch.py --checkpoint runs/stage3 --out eupe_vitt16.pte

Before anything is written, real images must give the same features in Flax and PyTorch (1e-4) and in PyTorch and the
finished program run by the ExecuTorch runtime (1e-3). NAME.json beside NAME.pte says how to feed the program.
"""

import json
import logging
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

for _name in ("torchao", "torch.utils._pytree"):  # their import-time notices say nothing about this export
    logging.getLogger(_name).setLevel(logging.ERROR)

from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner  # noqa: E402
from executorch.exir import to_edge_transform_and_lower  # noqa: E402
from executorch.extension.pybindings import portable_lib  # noqa: E402
from executorch.runtime import Runtime  # noqa: E402

from convert import cli, delegation, gates, to_torch, weights  # noqa: E402
from convert.export_modules import for_export  # noqa: E402
from eupe_jax.training.checkpoints import LoadedEncoder  # noqa: E402

BACKENDS = ("xnnpack", "portable")
METHOD = "forward"
Size = int | tuple[int, int]


@dataclass(frozen=True)
class ExportResult:
    """A lowered program. `report` becomes NAME.json: how to feed it, how it was made, what was measured."""

    pte: bytes
    report: dict[str, Any]


def export(encoder: LoadedEncoder, resolution: Size | None = None, backend: str = "xnnpack") -> ExportResult:
    """Lowers an encoder for one image of a fixed size; ungated (see `gate` and `convert`).

    Args:
      resolution: side, or (height, width), in pixels; default the encoder's own.
      backend: "xnnpack", or "portable" (reference kernels only: slow, runs anywhere).

    Raises:
      ValueError: unknown backend, an encoder that does not convert, or a size that is no multiple of its patches.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is none of {', '.join(BACKENDS)}")
    height, width = _sides(encoder, resolution)
    network = for_export(weights.to_module(encoder), height, width)
    image = torch.zeros(1, 3, height, width)
    start = time.perf_counter()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        program = torch.export.export(network, (image,))
        partitioners = [XnnpackPartitioner()] if backend == "xnnpack" else []
        edge = to_edge_transform_and_lower({METHOD: program}, partitioner=partitioners)
        lowered = delegation.summary(edge, METHOD)
        pte = edge.to_executorch().buffer
    shapes = [list(output.shape) for output in network(image)]
    method = {
        "input": {"dtype": "float32", "shape": [1, 3, height, width]},
        "outputs": [{"name": n, "shape": s} for n, s in zip(network.outputs, shapes, strict=True)],
        "delegation": lowered,
    }
    report = weights.describe(encoder) | {
        "format": "eupe_jax.pte/1",
        "resolution": [height, width],
        "backend": backend,
        "methods": {METHOD: method},
        "export_seconds": round(time.perf_counter() - start, 1),
    }
    return ExportResult(bytes(pte), report)


def _sides(encoder: LoadedEncoder, resolution: Size | None) -> tuple[int, int]:
    size = resolution or encoder.resolution
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


class PteRunner:
    """A program in the ExecuTorch runtime. Holds on to the bytes: the runtime reads weights from them while it runs."""

    def __init__(self, pte: bytes, method: str = METHOD):
        self._pte = pte
        self._program = Runtime.get().load_program(pte)
        self._method = self._program.load_method(method)

    def __call__(self, image_1x3xHxW: torch.Tensor) -> list[torch.Tensor]:
        # The runtime reuses its output memory.
        return [output.clone() for output in self._method.execute((image_1x3xHxW,))]


def run_pte(pte: bytes, pixels_NxHxWx3: np.ndarray, names: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
    """Features of normalised images from a program of this file, one image at a time.

    Args:
      names: of the outputs; default those written here: cls, [storage,] patches.
    """
    run = PteRunner(pte)
    batches = [run(torch.from_numpy(x[None].transpose(0, 3, 1, 2).copy())) for x in pixels_NxHxWx3]
    names = names or (("cls", "storage", "patches") if len(batches[0]) == 3 else ("cls", "patches"))
    return {n: torch.cat(parts).numpy() for n, parts in zip(names, zip(*batches, strict=True), strict=True)}


def gate(encoder: LoadedEncoder, pte: bytes, images_NxHxWx3: np.ndarray) -> dict[str, gates.Report]:
    """Flax against PyTorch, then PyTorch against the program in the runtime, on uint8 images of the program's size.

    Raises:
      GateError: either pair differs by more than is allowed (1e-4, 1e-3) on features of unit standard deviation.
    """
    module = weights.to_module(encoder)
    first = to_torch.gate(encoder, module, images_NxHxWx3)
    pixels = gates.normalise(encoder, images_NxHxWx3)
    second = gates.compare(gates.torch_features(module, pixels), run_pte(pte, pixels))
    gates.require(second, gates.TORCH_VS_PTE, "PyTorch and the .pte")
    return {"flax_vs_torch": first, "torch_vs_pte": second}


def latency(pte: bytes, size: tuple[int, int], threads: int = 1, runs: int = 20) -> dict[str, Any]:
    """Median milliseconds a run on this machine, after one warm-up run; stops early after half a minute."""
    portable_lib._unsafe_reset_threadpool(threads)
    run, image, times = PteRunner(pte), torch.zeros(1, 3, *size), []
    run(image)
    while len(times) < runs and (not times or sum(times) < 30):
        start = time.perf_counter()
        run(image)
        times.append(time.perf_counter() - start)
    return {"median_ms": round(1e3 * median(times), 2), "runs": len(times), "threads": threads}


def convert(
    encoder: LoadedEncoder,
    out: str | Path,
    resolution: Size | None = None,
    backend: str = "xnnpack",
    images: str | Path | None = None,
    threads: int = 1,
    runs: int = 20,
) -> dict[str, Any]:
    """Exports, gates, measures, then writes `out` and NAME.json; returns what NAME.json holds.

    Raises:
      GateError, ValueError, OSError: nothing was written.
    """
    out = Path(out)
    if out.suffix != ".pte":
        raise ValueError(f"--out {out}: the name must end in .pte")
    if threads < 1 or runs < 1:
        raise ValueError(f"threads and runs must be at least 1, got {threads} and {runs}")
    weights.check_writable(out)
    height, width = _sides(encoder, resolution)
    photographs = gates.load_images(images, height, width)
    result = export(encoder, (height, width), backend)
    result.report["gates"] = gate(encoder, result.pte, photographs)
    result.report["latency"] = latency(result.pte, (height, width), threads, runs)
    sidecar = json.dumps(result.report, indent=2).encode()
    weights.write_files({out.with_suffix(".json"): sidecar, out: result.pte})
    return result.report


def summarise(report: dict[str, Any]) -> str:
    """The report as a few lines to print."""
    d, speed = report["methods"][METHOD]["delegation"], report["latency"]
    outside = ", ".join(f"{count} {name}" for name, count in d["outside"].items()) or "none"
    lines = [
        f"{report['backend']}: {d['partitions']} partitions, {d['share_of_nodes']:.1%} of operators and "
        f"{d['share_of_flops']:.1%} of {d['flops'] / 1e9:.2f} GFLOP inside; outside: {outside}",
        f"latency here: {speed['median_ms']} ms (median of {speed['runs']} runs, {speed['threads']} threads)",
    ]
    for pair, figures in report["gates"].items():
        worst = max(f["max_abs"] for f in figures.values())
        cosine = min(f["cosine"] for f in figures.values())
        lines.append(f"{pair.replace('_', ' ')}: max abs {worst:.2e}, cosine at least {cosine:.6f}")
    return "\n".join(lines)


def _size(text: str) -> Size:
    height, _, width = text.lower().partition("x")
    return (int(height), int(width)) if width else int(height)


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--out", required=True, metavar="NAME.pte", help="program to write, with NAME.json beside it")
    add("--resolution", type=_size, metavar="S|HxW", help="input size in pixels (default: the checkpoint's)")
    add("--backend", choices=BACKENDS, default="xnnpack", help="portable: reference kernels, slow (default: xnnpack)")
    add("--images", metavar="DIR", help="photographs for the checks (default: scikit-image's)")
    add("--threads", type=int, default=1, help="threads of the latency measurement (default: 1)")
    add("--runs", type=int, default=20, help="runs of the latency measurement (default: 20)")
    args = parser.parse_args(argv)
    try:
        encoder = weights.load(args.checkpoint, args.student, args.model)
        report = convert(encoder, args.out, args.resolution, args.backend, args.images, args.threads, args.runs)
    except (ValueError, OSError) as e:
        print(f"error: {cli.one_line(e)}", file=sys.stderr)
        return 1
    print(summarise(report))
    out = Path(args.out)
    print(f"wrote {out} ({out.stat().st_size / 2**20:.1f} MiB) and {out.with_suffix('.json')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
