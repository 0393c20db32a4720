"""Students as Hugging Face models: the folder that `transformers.AutoModel.from_pretrained` opens."""

import json
import os
import secrets
import shutil
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
import safetensors.numpy

from eupe_jax.files import move_whole
from eupe_jax.models import convnext, layers, vit
from eupe_jax.training.encoders import LoadedEncoder


def config(encoder: LoadedEncoder) -> dict[str, Any]:
    """Content of config.json: what builds the model, overrides included.

    Raises:
      ValueError: the family, or a setting, does not exist there.
    """
    if type(encoder.module) not in _CONFIGS:
        raise ValueError(f"{encoder.name} does not convert to transformers, only the families vit and convnext")
    made = _CONFIGS[type(encoder.module)](encoder.module)
    return {"image_size": encoder.resolution, "num_channels": 3, "dtype": "float32", **made}


def check_config(weights: str | os.PathLike, module: nn.Module) -> None:
    """Holds the config.json of a transformers model against the module that its weights are to fill.

    Weights alone do not tell: another `rope_theta` or number of heads has the same tensors.

    Args:
      weights: the folder of the model, or a .safetensors file in it. Without a config.json there is nothing to check.

    Raises:
      ValueError: it is no JSON, or of another model; the message names every field that differs.
    """
    path = Path(weights) if Path(weights).is_dir() else Path(weights).parent
    path = path / "config.json"
    if type(module) not in _CONFIGS or not path.is_file() or Path(weights).suffix in (".pt", ".pth"):
        return
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no JSON object")
    expected = {k: v for k, v in _CONFIGS[type(module)](module).items() if k not in _TRAINING_ONLY}
    wrong = [f"{k} is {found[k]!r}, not {v!r}" for k, v in expected.items() if k in found and found[k] != v]
    if wrong:
        raise ValueError(f"{path}: {'; '.join(wrong)}")


def _vit_config(module: Any) -> dict[str, Any]:
    if module.rope_base is None:
        raise ValueError("rope_min_period and rope_max_period do not convert to transformers, which takes rope_base")
    if module.rope_normalize_coords != "separate":
        raise ValueError(
            f"rope_normalize_coords={module.rope_normalize_coords!r} does not convert to transformers, only 'separate'"
        )
    gated = module.ffn_layer != "mlp"
    return {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "hidden_size": module.embed_dim,
        "intermediate_size": layers.ffn_hidden(module.ffn_layer, module.embed_dim, module.ffn_ratio),
        "num_hidden_layers": module.depth,
        "num_attention_heads": module.num_heads,
        "patch_size": module.patch_size,
        "num_register_tokens": module.num_storage_tokens,
        "use_gated_mlp": gated,
        "hidden_act": "silu" if gated else "gelu",
        "layer_norm_eps": module.norm_eps,
        "layerscale_value": float(1.0 if module.layerscale_init is None else module.layerscale_init),
        "query_bias": module.qkv_bias,
        "key_bias": module.qkv_bias and not module.mask_k_bias,
        "value_bias": module.qkv_bias,
        "proj_bias": module.proj_bias,
        "mlp_bias": module.ffn_bias,
        "rope_theta": float(module.rope_base),
        "pos_embed_shift": module.rope_shift,
        "pos_embed_jitter": module.rope_jitter,
        "pos_embed_rescale": module.rope_rescale,
    }


def _convnext_config(module: Any) -> dict[str, Any]:
    return {
        "architectures": ["DINOv3ConvNextModel"],
        "model_type": "dinov3_convnext",
        "hidden_sizes": list(module.dims),
        "depths": list(module.depths),
        "hidden_act": "gelu",
        "layer_norm_eps": convnext.NORM_EPS,
        "layer_scale_init_value": float(module.layerscale_init),
    }


_CONFIGS = {vit.VisionTransformer: _vit_config, convnext.ConvNeXt: _convnext_config}
# Fields that say how a model starts or is trained, or which part of it was saved.
_TRAINING_ONLY = (
    "architectures",
    "layerscale_value",
    "layer_scale_init_value",
    "pos_embed_shift",
    "pos_embed_jitter",
    "pos_embed_rescale",
)


def preprocessor_config(encoder: LoadedEncoder) -> dict[str, Any]:
    """Content of preprocessor_config.json: squash to the resolution, bilinear with antialiasing, then normalise."""
    return {
        "image_processor_type": "DINOv3ViTImageProcessorFast",  # later versions drop the "Fast" by themselves
        "do_resize": True,
        "size": {"height": encoder.resolution, "width": encoder.resolution},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(encoder.mean),
        "image_std": list(encoder.std),
    }


def check_folder(out: Path) -> None:
    """Raises OSError now rather than after the work, when the folder `out` could not be written."""
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"--out {out} is a folder with something in it: name a new or an empty one")
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--out {out} is a file: --layout transformers writes a folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    _temporary(out).rmdir()


def write(
    encoder: LoadedEncoder,
    state_dict: dict[str, np.ndarray],
    header: str,
    out: Path,
    check: Callable[[Path], None],
) -> None:
    """Writes the folder `out` under a temporary name, lets `check` try it, and renames it.

    Args:
      header: metadata for the weights file.
      check: takes the temporary folder and raises when it is not good; nothing stays then.
    """
    files = {
        "config.json": json.dumps(config(encoder), indent=2).encode(),
        "preprocessor_config.json": json.dumps(preprocessor_config(encoder), indent=2).encode(),
        "model.safetensors": safetensors.numpy.save(state_dict, metadata={"format": "pt", "eupe_jax": header}),
    }
    temporary = _temporary(out)
    try:
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        check(temporary)
        move_whole(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def available() -> bool:
    """Whether `transformers` is installed."""
    return util.find_spec("transformers") is not None


def features(folder: Path, pixels_NxHxWx3: np.ndarray) -> dict[str, np.ndarray]:
    """Features of normalised images from the model that `transformers` makes of a folder.

    Raises:
      ValueError: weights are missing, or left over.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model, info = transformers.AutoModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    misfits = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if misfits:
        raise ValueError(f"transformers does not load what was written: {misfits}")
    with torch.inference_mode():
        pixels = torch.from_numpy(np.ascontiguousarray(pixels_NxHxWx3.transpose(0, 3, 1, 2)))
        tokens = model.eval()(pixels).last_hidden_state.numpy()
    stride = getattr(model.config, "patch_size", None) or convnext.output_stride(model.config.hidden_sizes)
    h, w = pixels_NxHxWx3.shape[1] // stride, pixels_NxHxWx3.shape[2] // stride
    prefix = tokens.shape[1] - h * w
    patches = tokens[:, prefix:].reshape(len(tokens), h, w, -1)
    return {"cls": tokens[:, 0], "storage": tokens[:, 1:prefix], "patches": patches}


def _temporary(out: Path) -> Path:
    """A fresh folder beside `out`."""
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    return temporary
