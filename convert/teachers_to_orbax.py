"""From published weights to an Orbax checkpoint that every loader of eupe_jax takes.

  python convert/teachers_to_orbax.py --model=pe_core_g14_448 --checkpoint=PE-Core-G14-448.pt --out=teachers/pe_core_g
  python convert/teachers_to_orbax.py --model=dinov3_vith16plus --checkpoint=model_folder --out=teachers/dinov3_h

Then --config.teachers.NAME.checkpoint=teachers/pe_core_g, --config.students.NAME.init_from=..., another converter's
--checkpoint, or eupe_jax.load_encoder. Names, shapes and types are checked before anything is written; tensors then
pass through memory one by one, so that little more than the largest stacked parameter has to fit. The text tower of a
pe_core file comes along. With --dtype=bfloat16 the leaves called "kernel" are rounded and all others (norms, biases,
gains, position tables, tokens, RoPE periods) stay float32: what training does with a teacher's weights anyway.
"""

import argparse
import datetime
import json
import logging
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from absl import logging as absl_logging
from flax import traverse_util
from tqdm import tqdm

from convert import cli
from convert.transformers_layout import check_config
from eupe_jax.files import move_whole
from eupe_jax.models import interchange, perception_encoder, text_tower, zoo
from eupe_jax.models.spec import EncoderSpec
from eupe_jax.training import checkpoints, encoders, streaming, weight_files
from eupe_jax.training.weight_files import WeightFile

ENCODER = "encoder"  # the checkpoint's one student
# Constructor arguments that say how to compute: for whoever loads the encoder to decide.
COMPUTE_FIELDS = {"dtype", "residual_dtype", "remat", "scan_unroll", "attention_fn", "depthwise"}
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_DISK_MARGIN = 1.02  # of what the arrays take: chunk tables, manifests


@dataclass(frozen=True)
class Plan:
    """What a file holds of a model, and where in the checkpoint it goes.

    layout: whose names the file has. arrays: iterator over the leaves. items: item -> tree of `ComingLeaf`.
    extras: tensors of the file that are no part of the model. text: manifest entry of the text tower, if there is one.
    """

    layout: str
    arrays: Iterator[tuple[str, np.ndarray]]
    items: dict[str, Any]
    extras: dict[str, Any]
    text: dict[str, Any] | None

    @property
    def leaves(self) -> list[streaming.ComingLeaf]:
        """Every array to come."""
        return jax.tree.leaves(self.items)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(leaf.nbytes for leaf in self.leaves)


