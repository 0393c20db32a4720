"""Encoders from weight files and back: the authors' tensor names, plus what it takes to feed the model."""

import contextlib
import hashlib
import json
import logging
import math
import os
import pickle
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import nn

from convert.torch_convnext import ConvNeXt
from convert.torch_vit import VisionTransformer
from eupe_jax.models import interchange, zoo
from eupe_jax.training.checkpoints import LoadedEncoder, load_encoder

logger = logging.getLogger(__name__)

FORMAT = "eupe_jax.weights/1"
TOKEN_LAYOUT = "class, storage, patches in rows from the top left"
_REQUIRED = ("model", "overrides", "resolution", "mean", "std")


def load(path: str | Path, student: str | None = None, model: str | None = None) -> LoadedEncoder:
    """An encoder from a training checkpoint (a folder) or from a weights file (.safetensors, .pt, .pth).

    Args:
      student: which student of a checkpoint that holds several.
      model: zoo name, for a weights file that does not say (the released ones do not).

    Raises:
      FileNotFoundError: nothing at `path`.
      ValueError: no weights of ours or the authors', or they do not fit the model.
    """
    path = Path(path)
    if path.is_dir():
        return load_encoder(path, student)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint folder and no weights file at {path}")
    tensors, metadata = read(path)
    if metadata is None:
        if model is None:
            raise ValueError(f"{path} does not say which model it holds: name it with --model, e.g. eupe_vitt16")
        spec = zoo.spec(model)
        metadata = {"model": model, "overrides": {}, "resolution": spec.resolution}
        metadata |= {"mean": list(spec.mean), "std": list(spec.std)}
    elif model not in (None, metadata["model"]):
        raise ValueError(f"{path} holds {metadata['model']!r}, not {model!r}")
    overrides = {k: tuple(v) if isinstance(v, list) else v for k, v in metadata["overrides"].items()}
    try:
        variables = interchange.from_state_dict(metadata["model"], tensors, **overrides)
        module = zoo.build(metadata["model"], **overrides)
    except (ValueError, TypeError) as e:
        raise ValueError(f"{path}: {e}") from None
    return LoadedEncoder(metadata["model"], overrides, module, variables, metadata, student or "")


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any] | None]:
    """Tensors as float32 and metadata (None where the file has none). Never runs code from the file.

    Raises:
      ValueError: unreadable, not a flat dict of floating-point tensors, non-finite values, or metadata that is
        broken or of other weights.
    """
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                header = (file.metadata() or {}).get("eupe_jax")
        elif path.suffix in (".pt", ".pth"):
            tensors = torch.load(path, map_location="cpu", weights_only=True)
            header = sidecar(path).read_text() if sidecar(path).exists() else None
        else:
            raise ValueError(f"{path}: expected a checkpoint folder, .safetensors, .pt or .pth")
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as e:
        raise ValueError(f"{path} cannot be read as weights: {str(e).strip().splitlines()[0]}") from None
    if not isinstance(tensors, Mapping) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ValueError(f"{path} is not a flat dict of tensors; save the bare state_dict of the backbone")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} ({tensor.dtype}) is not all finite floating-point numbers")
    arrays = {name: tensor.float().numpy() for name, tensor in tensors.items()}
    metadata = None if header is None else _parse(header, path)
    if metadata and metadata.get("weights_sha256", "") != digest(arrays):
        raise ValueError(f"{path} was changed: its weights are not those whose weights_sha256 its metadata gives")
    return arrays, metadata


def _parse(header: str, path: Path) -> dict[str, Any]:
    try:
        metadata = json.loads(header)
        if metadata["format"] != FORMAT:
            raise ValueError(f"format {metadata['format']!r}, expected {FORMAT!r}")
        for name in _REQUIRED:
            metadata[name]
        side = metadata["resolution"]
        if not isinstance(side, int) or side <= 0:
            raise ValueError(f"resolution {side!r}")
        for name in ("mean", "std"):
            values = metadata[name]
            if len(values) != 3 or not all(math.isfinite(v) and (v > 0 or name == "mean") for v in values):
                raise ValueError(f"{name} {values!r}")
        if not isinstance(metadata["model"], str) or not isinstance(metadata["overrides"], dict):
            raise ValueError("model must be a name and overrides a dict")
    except (ValueError, TypeError, KeyError) as e:
        raise ValueError(f"metadata of {path} is broken: {e}") from None
    return metadata


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


def digest(state_dict: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, shapes and float32 values, whatever the container: equal weights, equal digest."""
    sha = hashlib.sha256()
    for name in sorted(state_dict):
        array = np.ascontiguousarray(state_dict[name], np.float32)
        sha.update(f"{name} {list(array.shape)}\n".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


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


def sidecar(path: Path) -> Path:
    """Where the metadata of a .pt file lies."""
    return path.with_name(path.name + ".json")


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
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    finally:
        for temporary in temporaries.values():
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def one_line(error: Exception, limit: int = 600) -> str:
    """An error as one line of bounded length."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[:limit] + " ..."
