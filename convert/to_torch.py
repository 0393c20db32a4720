"""From a checkpoint to PyTorch weights, under the authors' names or as a Hugging Face model.

  python convert/to_torch.py --checkpoint runs/stage3 --out eupe_vitt16.safetensors
  python convert/to_torch.py --checkpoint runs/stage3 --out eupe_vitt16 --layout transformers

Before anything is written the PyTorch module must reproduce the Flax encoder on real images to 1e-4; with --layout
transformers so must the model that transformers loads, where it is installed. "official" writes a state_dict for the
authors' own modules: .safetensors with its metadata inside, or .pt with the metadata beside it in FILE.pt.json.
"transformers" writes a folder for AutoModel.from_pretrained. It computes RoPE periods from a base, so that an encoder
with others, such as the rounded ones of released weights, is refused. A card goes with each (docs/cards.md).
"""

import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from convert import cli

if __name__ == "__main__":
    cli.require_export()

import torch
from torch import nn

from convert import cards, gates, transformers_layout, weights
from eupe_jax.models import interchange, rope
from eupe_jax.training import weight_files
from eupe_jax.training.encoders import LoadedEncoder


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


def convert(
    encoder: LoadedEncoder,
    out: str | Path,
    images: str | Path | None = None,
    layout: str = "official",
    recompute_periods: bool = False,
) -> dict[str, Any]:
    """Gates, then writes `out`; returns the metadata written with it and all gate figures.

    Args:
      out: file to write, .safetensors or .pt; with the layout "transformers" a folder, new or empty.
      images: folder of photographs for the gate.
      layout: "official" or "transformers".
      recompute_periods: let go of the RoPE periods as stored (rounded to bfloat16 in released weights), which
        `transformers` cannot hold; how far features move stands in the metadata.

    Raises:
      GateError, ValueError, OSError: nothing was written.
    """
    out = Path(out)
    if layout == "transformers":
        transformers_layout.check_folder(out)
        transformers_layout.config(encoder)  # refuses what transformers does not know
    elif out.suffix in (".safetensors", ".pt"):
        weights.check_writable(out)
    else:
        raise ValueError(f"--out {out}: the name must end in .safetensors or .pt")
    photographs = gates.load_images(images, encoder.resolution, encoder.resolution)
    moved = None
    if recompute_periods:
        pixels, original = gates.normalise(encoder, photographs), encoder
        encoder = with_computed_periods(encoder)
        moved = gates.compare(gates.flax_features(original, pixels), gates.flax_features(encoder, pixels))
    try:
        state_dict = interchange.to_state_dict(encoder.name, encoder.variables, layout=layout, **encoder.overrides)
    except interchange.InterchangeError as e:
        hint = "" if layout == "official" else "; --layout official keeps all, --recompute_periods lets periods go"
        raise ValueError(f"{e}{hint}") from None
    report = gate(encoder, weights.to_module(encoder), photographs)
    metadata = weights.describe(encoder) | {"layout": layout, "weights_sha256": weights.digest(state_dict)}
    metadata["gates"] = {"flax_vs_torch": report}
    if moved is not None:
        metadata["recomputed_periods"] = moved
    header = json.dumps(metadata, indent=2)
    if layout == "transformers":

        def check(folder: Path) -> None:
            if transformers_layout.available():
                metadata["gates"]["flax_vs_transformers"] = gate_folder(encoder, folder, photographs)
            described = cards.files(encoder, out, metadata, library="transformers", inside=True)
            for path, content in described.items():
                (folder / path.name).write_bytes(content)

        transformers_layout.write(encoder, state_dict, header, out, check)
        return metadata
    beside = cards.files(encoder, out, metadata, library="pytorch")
    if out.suffix == ".safetensors":
        content = safetensors.numpy.save(state_dict, metadata={"format": "pt", "eupe_jax": header})
        weights.write_files({**beside, out: content})
    else:
        buffer = io.BytesIO()
        torch.save({name: torch.from_numpy(value.copy()) for name, value in state_dict.items()}, buffer)
        weights.write_files({**beside, weight_files.sidecar(out): header.encode(), out: buffer.getvalue()})
    return metadata


def with_computed_periods(encoder: LoadedEncoder) -> LoadedEncoder:
    """The encoder with the RoPE periods that its settings give.

    Raises:
      ValueError: it has none.
    """
    module, buffers = encoder.module, encoder.variables.get("buffers", {})
    if "rope_periods" not in buffers:
        raise ValueError(f"{encoder.name} has no RoPE periods to recompute")
    head_dim = module.embed_dim // module.num_heads
    periods = rope.rope_periods(head_dim, module.rope_base, module.rope_min_period, module.rope_max_period)
    variables = {**encoder.variables, "buffers": {**buffers, "rope_periods": np.asarray(periods, np.float32)}}
    return dataclasses.replace(encoder, variables=variables)


def gate_folder(encoder: LoadedEncoder, folder: Path, images_NxHxWx3: np.ndarray) -> gates.Report:
    """`gate` for the model that `transformers` loads from a folder."""
    pixels = gates.normalise(encoder, images_NxHxWx3)
    report = gates.compare(gates.flax_features(encoder, pixels), transformers_layout.features(folder, pixels))
    gates.require(report, gates.FLAX_VS_TORCH, "Flax and transformers")
    return report


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--out", required=True, metavar="PATH", help="file to write, .safetensors or .pt; transformers: a folder")
    add("--layout", choices=("official", "transformers"), default="official", help="whose names (default: official)")
    add("--images", metavar="DIR", help="photographs for the check (default: scikit-image's)")
    add("--recompute_periods", action="store_true", help="let go of stored RoPE periods (transformers has none)")
    args = parser.parse_args(argv)
    try:
        encoder = weights.load(args.checkpoint, args.student, args.model)
        metadata = convert(encoder, args.out, args.images, args.layout, args.recompute_periods)
    except (ValueError, OSError) as e:
        print(f"error: {cli.one_line(e)}", file=sys.stderr)
        return 1
    for name, figures in metadata.get("recomputed_periods", {}).items():
        print(f"recomputed RoPE periods move {name} by at most {figures['max_abs']:.2e} standard deviations")
    for gate_name, report in metadata["gates"].items():
        what = {"flax_vs_torch": "PyTorch", "flax_vs_transformers": "transformers"}[gate_name]
        for name, figures in report.items():
            print(f"Flax vs {what}, {name}: max abs {figures['max_abs']:.2e}, cosine {figures['cosine']:.6f}")
    if args.layout == "transformers" and "flax_vs_transformers" not in metadata["gates"]:
        print("transformers is not installed here: only the names and the PyTorch module were checked")
    written = Path(args.out) / "model.safetensors" if args.layout == "transformers" else Path(args.out)
    card = cards.paths(Path(args.out))[0].name if args.layout == "official" else cards.FOLDER_CARD
    print(f"wrote {args.out}: {encoder.name}, {written.stat().st_size / 2**20:.1f} MiB; its card is {card}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
