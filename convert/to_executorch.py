"""From a checkpoint to an ExecuTorch program (.pte) for mobile CPUs.

  python convert/to_executorch.py --checkpoint runs/stage3 --out eupe_vitt16.pte --resolution 256,384,512

Before anything is written, at every size real images must give the same features in Flax and PyTorch (1e-4) and in
PyTorch and the finished program run by the ExecuTorch runtime (fp32: 1e-3; int8: mean cosine of class tokens 0.999, of
patches 0.995), and the XNNPACK delegate must take 99% of the FLOPs. The program has a method for every size, encode_256
or encode_256x320; where there is one size only, it is called forward, too. How to feed it stands in NAME.json beside
NAME.pte and in constant methods inside it (docs/mobile.md); what it is, for people, in NAME.pte.md (docs/cards.md).
"""

import json
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from convert import cli

if __name__ == "__main__":
    cli.require_export()

import torch

from convert import cards, contract, delegation, gates, lowering, onnx_file, to_torch, weights
from convert.contract import Size
from convert.export_modules import for_export
from eupe_jax.evals.pte import PteProgram, set_threads
from eupe_jax.training.encoders import LoadedEncoder

PRECISIONS = ("fp32", "int8")
IMAGES = {"fp32": 4, "int8": 16}  # of the gate: differences in precision show on any image, those of int8 vary


@dataclass(frozen=True)
class ExportResult:
    """A lowered program. `report` becomes NAME.json: how to feed it, how it was made, what was measured."""

    pte: bytes
    report: dict[str, Any]


def export(
    encoder: LoadedEncoder,
    resolution: Size | list[Size] | None = None,
    backend: str = "xnnpack",
    precision: str = "fp32",
    *,
    outputs: Sequence[str] | None = None,
    uint8_input: bool = False,
    float_layers: Collection[str] = (),
) -> ExportResult:
    """Lowers an encoder for one image at a time of fixed sizes; ungated (see `gate` and `convert`).

    Args:
      resolution: side, or (height, width), in pixels, or a list of such for a method each; default the encoder's own.
      backend: "xnnpack", or "portable" (reference kernels only: slow, runs anywhere).
      precision: "fp32", or "int8" for linear layers and convolutions.
      outputs: which of "cls", "storage", "patches" methods return; default all that the encoder has.
      uint8_input: methods take RGB of 0 to 255, normalisation is done by the program.
      float_layers: those that int8 leaves alone (quantize.choose_float_layers).

    Raises:
      ValueError: unknown backend or precision, an encoder that does not convert, outputs it does not have or by which
        int8 cannot be judged, a size that is no multiple of its patches, or one given twice.
    """
    _check(backend, precision, outputs)
    sizes = _sizes(encoder, resolution)
    start = time.perf_counter()
    module = weights.to_module(encoder)
    networks, methods = {}, {}
    for name, (height, width) in sizes.items():
        network = _network(encoder, module, height, width, outputs, uint8_input)
        image = torch.zeros(1, 3, height, width, dtype=torch.uint8 if uint8_input else torch.float32)
        with torch.no_grad():
            shapes = [list(output.shape) for output in network(image)]
        methods[name] = {
            "input": {"dtype": "uint8" if uint8_input else "float32", "shape": [1, 3, height, width]},
            "outputs": [{"name": n, "shape": s} for n, s in zip(network.outputs, shapes, strict=True)],
        }
        networks[name] = (_quantize(network, float_layers) if precision == "int8" else network, (image,))
    report = contract.describe(encoder, backend, precision, uint8_input)
    report["resolution"] = list(next(iter(sizes.values())))
    report["outputs"] = [output["name"] for output in next(iter(methods.values()))["outputs"]]
    alias = "forward" if len(sizes) == 1 else None
    lowered = lowering.lower(networks, backend, contract.constants(report, sizes), alias)
    for name, method in methods.items():
        method |= {"planned_bytes": lowered.planned_bytes[name], "delegation": lowered.delegation[name]}
    report |= {"methods": methods, "pte_bytes": len(lowered.pte)}
    if precision == "int8":
        report["float_layers"] = sorted(float_layers)
    report["export_seconds"] = round(time.perf_counter() - start, 1)
    return ExportResult(lowered.pte, report)