def convert(
    model: str,
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    *,
    dtype: str = "float32",
    adapters: bool = False,
    overrides: Mapping[str, Any] | None = None,
    text_overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Converts one weights file; returns the manifest written.

    Args:
      model: zoo name.
      checkpoint: what `weight_files.open_weights` takes, in any layout of the model's family.
      out: folder to write; must not exist or be empty. It appears when everything is in it.
      dtype: of the leaves called "kernel", "float32" or "bfloat16".
      adapters: keep the tensors that are no part of the encoder (adapters, heads) in the item `checkpoints.EXTRAS`.
      overrides, text_overrides: constructor arguments of the encoder and of its text tower that differ from the zoo's.

    Raises:
      ValueError: unknown model, a file that is broken or does not fit the model, or values that are not finite.
      OSError: nothing there, `out` is not free, or not enough disk. Nothing is left behind in any case.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    overrides = dict(overrides or {})
    if set(overrides) & COMPUTE_FIELDS:
        raise ValueError(f"{sorted(set(overrides) & COMPUTE_FIELDS)} say how to compute: set them where it is loaded")
    spec = zoo.spec(model, **overrides)
    out = _free_folder(out)
    with weight_files.open_weights(checkpoint) as weights:
        described = weight_files.read_description(weights) or {}
        if described and described["model"] != model:
            raise ValueError(f"{checkpoint} holds {described['model']!r}, not {model!r}")
        overrides = {**encoders.hashable(described.get("overrides", {})), **overrides}
        spec = zoo.spec(model, **overrides)
        plan = _plan(spec, overrides, weights, DTYPES[dtype], adapters, text_overrides or {})
        _require_disk(out, plan.nbytes)
        source = {
            "files": weights.sha256,
            "layout": plan.layout,
            "left_out": [] if adapters else sorted(plan.extras),
        }
        manifest = _manifest(spec, overrides, described, plan, dtype, source)
        _write(out, plan, _stream(weights, plan, adapters), manifest)
    return manifest


def _plan(
    spec: EncoderSpec,
    overrides: Mapping[str, Any],
    weights: WeightFile,
    dtype: np.dtype,
    adapters: bool,
    text_overrides: Mapping[str, Any],
) -> Plan:
    family, module = zoo.FAMILIES[spec.family], zoo.build(spec.name, **overrides)
    check_config(weights.path, module)
    extras, text = interchange.extras(family, weights), None
    both = _image_text(spec.name)
    if both is not None and any(name.startswith(perception_encoder.TEXT_NAMES) for name in extras):
        module = both.clone(visual=module, text=both.text.clone(**text_overrides))
        family, text = text_tower.FAMILY, {"overrides": dict(text_overrides)}
        extras = interchange.extras(family, weights)
    layout = interchange.detect_layout(family, weights)
    try:
        arrays = interchange.import_leaves(spec.name, family, module, weights, layout)
    except ValueError as error:
        raise ValueError(f"{weights.path}: {error}") from None
    image = jax.ShapeDtypeStruct((1, spec.resolution, spec.resolution, 3), np.float32)
    inputs = family.example_inputs(module) if family.example_inputs else (image,)
    flat = traverse_util.flatten_dict(dict(jax.eval_shape(module.init, jax.random.key(0), *inputs)), sep="/")
    leaves = {
        path: streaming.ComingLeaf(path, leaf.shape, dtype if path.endswith("/kernel") else np.dtype(np.float32))
        for path, leaf in flat.items()
    }
    tree = traverse_util.unflatten_dict(leaves, sep="/")
    if text is None:
        # the trainer's checkpoints say that a model has no buffers
        items = {f"{ENCODER}.backbone": {"params": tree["params"], "buffers": tree.get("buffers", {})}}
    else:
        visual = tree["params"].pop("visual")
        items = {f"{ENCODER}.backbone": {"params": visual, "buffers": {}}, checkpoints.TEXT: tree}
    if adapters:
        if not extras:
            raise ValueError(f"{weights.path} holds nothing beside the encoder: leave out --adapters")
        items[checkpoints.EXTRAS] = {n: streaming.ComingLeaf(n, t.shape, t.dtype) for n, t in extras.items()}
    return Plan(layout, arrays, items, extras, text)


def _image_text(name: str) -> text_tower.ImageTextModel | None:
    """Both towers, for a model that has a text tower."""
    try:
        return text_tower.build(name)
    except ValueError:
        return None


def _stream(weights: WeightFile, plan: Plan, adapters: bool) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays in the types announced; refuses values that are not finite, naming all tensors that have some."""
    types = {leaf.name: leaf.dtype for leaf in plan.leaves}

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        yield from plan.arrays
        if adapters:
            yield from ((name, np.asarray(tensor)) for name, tensor in plan.extras.items())

    with tqdm(total=plan.nbytes, unit="B", unit_scale=True, desc="writing", disable=None) as bar:
        rest = arrays()
        for name, array in rest:
            if weights.non_finite:
                break
            array = array.astype(types[name], copy=False)
            yield name, array
            bar.update(array.nbytes)
            del array
    for _ in rest:  # only to find all that is wrong
        pass
    weights.require_finite()


def _write(out: Path, plan: Plan, leaves: Iterator[tuple[str, np.ndarray]], manifest: Mapping[str, Any]) -> None:
    """Writes beside `out` and renames: a failure, a full disk or Ctrl-C leaves nothing behind."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir()
        streaming.save(temporary / "checkpoint", plan.items, leaves, **{checkpoints.MANIFEST: manifest})
        move_whole(temporary / "checkpoint", out)
    except ValueError as error:
        reason = re.search(r"Failed to write[^:]*: (.+?) \[os_error_code", str(error))
        if reason is None:
            raise
        raise OSError(f"--out {out} cannot be written: {reason[1]}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _manifest(
    spec: EncoderSpec,
    overrides: Mapping[str, Any],
    described: Mapping[str, Any],
    plan: Plan,
    dtype: str,
    source: Mapping[str, Any],
) -> dict[str, Any]:
    resolution = described.get("resolution", spec.resolution)
    backbone = jax.tree.leaves(plan.items[f"{ENCODER}.backbone"]["params"])
    entry = {
        "model": spec.name,
        "overrides": dict(overrides),
        "resolution": resolution,
        "resolutions": [resolution],
        "mean": list(described.get("mean", spec.mean)),
        "std": list(described.get("std", spec.std)),
        "patch_size": spec.patch_size,
        "cls_dim": spec.cls_dim,
        "patch_dim": spec.patch_dim,
        "num_storage_tokens": spec.num_storage_tokens,
        "token_layout": checkpoints.TOKEN_LAYOUT,
        "licence": spec.licence,
        "parameters": sum(int(np.prod(leaf.shape)) for leaf in backbone),
        "kernel_dtype": dtype,
    }
    if plan.text is not None:
        entry[checkpoints.TEXT] = plan.text
    return {
        "format": checkpoints.FORMAT,
        "step": 0,
        "students": {ENCODER: entry},
        "teachers": {},
        "statistics": {},
        "chain": {},
        "source": dict(source),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": checkpoints.versions(),
    }


def _free_folder(out: str | os.PathLike) -> Path:
    if "://" in os.fspath(out):
        raise ValueError(f"--out {out} is remote: write to a local folder and copy that")
    out = Path(os.path.abspath(out))
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"--out {out} exists: name a new folder, or remove it first")
    return out


