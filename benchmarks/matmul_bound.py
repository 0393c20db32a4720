"""The time that an encoder's matrix products alone take in whichever library is fastest at each of their shapes.

Nothing that computes in float32 can be expected below it: softmax, norms, GELU and copies come on top. Libraries:
torch, onnxruntime, OpenVINO, XNNPACK (through ExecuTorch) and jax, those that are installed; jax on one thread only.
"""

from collections.abc import Callable
from importlib import util

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import runtimes
from convert import lowering, torch_vit

COPIES = 3  # of each product in one call, with weights of their own: a call's overhead counts less


def shapes(vit: torch_vit.VisionTransformer, side: int) -> dict[tuple[int, ...], int]:
    """{(rows, inner, columns) of products with weights, (heads, rows, inner, columns) of others: how many of them}."""
    dim, hidden = vit.blocks[0].mlp.fc1.in_features, vit.blocks[0].mlp.fc1.out_features
    heads, depth = vit.blocks[0].attn.num_heads, len(vit.blocks)
    patches = (side // vit.patch_size) ** 2
    T = patches + 1 + vit.storage_tokens.shape[1]
    found = {(T, dim, 3 * dim): depth, (T, dim, dim): depth, (T, dim, hidden): depth, (T, hidden, dim): depth}
    found |= {(heads, T, dim // heads, T): depth, (heads, T, T, dim // heads): depth}
    return found | {(patches, 3 * vit.patch_size**2, dim): 1}


class _Products(nn.Module):
    """x -> COPIES products of x with weights [out, in], or of x with y."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.weighted = len(shape) == 3
        if self.weighted:
            self.layers = nn.ModuleList(nn.Linear(shape[1], shape[2], bias=False) for _ in range(COPIES))
        self.requires_grad_(False)

    def forward(self, x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        if self.weighted:
            return tuple(layer(x) for layer in self.layers)
        return tuple(torch.bmm(x, other) for other in others)


def _inputs(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    if len(shape) == 3:
        return (torch.randn(shape[0], shape[1]),)
    heads, rows, inner, columns = shape
    return (torch.randn(heads, rows, inner), *(torch.randn(heads, inner, columns) for _ in range(COPIES)))


def contenders(shape: tuple[int, ...], threads: int) -> dict[str, Callable[[], object]]:
    """{library: a function that computes COPIES products of this shape}."""
    with torch.no_grad():
        module, inputs = _Products(shape), _inputs(shape)
        pte = lowering.lower({"forward": (module, inputs)}).pte
    found = {"torch": _inference(module, inputs), "xnnpack": _executorch(pte, inputs)}
    if util.find_spec("onnx"):
        model, arrays = _onnx(module, shape), [x.numpy() for x in inputs]
        if util.find_spec("onnxruntime"):
            session = runtimes.ort_session(model, threads)
            feed = {f"x{i}": array for i, array in enumerate(arrays)}
            found["onnxruntime"] = lambda: session.run(None, feed)
        if util.find_spec("openvino"):
            request = runtimes.ov_request(model, threads)
            found["openvino"] = lambda: request.infer(arrays, share_inputs=True, share_outputs=True)
    if threads == 1:
        found["jax"] = _jax(module, inputs)
    return found


def _inference(module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    @torch.inference_mode()
    def run() -> object:
        return module(*inputs)

    return run


def _executorch(pte: bytes, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(pte).load_method("forward")
    return lambda pte=pte: method.execute(inputs)


def _onnx(module: _Products, shape: tuple[int, ...]) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    inputs = _inputs(shape)
    given = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, x.shape) for i, x in enumerate(inputs)]
    out = [*shape[:-2], shape[-1]] if len(shape) == 3 else [shape[0], shape[1], shape[3]]
    results = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, out) for i in range(COPIES)]
    weights, nodes = [], []
    for i in range(COPIES):
        other = f"w{i}" if module.weighted else f"x{i + 1}"
        if module.weighted:
            weights.append(numpy_helper.from_array(np.ascontiguousarray(module.layers[i].weight.numpy().T), other))
        nodes.append(helper.make_node("MatMul", ["x0", other], [f"y{i}"]))
    graph = helper.make_graph(nodes, "products", given, results, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()


def _jax(module: _Products, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    import jax

    first, *others = (jax.numpy.asarray(x.numpy()) for x in inputs)
    if module.weighted:
        others = [jax.numpy.asarray(layer.weight.numpy().T) for layer in module.layers]
    products = jax.jit(lambda a, bs: [a @ b for b in bs])
    return lambda: jax.block_until_ready(products(first, others))