def _check(backend: str, precision: str, outputs: Sequence[str] | None) -> None:
    if backend not in lowering.BACKENDS:
        raise ValueError(f"backend {backend!r} is none of {', '.join(lowering.BACKENDS)}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is none of {', '.join(PRECISIONS)}")
    if precision == "int8" and backend == "portable":
        raise ValueError("precision 'int8' needs the backend 'xnnpack'")
    if precision == "int8" and outputs is not None and not set(outputs) & set(gates.INT8_COSINE):
        raise ValueError(f"precision 'int8' is judged by {' and '.join(gates.INT8_COSINE)}: name one in the outputs")


def _sizes(encoder: LoadedEncoder, resolution: Size | list[Size] | None) -> dict[str, tuple[int, int]]:
    """{method: (height, width)}; a tuple is one size, a list is several."""
    chosen = resolution if isinstance(resolution, list) else [resolution or encoder.resolution]
    sizes = [contract.sides(size) for size in chosen]
    contract.require_distinct(sizes)
    return {contract.method_name(*size): size for size in sizes}


def _network(encoder, module, height, width, outputs=None, uint8_input=False):
    return for_export(
        module, height, width, outputs=outputs, uint8_input=uint8_input, mean=encoder.mean, std=encoder.std
    )


def _quantize(network, float_layers):
    from convert import quantize  # torchao takes seconds to import

    return quantize.quantize(network, float_layers)