def _require_disk(out: Path, nbytes: int) -> None:
    existing = next(parent for parent in out.parents if parent.exists())
    needed, free = int(nbytes * _DISK_MARGIN), shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(f"--out {out} needs {needed / 1e9:.2f} GB, but {existing} has {free / 1e9:.2f} GB free")


def _override(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _parser() -> argparse.ArgumentParser:
    description, examples, details = __doc__.strip().split("\n\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"examples:\n{examples}\n\n{details}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="zoo name, e.g. eupe_vitb16, dinov3_vith16plus, pe_core_g14_448")
    add("--checkpoint", required=True, metavar="PATH", help=".safetensors, .pt, .pth, an index of shards, or a folder")
    add("--out", required=True, metavar="DIR", help="new folder for the checkpoint")
    add("--dtype", choices=tuple(DTYPES), default="float32", help="of the kernels (default: float32)")
    add("--adapters", action="store_true", help="keep tensors that are no part of the encoder, e.g. projectors.*")
    add("--override", action="append", type=_override, default=[], metavar="FIELD=VALUE",
        help="constructor argument that differs from the zoo's, e.g. cls_output=proj; may be repeated")  # fmt: skip
    add("--text_override", action="append", type=_override, default=[], metavar="FIELD=VALUE",
        help="the same for the text tower of a pe_core file, e.g. depth=12")  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    start = time.perf_counter()
    try:
        manifest = convert(
            args.model,
            args.checkpoint,
            args.out,
            dtype=args.dtype,
            adapters=args.adapters,
            overrides=encoders.hashable(dict(args.override)),
            text_overrides=encoders.hashable(dict(args.text_override)),
        )
    except (ValueError, TypeError, OSError, ArithmeticError, LookupError) as error:  # overrides may be anything
        print(f"error: {cli.one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; nothing written", file=sys.stderr)
        return 130
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in Path(args.out).rglob("*") if path.is_file())
    entry, source = manifest["students"][ENCODER], manifest["source"]
    print(
        f"{entry['model']}: {entry['parameters'] / 1e6:,.1f} M parameters, kernels {entry['kernel_dtype']}, "
        f"{entry['resolution']} px, licence {entry['licence'] or 'not known'}"
    )
    print(f"from {', '.join(source['files'])} ({source['layout']} names)")
    if checkpoints.TEXT in entry:
        print("with its text tower: eupe_jax.training.encoders.load_image_text")
    if source["left_out"]:
        kinds = sorted({name.split(".")[0] for name in source["left_out"]})
        print(f"left out {len(source['left_out'])} tensors of other parts ({', '.join(kinds)}); --adapters keeps them")
    print(f"wrote {args.out}: {size / 1e9:.2f} GB in {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax writes dozens of lines a save, and a stack for every error
    logging.getLogger(interchange.__name__).setLevel(logging.ERROR)  # `main` prints what is left out
    sys.exit(main())
