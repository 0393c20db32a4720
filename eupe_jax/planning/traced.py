"""FLOPs of a traced program by where they come from: what will really be executed, before any compiler sees it.

Counts the matrix products and convolutions of a jaxpr, loops and Pallas grids included. Against the count from the
architecture (models/flops.py) it adds what is computed twice (rematerialised activations, attention weights in the
backward kernel), what only prepares (resized views and grids, position tables), and leaves out what has no use (the
gradient of the images).
"""

import math
import re
from collections import Counter
from collections.abc import Iterator

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.interpreters import partial_eval

TEACHERS = "teachers"
STUDENTS = "students, forward"
ADAPTERS = "adapters, forward"
BACKWARD = "backward"
RECOMPUTED = "recomputed by remat"
KERNEL = "attention weights again in the backward kernel"
RESIZES = "resized views and grids"
TABLES = "position tables"  # the same on every device, whatever its batch
TERMS = (TEACHERS, STUDENTS, ADAPTERS, BACKWARD, RECOMPUTED, KERNEL, RESIZES, TABLES)


def executed_flops(traced: jax.stages.Traced, devices: int) -> dict[str, float]:
    """{term of TERMS: FLOPs of one device} of a traced, jitted function whose batch is cut over all devices."""
    closed: ClosedJaxpr = traced.jaxpr
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    counted: Counter[str] = Counter()
    for term, flops in _walk(jaxpr, 1, "", devices):
        counted[term] += flops if term == TABLES else flops / devices
    return {term: counted[term] for term in TERMS if counted[term]}


def largest_arrays(traced: jax.stages.Traced, devices: int, count: int = 8) -> list[tuple[int, str, str]]:
    """(bytes on each device, shape, where it is made) of the largest arrays of a traced step, largest first.

    Those that the outermost level makes, such as what all blocks of a model keep for the backward pass, as if nothing
    were fused: what to look at where the compiler gives no list.
    """
    found: dict[tuple[str, str], int] = {}
    for eqn, path in _outermost(traced.jaxpr.jaxpr, ""):
        for aval in (var.aval for var in eqn.outvars if hasattr(var.aval, "shape")):
            shape = f"{aval.dtype.name}[{','.join(map(str, aval.shape))}] over all devices"
            found[shape, path] = math.prod(aval.shape) * aval.dtype.itemsize // devices
    largest = sorted(found.items(), key=lambda item: -item[1])[:count]
    return [(size, shape, path) for (shape, path), size in largest]


def _outermost(jaxpr: Jaxpr, path: str) -> Iterator[tuple[JaxprEqn, str]]:
    for eqn in jaxpr.eqns:
        here = f"{path}/{eqn.source_info.name_stack}".strip("/")
        if eqn.primitive.name in ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call"):
            for inner in _inner(eqn):
                yield from _outermost(inner, here)
        else:
            yield eqn, here


def _walk(jaxpr: Jaxpr, times: int, path: str, devices: int) -> Iterator[tuple[str, int]]:
    """(term, FLOPs of all devices) of every product in `jaxpr`, which runs `times` times."""
    for eqn in jaxpr.eqns:
        here, name = f"{path}/{eqn.source_info.name_stack}", eqn.primitive.name
        if name == "dot_general":
            yield _term(here, eqn), times * _dot(eqn)
        elif name == "conv_general_dilated":
            yield _term(here, eqn), times * _convolution(eqn)
        elif name == "pallas_call":
            yield from _kernel(eqn, times, here)
        elif name == "while":
            raise ValueError(f"the number of turns of a loop at {here} is not known: use a scan")
        elif name == "cond":
            branches = [list(_walk(branch.jaxpr, times, here, devices)) for branch in eqn.params["branches"]]
            yield from max(branches, key=lambda terms: sum(flops for _, flops in terms))
        else:
            # inside a shard_map shapes are those of one device
            more = eqn.params["length"] if name == "scan" else devices if name == "shard_map" else 1
            for inner in _inner(eqn):
                yield from _walk(inner, times * more, here, devices)


def _inner(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def _kernel(eqn: JaxprEqn, times: int, path: str) -> Iterator[tuple[str, int]]:
    """A Pallas kernel: its body once for every cell of the grid. The backward one makes attention weights again."""
    grid = math.prod(eqn.params["grid_mapping"].grid)
    products = [flops for _, flops in _walk(eqn.params["jaxpr"], times * grid, path, 1)]
    if "transpose(" not in path:
        yield _term(path, eqn), sum(products)
        return
    # of five products in the backward pass of attention, four are gradients
    yield KERNEL, sum(products) // 5
    yield BACKWARD, sum(products) - sum(products) // 5


def _term(path: str, eqn: JaxprEqn) -> str:
    if "rematted_computation" in path:
        return RECOMPUTED
    if re.search(r"\boh,bhwc->bowc|\bow,bhwc->bhoc", path):
        return RESIZES
    if "yh,xw,hwd->yxd" in path:
        return TABLES
    if "transpose(" in path:
        return BACKWARD
    if "jvp(" not in path:
        return TEACHERS
    return ADAPTERS if "AdapterBank" in path else STUDENTS


def _dot(eqn: JaxprEqn) -> int:
    (contract, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[axis] for axis in contract)


def _convolution(eqn: JaxprEqn) -> int:
    """Products that fall on padding or on the holes of a dilated input are not counted, as XLA does not."""
    p, (lhs, rhs) = eqn.params, (v.aval.shape for v in eqn.invars)
    lhs_spec, rhs_spec, out_spec = p["dimension_numbers"]
    out = eqn.outvars[0].aval.shape
    valid = 1
    for i, (low, _) in enumerate(p["padding"]):
        size, taps, outputs = lhs[lhs_spec[2 + i]], rhs[rhs_spec[2 + i]], out[out_spec[2 + i]]
        holes, reach, stride = p["lhs_dilation"][i], p["rhs_dilation"][i], p["window_strides"][i]
        places = (o * stride + t * reach - low for o in range(outputs) for t in range(taps))
        valid *= sum(1 for at in places if at % holes == 0 and 0 <= at // holes < size)
    return 2 * valid * out[out_spec[0]] * out[out_spec[1]] * rhs[rhs_spec[1]]
