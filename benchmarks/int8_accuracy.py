"""How close int8 features of real images are to the float ones, and how much int8 everywhere would lose.

  python benchmarks/int8_accuracy.py --checkpoints runs/stage3,runs/vits --images photos --resolutions 256,512

The int8 network runs in PyTorch with the roundings of the phone (convert/quantize.py), so that nothing is exported:
a hundred images take a minute instead of an export each. Images are taken in the order of their names; the first
--choose of them choose the layers that stay float, all are measured. Cosines are between corresponding tokens;
"nearest" is the share of images whose nearest neighbour by class token stays the same, "of k" how many of the k
nearest do. Models under --random have weights that nobody trained: they show the arithmetic, not a quality.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # beside this script lies executorch.py, a package's name
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import json  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks import runtimes  # noqa: E402
from convert import cli, gates, quantize, weights  # noqa: E402
from convert.export_modules import for_export  # noqa: E402
from eupe_jax.training.encoders import LoadedEncoder  # noqa: E402


def measure(encoder: LoadedEncoder, images_NxHxWx3: np.ndarray, choose: int) -> dict[str, Any]:
    """One record: what stays float, and int8 against float on all images."""
    network = for_export(weights.to_module(encoder), *images_NxHxWx3.shape[1:3])
    pixels = gates.normalise(encoder, images_NxHxWx3).transpose(0, 3, 1, 2)
    pixels = torch.from_numpy(np.ascontiguousarray(pixels))
    chosen = quantize.choose_float_layers(network, pixels[:choose])
    int8 = quantize.quantize(network, chosen["float_layers"])
    report = quantize.int8_report(quantize.features(network, pixels), quantize.features(int8, pixels))
    return {"int8_layers": len(quantize.int8_layers(network)), "float_layers": chosen["float_layers"], **report}


def _row(record: dict[str, Any]) -> str:
    cosines = (record["cosine"][name][kind] for name in ("cls", "patches") for kind in ("mean", "min"))
    knn, kept = record["knn"], f"{len(record['float_layers'])} of {record['int8_layers']}"
    figures = [*(f"{c:.6f}" for c in cosines), f"{knn['top1']:.1%}", f"{knn['overlap']:.1%}", kept]
    return " | ".join(["", record["weights"], record["model"], str(record["resolution"]), *figures, ""]).strip()


def main(argv: list[str] | None = None) -> int:
    parser = cli.described(__doc__)
    add = parser.add_argument
    add("--checkpoints", default="", metavar="PATH,...", help="training workdirs or weight files of ours")
    add("--random", default="", metavar="NAME,...", help="zoo names, with random weights")
    add("--images", required=True, metavar="DIR", help="photographs")
    add("--count", type=int, default=64, help="images to measure on (default: 64)")
    add("--choose", type=int, default=4, help="images to choose layers by (default: 4)")
    add("--resolutions", default="256", metavar="S,...", help="sides in pixels (default: 256)")
    add("--json", type=Path, metavar="FILE", help="records to write")
    args = parser.parse_args(argv)
    records = []
    header = ["weights", "model", "side", "class mean", "min", "patch mean", "min", "nearest", "of k", "kept float"]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    try:
        least = quantize.KNN_IMAGES
        if args.count < least or args.choose < 1:
            raise ValueError(f"--count {args.count} must be at least {least} and --choose {args.choose} at least 1")
        sides = [int(side) for side in args.resolutions.split(",")]
        images = {side: gates.load_images(args.images, side, side, args.count) for side in sides}
        if (found := len(images[sides[0]])) < least:
            raise ValueError(f"--images {args.images} holds {found} images: {least} are needed")
        sources = [(path, weights.load, path) for path in args.checkpoints.split(",") if path]
        sources += [("random", runtimes.random_encoder, name) for name in args.random.split(",") if name]
        for origin, load, name in sources:
            encoder = load(name)
            for side in sides:
                record = {"weights": origin, "model": encoder.name, "resolution": side}
                records.append(record | measure(encoder, images[side], args.choose))
                print(_row(records[-1]), flush=True)
        if args.json:
            weights.write_files({args.json: json.dumps(records, indent=2).encode()})
    except (ValueError, OSError) as e:
        print(f"error: {cli.one_line(e)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
