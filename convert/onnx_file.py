"""The network of an export as an ONNX file too, for runtimes other than ExecuTorch."""

import io
import json
from collections.abc import Mapping
from importlib import util
from typing import Any

import numpy as np
import torch
from torch import nn

from convert import gates
from convert.lowering import quiet

NEEDED = ("onnx", "onnxscript", "onnxruntime")


def require_installed() -> None:
    """Raises ImportError that names what is missing."""
    if missing := [name for name in NEEDED if util.find_spec(name) is None]:
        raise ImportError(f"--onnx needs {', '.join(missing)}: pip install 'eupe_jax[onnx]'")


def export(network: nn.Module, image_1x3xHxW: torch.Tensor, contract: Mapping[str, Any]) -> bytes:
    """An ONNX model with the input "image" and the network's outputs by name; the contract is in its metadata, as JSON
    under "eupe_jax"."""
    import onnx

    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            network, (image_1x3xHxW,), input_names=["image"], output_names=list(network.outputs), dynamo=True,
            verbose=False,
        )  # fmt: skip
    model = program.model_proto
    onnx.helper.set_model_props(model, {"eupe_jax": json.dumps(contract)})
    buffer = io.BytesIO()
    onnx.save(model, buffer)
    return buffer.getvalue()


def run(model: bytes, inputs_Nx3xHxW: np.ndarray) -> dict[str, np.ndarray]:
    """Outputs by onnxruntime, by name, one image at a time."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    rows = [session.run(names, {"image": image[None]}) for image in inputs_Nx3xHxW]
    return {name: np.concatenate(parts) for name, parts in zip(names, zip(*rows, strict=True), strict=True)}


def gate(model: bytes, reference: gates.Features, inputs_Nx3xHxW: np.ndarray) -> gates.Report:
    """Raises GateError unless onnxruntime gives PyTorch's features to 1e-3, at unit standard deviation."""
    report = gates.compare(reference, run(model, inputs_Nx3xHxW))
    gates.require(report, gates.TORCH_VS_PTE, "PyTorch and the .onnx")
    return report
