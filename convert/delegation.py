"""What of a lowered program the XNNPACK delegate takes: the part left outside runs on slow portable kernels."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from executorch.exir import EdgeProgramManager
from executorch.exir.lowered_backend_module import get_lowered_submodules
from torch.fx import Graph, Node

MIN_SHARE_OF_FLOPS = 0.99


class DelegationError(ValueError):
    """The delegate does not take enough of a network; nothing was written."""


def _name(node: Node) -> str:
    """What a call calls: "aten.linear"."""
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


def bytes_moved(node: Node) -> int:
    """Bytes of the tensors that an operator reads and writes."""
    values = [n.meta.get("val") for n in (*node.all_input_nodes, node)]
    tensors = [t for v in values for t in (v if isinstance(v, list | tuple) else [v]) if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def summary(edge: EdgeProgramManager, method: str) -> dict[str, Any]:
    """Partitions, the shares of operators and of FLOPs inside them, and by name what each kind of operator outside
    costs: how many, FLOPs, bytes moved."""
    module = edge.exported_program(method).graph_module
    outside = _operators(module.graph)
    parts = [lowered for _, lowered, _ in get_lowered_submodules(module)]
    inside = [node for part in parts for node in _operators(part.original_module.graph)]
    flops_inside, flops_outside = sum(map(flops, inside)), sum(map(flops, outside))
    costs: dict[str, dict[str, int]] = {}
    for node in outside:
        cost = costs.setdefault(_name(node), {"count": 0, "flops": 0, "bytes": 0})
        cost["count"] += 1
        cost["flops"] += flops(node)
        cost["bytes"] += bytes_moved(node)
    return {
        "partitions": len(parts),
        "outside": dict(sorted(costs.items(), key=lambda item: (-item[1]["flops"], -item[1]["bytes"]))),
        "nodes_outside": len(outside),
        "nodes_inside": len(inside),
        "share_of_nodes": len(inside) / max(1, len(inside) + len(outside)),
        "share_of_flops": flops_inside / max(1, flops_inside + flops_outside),
        "flops": flops_inside + flops_outside,
    }


def lines(found: Mapping[str, Any]) -> list[str]:
    """A summary as lines to print: one, and one for each kind of operator outside, dearest first."""
    head = (
        f"{found['partitions']} partition{'s' * (found['partitions'] != 1)}, {found['share_of_nodes']:.1%} of "
        f"{found['nodes_inside'] + found['nodes_outside']} operators and {found['share_of_flops']:.1%} of "
        f"{found['flops'] / 1e9:.2f} GFLOP delegated"
    )
    return [head] + [
        f"  outside: {cost['count']} {name}, {cost['flops'] / 1e9:.3f} GFLOP, {cost['bytes'] / 2**20:.2f} MiB moved"
        for name, cost in found["outside"].items()
    ]


def require(found: Mapping[str, Any], method: str) -> None:
    """Raises DelegationError when less than 99% of the FLOPs of a method are delegated."""
    if not found["share_of_flops"] >= MIN_SHARE_OF_FLOPS:
        dear = ", ".join(name for name, cost in found["outside"].items() if cost["flops"])
        raise DelegationError(
            f"{method}: the delegate takes only {found['share_of_flops']:.1%} of the FLOPs, less than "
            f"{MIN_SHARE_OF_FLOPS:.0%}; outside are {dear}; --allow_undelegated writes it all the same; nothing written"
        )
