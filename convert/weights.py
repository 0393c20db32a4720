"""Encoders from weight files and back: the authors' tensor names, plus what it takes to feed the model."""

import contextlib
import dataclasses
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from torch import nn

from convert.torch_convnext import ConvNeXt
from convert.torch_vit import VisionTransformer
from convert.transformers_layout import check_config
from eupe_jax.files import flush, move_whole
from eupe_jax.models import interchange, zoo
from eupe_jax.training import weight_files
from eupe_jax.training.checkpoints import TOKEN_LAYOUT
from eupe_jax.training.encoders import LoadedEncoder, hashable, load_encoder
from eupe_jax.training.weight_files import FORMAT, digest


def load(path: str | Path, student: str | None = None, model: str | None = None) -> LoadedEncoder:
    """An encoder from a training checkpoint (a folder) or from a weights file (.safetensors, .pt, .pth).

    Args:
      student: which student of a checkpoint that holds several.
      model: zoo name, for a weights file that does not say (the released ones do not).

    Raises:
      FileNotFoundError: nothing at `path`.
      ValueError: no weights of ours or the authors', or they do not fit the model.
    """
    if not weight_files.is_weights(path):
        if Path(path).is_dir():
            encoder = _in_float32(load_encoder(path, student))
            if model not in (None, encoder.name):
                raise ValueError(f"{path} holds {encoder.name!r}, not {model!r}")
            return encoder
        if not Path(path).exists():
            raise FileNotFoundError(f"no checkpoint folder and no weights file at {path}")
    with weight_files.open_weights(path) as tensors:
        described = weight_files.read_description(tensors)
        if described is None:
            if model is None:
                raise ValueError(f"{path} does not say which model it holds: name it with --model, e.g. eupe_vitt16")
            spec = zoo.spec(model)
            described = {"model": model, "overrides": {}, "resolution": spec.resolution}
            described |= {"mean": list(spec.mean), "std": list(spec.std)}
        elif model not in (None, described["model"]):
            raise ValueError(f"{path} holds {described['model']!r}, not {model!r}")
        overrides = hashable(described["overrides"])
        try:
            variables = interchange.from_state_dict(described["model"], tensors, **overrides)
            module = zoo.build(described["model"], **overrides)
            check_config(path, module)
        except (ValueError, TypeError, ArithmeticError, LookupError) as e:  # metadata may say anything
            raise ValueError(f"{path}: {e}") from None
        tensors.require_finite()
    return LoadedEncoder(described["model"], overrides, module, variables, described, student or "")


def _in_float32(encoder: LoadedEncoder) -> LoadedEncoder:
    """The encoder with parameters in float32: checkpoints of teachers may hold kernels in bfloat16."""
    variables = jax.tree.map(lambda x: x.astype(np.float32), encoder.variables)
    return dataclasses.replace(encoder, variables=variables)


def to_state_dict(encoder: LoadedEncoder) -> dict[str, np.ndarray]:
    """The encoder's weights under the authors' names."""
    return interchange.to_state_dict(encoder.name, encoder.variables, **encoder.overrides)


def to_module(encoder: LoadedEncoder) -> nn.Module:
    """The encoder as a readable PyTorch module in evaluation mode.

    Raises:
      ValueError: the encoder has parts that the PyTorch modules do not have.
    """
    spec = zoo.spec(encoder.name, **encoder.overrides)
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in to_state_dict(encoder).items()}
    if spec.family == "convnext":
        return ConvNeXt.from_state_dict(tensors)
    if spec.family != "vit":
        raise ValueError(f"{encoder.name} is of the family {spec.family!r}; only vit and convnext students convert")
    module = encoder.module
    if module.rope_normalize_coords != "separate":
        raise ValueError(f"rope_normalize_coords={module.rope_normalize_coords!r} does not convert, only 'separate'")
    return VisionTransformer.from_state_dict(tensors, norm_eps=module.norm_eps)


def describe(encoder: LoadedEncoder) -> dict[str, Any]:
    """How to feed the encoder and where it comes from; goes with every file written."""
    spec = zoo.spec(encoder.name, **encoder.overrides)
    return {
        "format": FORMAT,
        "model": encoder.name,
        "overrides": encoder.overrides,
        "resolution": encoder.resolution,
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "pixels": "RGB in [0, 1], minus mean, divided by std",
        "token_layout": TOKEN_LAYOUT,
        "patch_size": spec.patch_size,
        "num_storage_tokens": spec.num_storage_tokens,
        "cls_dim": spec.cls_dim,
        "patch_dim": spec.patch_dim,
        "licence": spec.licence,
        "weights_sha256": digest(to_state_dict(encoder)),
    }


def check_writable(path: Path) -> None:
    """Raises OSError now rather than after the work, when `path` could not be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"--out {path} is a folder: name a file")
    probe = _temporary(path)
    probe.touch(exist_ok=False)
    probe.unlink()


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Writes all files under temporary names, then renames them: a failure leaves no half-written file behind."""
    temporaries = {path: _temporary(path) for path in contents}
    try:
        for path, content in contents.items():
            with open(temporaries[path], "xb") as file:
                file.write(content)
            flush(temporaries[path])  # before the first gets its name: all of them or none
        for path, temporary in temporaries.items():
            move_whole(temporary, path)
    finally:
        for temporary in temporaries.values():
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
