"""What of a lowered program the XNNPACK delegate takes: the part left outside runs on slow portable kernels."""

import math
from collections import Counter
from typing import Any

from executorch.exir import EdgeProgramManager
from executorch.exir.lowered_backend_module import get_lowered_submodules
from torch.fx import Graph, Node


def _name(node: Node) -> str:
    """"aten.linear" for a call of that operator."""
    name = node.target.name() if hasattr(node.target, "name") else node.target.__name__
    return name.replace("::", ".").removesuffix(".default")


def _operators(graph: Graph) -> list[Node]:
    """Calls of operators: neither the picking of outputs nor calls of a delegate."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    return [node for node in calls if _name(node) not in ("getitem", "executorch_call_delegate")]


def flops(node: Node) -> int:
    """Floating-point operations (two a multiply-add) of a matrix product or convolution, 0 for anything else."""

    def shape(x: Node) -> list[int]:
        return list(x.meta["val"].shape)

    kind = _name(node).removeprefix("aten.").split(".")[0]
    if kind in ("linear", "mm", "bmm"):
        inner = shape(node.args[0])[-1]
    elif kind == "addmm":
        inner = shape(node.args[1])[-1]
    elif kind in ("convolution", "conv2d"):
        inner = math.prod(shape(node.args[1])[1:])
    else:
        return 0
    return 2 * math.prod(shape(node)) * inner


def summary(edge: EdgeProgramManager, method: str = "forward") -> dict[str, Any]:
    """Partitions, operators outside them by name, and the shares of operators and of FLOPs inside."""
    module = edge.exported_program(method).graph_module
    outside = _operators(module.graph)
    parts = [lowered for _, lowered, _ in get_lowered_submodules(module)]
    inside = [node for part in parts for node in _operators(part.original_module.graph)]
    flops_inside, flops_outside = sum(map(flops, inside)), sum(map(flops, outside))
    return {
        "partitions": len(parts),
        "outside": dict(Counter(map(_name, outside)).most_common()),
        "nodes_outside": len(outside),
        "nodes_inside": len(inside),
        "share_of_nodes": len(inside) / max(1, len(inside) + len(outside)),
        "share_of_flops": flops_inside / max(1, flops_inside + flops_outside),
        "flops": flops_inside + flops_outside,
    }
