"""From a checkpoint to PyTorch weights under the authors' names.

  python convert/to_torch.py --checkpoint runs/stage3 --out eupe_vitt16.safetensors

Before anything is written the PyTorch module must reproduce the Flax encoder on real images to 1e-4. A .safetensors
file carries its metadata inside; a .pt file is the bare state_dict, with the metadata beside it in FILE.pt.json.
"""

import io
import json
import sys
from pathlib import Path
from typing import Any

import safetensors.numpy
import torch
from torch import nn

from convert import cli, gates, weights
from eupe_jax.training.checkpoints import LoadedEncoder


def gate(encoder: LoadedEncoder, module: nn.Module, images_NxHxWx3=None) -> gates.Report:
    """Holds the PyTorch module against the Flax encoder on uint8 images (default: packaged photographs).

    Raises:
      GateError: they differ by more than 1e-4 on features scaled to unit standard deviation.
    """
    if images_NxHxWx3 is None:
        images_NxHxWx3 = gates.load_images(None, encoder.resolution, encoder.resolution)
    pixels = gates.normalise(encoder, images_NxHxWx3)
    report = gates.compare(gates.flax_features(encoder, pixels), gates.torch_features(module, pixels))
    gates.require(report, gates.FLAX_VS_TORCH, "Flax and PyTorch")
    return report


def convert(encoder: LoadedEncoder, out: str | Path, images: str | Path | None = None) -> dict[str, Any]:
    """Gates, then writes `out`; returns the metadata written with it, gate figures included.

    Args:
      out: file to write, .safetensors or .pt.
      images: folder of photographs for the gate.

    Raises:
      GateError, ValueError, OSError: nothing was written.
    """
    out = Path(out)
    if out.suffix not in (".safetensors", ".pt"):
        raise ValueError(f"--out {out}: the name must end in .safetensors or .pt")
    weights.check_writable(out)
    photographs = gates.load_images(images, encoder.resolution, encoder.resolution)
    report = gate(encoder, weights.to_module(encoder), photographs)
    metadata = weights.describe(encoder) | {"gates": {"flax_vs_torch": report}}
    state_dict = weights.to_state_dict(encoder)
    header = json.dumps(metadata, indent=2)
    if out.suffix == ".safetensors":
        weights.write_files({out: safetensors.numpy.save(state_dict, metadata={"format": "pt", "eupe_jax": header})})
    else:
        buffer = io.BytesIO()
        torch.save({name: torch.from_numpy(value.copy()) for name, value in state_dict.items()}, buffer)
        weights.write_files({weights.sidecar(out): header.encode(), out: buffer.getvalue()})
    return metadata


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--out", required=True, metavar="FILE", help="file to write, .safetensors or .pt")
    add("--images", metavar="DIR", help="photographs for the check (default: scikit-image's)")
    args = parser.parse_args(argv)
    try:
        encoder = weights.load(args.checkpoint, args.student, args.model)
        metadata = convert(encoder, args.out, args.images)
    except (ValueError, OSError) as e:
        print(f"error: {weights.one_line(e)}", file=sys.stderr)
        return 1
    for name, figures in metadata["gates"]["flax_vs_torch"].items():
        print(f"Flax vs PyTorch, {name}: max abs {figures['max_abs']:.2e}, cosine {figures['cosine']:.6f}")
    print(f"wrote {args.out}: {encoder.name}, {Path(args.out).stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
