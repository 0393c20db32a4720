"""Which parameter is cut where: ordered (regex, tactic) rules over the parameter's path, the first match wins.

Tactics, for a kernel of [..., inputs, outputs] (stacked layers come first and are never cut: a loop over layers would
gather them all):

    fsdp       inputs over `fsdp`, or else outputs in narrow shards; devices gather the kernel where it is used
    column     outputs over `tensor`, each device computing its own; inputs over `fsdp`
    row        inputs over `tensor`, which the outputs are summed over; outputs over `fsdp`
    joint      queries, keys and values in one kernel, always gathered where it is used. Inputs over `fsdp`: a step may
               put the columns into another order, and cut ones would travel. In tensor groups, where it does not,
               outputs over both axes: their parts are no heads, and inputs would be multiplied in parts
    replicate  whole on every device

Two things were learnt from programs compiled for v5e, v5p and v6e. What an axis is cut into must be whole tiles of 8
rows: a shard of 12 rows is padded to 16 on the network, and taking the padding out again is a chain of copies and
permutes between neighbours (32 for one reduce-scatter over 128 chips). A kernel without such an axis stays whole. And
inputs come first: gradients cut on their outputs into shards of a row of lanes (128) or more are summed whole, in an
all-reduce, and cut afterwards. Where only such outputs are left, inputs are few and the kernel small: it stays whole.

An axis over every chip of a slice is another trap, which no rule here can avoid: on whole tori the compiler makes each
all-gather an all-reduce of the whole weight, whatever the shards. Leave `data` at least two in each slice.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rules = Sequence[tuple[str, str]]

# Matmul kernels carry nearly all bytes. Norms, biases, gains and tokens stay whole, cutting them only adds latency; so
# do convolutions with a window, all small, because gradients of cut ones are summed whole and cut afterwards.
# The optimiser's moments have the same paths behind a prefix, so one set of rules places both.
RULES: Rules = (
    (r"/(patch_embed|conv|dwconv)/kernel$", "replicate"),
    (r"/(fc1|w1|w2|pwconv1)/kernel$", "column"),
    (r"/(proj|fc2|w3|pwconv2)/kernel$", "row"),
    (r"/qkv/kernel$", "joint"),
    (r"/kernel$", "fsdp"),
    (r".*", "replicate"),
)
TACTICS = ("fsdp", "column", "row", "joint", "replicate")

MIN_ELEMENTS = 2**14  # below this a shard is smaller than what a collective costs
TILE = 8
LANES = 128


def path_name(path: tuple) -> str:
    """A pytree path as "students/vitb/params/backbone/...": dict keys, attribute names, indices."""
    return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)


def _cut(shape: tuple[int, ...], tactic: str, sizes: Mapping[str, int]) -> PartitionSpec:
    """The spec of an array of at least two axes under one of the tactics that cut."""
    inputs, outputs = len(shape) - 2, len(shape) - 1
    cut: dict[int, str | None] = {inputs: None, outputs: None}

    def fits(axis: int, name: str) -> bool:
        return sizes[name] > 1 and shape[axis] % (sizes[name] * TILE) == 0

    if tactic == "joint":
        if sizes["tensor"] > 1 and shape[outputs] % (sizes["fsdp"] * sizes["tensor"] * TILE) == 0:
            return PartitionSpec(*[None] * outputs, ("fsdp", "tensor"))
        return PartitionSpec(*[None] * inputs, "fsdp", None) if fits(inputs, "fsdp") else PartitionSpec()
    # One axis over both would be gathered over both: nothing would be computed in parts.
    tensor = {"column": outputs, "row": inputs}.get(tactic)
    if tensor is not None and fits(tensor, "tensor"):
        cut[tensor] = "tensor"
    if cut[inputs] is None and fits(inputs, "fsdp"):
        cut[inputs] = "fsdp"
    elif cut[outputs] is None and fits(outputs, "fsdp") and (cut[inputs] or shape[outputs] // sizes["fsdp"] < LANES):
        cut[outputs] = "fsdp"
    return PartitionSpec(*[None] * inputs, *cut.values()) if any(cut.values()) else PartitionSpec()


def spec_for(name: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules = RULES) -> PartitionSpec:
    """The partition spec of one parameter.

    Raises:
      ValueError: no rule matches, or a rule names an unknown tactic.
    """
    for pattern, tactic in rules:
        if re.search(pattern, name):
            if tactic not in TACTICS:
                known = ", ".join(TACTICS)
                raise ValueError(f"sharding rule {pattern!r} names an unknown tactic {tactic!r}: use one of {known}")
            if tactic == "replicate" or len(shape) < 2 or math.prod(shape) < MIN_ELEMENTS:
                return PartitionSpec()
            return _cut(shape, tactic, mesh.shape)
    raise ValueError(f"no sharding rule matches {name!r}: end the rules with ('.*', 'replicate')")


def shardings(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """A tree of NamedSharding for a tree of arrays or ShapeDtypeStructs."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_for(path_name(path), leaf.shape, mesh, rules)), tree
    )