def choose_float_layers(encoder: LoadedEncoder, photographs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The layers that int8 has to leave alone, measured on {method: uint8 images [N, H, W, 3]} of the size that int8
    everywhere harms most (quantize.choose_float_layers); "chosen_at" is its method."""
    from convert import quantize

    module, cases = weights.to_module(encoder), {}
    for name, images_NxHxWx3 in photographs.items():
        pixels = gates.normalise(encoder, images_NxHxWx3).transpose(0, 3, 1, 2)
        network = _network(encoder, module, *images_NxHxWx3.shape[1:3])
        cases[name] = (network, torch.from_numpy(np.ascontiguousarray(pixels)))
    worst = max(sorted(cases), key=lambda name: quantize.harm_of_int8(*cases[name])) if len(cases) > 1 else [*cases][0]
    return quantize.choose_float_layers(*cases[worst]) | {"chosen_at": worst}


def gate(
    encoder: LoadedEncoder, pte: bytes, images_NxHxWx3: np.ndarray, *, allow_inaccurate: bool = False
) -> dict[str, Any]:
    """Flax against PyTorch, then PyTorch against the program in the runtime, on uint8 images of one of its sizes.

    The program is fed by its own contract, which so is checked as well. int8 programs get a report of their own.

    Args:
      allow_inaccurate: an int8 program is only reported on, never refused.

    Raises:
      GateError: a pair differs by more than the tolerances in `gates`.
      ValueError: the program has no method for this size.
    """
    module, program = weights.to_module(encoder), PteProgram(pte)
    first = to_torch.gate(encoder, module, images_NxHxWx3[: IMAGES["fp32"]])
    reference = gates.torch_features(module, gates.normalise(encoder, images_NxHxWx3))
    reference = {name: reference[name] for name in program.outputs}
    found = program(images_NxHxWx3)
    second = gates.compare(reference, found)
    report: dict[str, Any] = {"flax_vs_torch": first, "torch_vs_pte": second}
    if program.contract["precision"] != "int8":
        gates.require(second, gates.TORCH_VS_PTE, "PyTorch and the .pte")
        return report
    if not allow_inaccurate:
        try:
            gates.require_cosine(second, "PyTorch in float and the int8 .pte")
        except gates.GateError as e:
            raise gates.GateError(f"{e}; --allow_inaccurate writes it all the same") from None
    from convert import quantize

    report["int8"] = quantize.int8_report(reference, found)
    return report


def latency(pte: bytes, size: tuple[int, int], threads: int = 1, runs: int = 20) -> dict[str, Any]:
    """Median milliseconds a run on this machine, after one warm-up run; stops early after half a minute."""
    set_threads(threads)
    program, times = PteProgram(pte), []
    method, image = program.method(size), program.prepare(np.zeros((*size, 3), np.uint8))
    program.execute(method, image)
    while len(times) < runs and (not times or sum(times) < 30):
        start = time.perf_counter()
        program.execute(method, image)
        times.append(time.perf_counter() - start)
    return {"median_ms": round(1e3 * median(times), 2), "runs": len(times), "threads": threads}


def convert(
    encoder: LoadedEncoder,
    out: str | Path,
    resolution: Size | list[Size] | None = None,
    backend: str = "xnnpack",
    images: str | Path | None = None,
    threads: int = 1,
    runs: int = 20,
    *,
    precision: str = "fp32",
    outputs: Sequence[str] | None = None,
    uint8_input: bool = False,
    allow_undelegated: bool = False,
    allow_inaccurate: bool = False,
    onnx: str | Path | None = None,
) -> dict[str, Any]:
    """Exports, gates, measures, then writes `out`, NAME.json and cards; returns what NAME.json holds.

    Args:
      images: folder of photographs for the gates, and for choosing the layers that int8 leaves alone.
      allow_undelegated: writes a program of which XNNPACK takes less than 99% of the FLOPs, too.
      allow_inaccurate: writes an int8 program that strays too far from float, too. Both are noted in the report.
      onnx: also write the network here as ONNX (one size, fp32), checked in onnxruntime.

    Raises:
      GateError, DelegationError, ValueError, OSError, ImportError: nothing was written.
    """
    out = Path(out)
    if out.suffix != ".pte":
        raise ValueError(f"--out {out}: the name must end in .pte")
    if threads < 1 or runs < 1:
        raise ValueError(f"threads and runs must be at least 1, got {threads} and {runs}")
    _check(backend, precision, outputs)
    sizes = _sizes(encoder, resolution)
    module = weights.to_module(encoder)
    for size in sizes.values():  # so that what cannot be is said before the long part
        _network(encoder, module, *size, outputs, uint8_input)
    weights.check_writable(out)
    if onnx:
        _check_onnx(Path(onnx), precision, sizes)
    photographs = {name: gates.load_images(images, *size, limit=IMAGES[precision]) for name, size in sizes.items()}
    chosen = choose_float_layers(encoder, {n: p[:4] for n, p in photographs.items()}) if precision == "int8" else {}
    if chosen and not chosen["int8_layers"] and not allow_inaccurate:
        raise gates.GateError(
            f"every layer would have to stay float at {chosen['chosen_at']}: int8 does not suit these weights; "
            "--allow_inaccurate writes it all the same; nothing written"
        )
    result = export(
        encoder, list(sizes.values()), backend, precision, outputs=outputs, uint8_input=uint8_input,
        float_layers=chosen.get("float_layers", ()),
    )  # fmt: skip
    report = result.report | {"allow_undelegated": allow_undelegated, "allow_inaccurate": allow_inaccurate}
    if chosen:
        report |= {name: chosen[name] for name in ("chosen_at", "sensitivity")}
    for name, method in report["methods"].items():
        if backend != "portable" and not allow_undelegated:
            delegation.require(method["delegation"], name)
        method["gates"] = gate(encoder, result.pte, photographs[name], allow_inaccurate=allow_inaccurate)
        method["latency"] = latency(result.pte, sizes[name], threads, runs)
    files = {out: result.pte}
    if onnx:
        ((name, size),) = sizes.items()
        network = _network(encoder, module, *size, outputs, uint8_input)
        files[Path(onnx)], report["methods"][name]["gates"]["torch_vs_onnx"] = _onnx(
            encoder, module, network, photographs[name], uint8_input, contract.constants(report, sizes)
        )
    _write(out, files, report, cards.files(encoder, out, report, library="executorch"))
    return report


def _check_onnx(path: Path, precision: str, sizes: Mapping[str, tuple[int, int]]) -> None:
    if path.suffix != ".onnx":
        raise ValueError(f"--onnx {path}: the name must end in .onnx")
    if precision != "fp32" or len(sizes) != 1:
        raise ValueError("--onnx is of one --resolution and of --precision fp32 only")
    onnx_file.require_installed()
    weights.check_writable(path)


def _onnx(encoder, module, network, images_NxHxWx3, uint8_input, constants) -> tuple[bytes, gates.Report]:
    pixels = gates.normalise(encoder, images_NxHxWx3)
    inputs = np.ascontiguousarray((images_NxHxWx3 if uint8_input else pixels).transpose(0, 3, 1, 2))
    model = onnx_file.export(network, torch.from_numpy(inputs[:1]), constants)
    reference = gates.torch_features(module, pixels)
    return model, onnx_file.gate(model, {name: reference[name] for name in network.outputs}, inputs)


def _write(out: Path, files: Mapping[Path, bytes], report: Mapping[str, Any], beside: Mapping[Path, bytes]) -> None:
    try:
        weights.write_files({**beside, out.with_suffix(".json"): json.dumps(report, indent=2).encode(), **files})
    except OSError as e:  # a full disk names no file
        raise OSError(f"--out {out} could not be written: {e.strerror or e}; nothing written") from None


def summarise(report: Mapping[str, Any]) -> str:
    """The report as a few lines to print."""
    lines = []
    for name, method in report["methods"].items():
        head, *rest = delegation.lines(method["delegation"])
        lines += [f"{name} ({report['backend']}, {report['precision']}): {head}", *rest]
        speed = method["latency"]
        lines.append(
            f"  planned buffers {method['planned_bytes'] / 2**20:.2f} MiB; {speed['median_ms']} ms here "
            f"(median of {speed['runs']} runs, {speed['threads']} threads)"
        )
        for pair in ("flax_vs_torch", "torch_vs_pte", "torch_vs_onnx"):
            figures = method["gates"].get(pair, {}).items()
            if not figures:
                continue
            tokens = [f"{n} {f['max_abs']:.2e}, {f['mean_cosine']:.6f}, {f['cosine']:.6f}" for n, f in figures]
            lines.append(f"  {pair.replace('_', ' ')} (max abs, mean and least cosine): {'; '.join(tokens)}")
        if knn := method["gates"].get("int8", {}).get("knn"):
            lines.append(
                f"  int8 vs float neighbours of {knn['images']} images: nearest the same for {knn['top1']:.0%}, "
                f"{knn['overlap']:.0%} of {knn['k']} shared"
            )
        elif "int8" in method["gates"]:
            lines.append("  int8 vs float neighbours: too few images, name a folder of 8 or more with --images")
    if kept := report.get("float_layers"):
        lines.append(f"layers kept float: {', '.join(kept)}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--out", required=True, metavar="NAME.pte", help="program to write, with NAME.json beside it")
    add("--resolution", metavar="S|HxW,...", help="input sizes in pixels, one method each (default: own)")
    add("--precision", default="fp32", metavar="fp32|int8", help="int8: weights by channel, activations by token")
    add("--outputs", metavar="cls,patches", help="tokens to return, of cls, storage, patches (default: all)")
    add("--backend", default="xnnpack", metavar="xnnpack|portable", help="portable: reference kernels, slow")
    add("--uint8_input", action="store_true", help="take RGB of 0 to 255: normalisation is done by the program")
    add("--onnx", metavar="FILE.onnx", help="also write the network as ONNX (one size, fp32)")
    add("--images", metavar="DIR", help="photographs for the checks (default: scikit-image's)")
    add("--threads", type=int, default=1, help="threads of the latency measurement (default: 1)")
    add("--runs", type=int, default=20, help="runs of the latency measurement (default: 20)")
    add("--allow_undelegated", action="store_true", help="write even if XNNPACK takes less than 99%% of the FLOPs")
    add("--allow_inaccurate", action="store_true", help="write even if int8 features stray too far from float ones")
    args = parser.parse_args(argv)
    outputs = [n.strip() for n in args.outputs.split(",")] if args.outputs else None
    try:
        _check(args.backend, args.precision, outputs)
        sizes = contract.parse_sizes(args.resolution) if args.resolution else None
        encoder = weights.load(args.checkpoint, args.student, args.model)
        report = convert(
            encoder, args.out, sizes, args.backend, args.images, args.threads, args.runs, precision=args.precision,
            outputs=outputs, uint8_input=args.uint8_input, allow_undelegated=args.allow_undelegated,
            allow_inaccurate=args.allow_inaccurate, onnx=args.onnx,
        )  # fmt: skip
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as e:  # torch has errors of all these kinds
        print(f"error: {cli.one_line(e) or type(e).__name__}", file=sys.stderr)
        return 1
    print(summarise(report))
    out = Path(args.out)
    also = (f", {args.onnx}" if args.onnx else "") + f"; its card is {cards.paths(out)[0].name}"
    print(f"wrote {out} ({out.stat().st_size / 2**20:.1f} MiB) and {out.with_suffix('.json')}{also}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
