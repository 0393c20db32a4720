"""Which parameter is cut where: ordered (regex, tactic) rules over the parameter's path, the first match wins."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rules = Sequence[tuple[str, str]]

# Matmul kernels carry nearly all bytes; norms, biases, gains and tokens stay whole (cutting them only adds latency).
# The optimiser's moments have the same paths behind a prefix, so one set of rules places both.
RULES: Rules = (
    (r"/kernel$", "fsdp"),
    (r".*", "replicate"),
)

MIN_SHARD_ELEMENTS = 2**14  # below this a shard is smaller than what a collective costs


def path_name(path: tuple) -> str:
    """A pytree path as "students/vitb/params/backbone/...": dict keys, attribute names, indices."""
    return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)


def _fsdp_spec(shape: tuple[int, ...], shards: int) -> PartitionSpec:
    """Cuts the largest axis that divides evenly; ties go to the later axis (outputs before inputs and layers)."""
    fits = [axis for axis, size in enumerate(shape) if size % shards == 0 and size >= shards]
    if shards == 1 or not fits or np.prod(shape) < MIN_SHARD_ELEMENTS:
        return PartitionSpec()
    axis = max(fits, key=lambda a: (shape[a], a))
    return PartitionSpec(*("fsdp" if a == axis else None for a in range(len(shape))))


def spec_for(name: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules = RULES) -> PartitionSpec:
    """The partition spec of one parameter.

    Raises:
      ValueError: no rule matches, or a rule names an unknown tactic.
    """
    for pattern, tactic in rules:
        if re.search(pattern, name):
            if tactic == "fsdp":
                return _fsdp_spec(shape, mesh.shape["fsdp"])
            if tactic == "replicate":
                return PartitionSpec()
            raise ValueError(f"sharding rule {pattern!r} names an unknown tactic {tactic!r}: use 'fsdp' or 'replicate'")
    raise ValueError(f"no sharding rule matches {name!r}: end the rules with ('.*', 'replicate')")


def shardings(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """A tree of NamedSharding for a tree of arrays or ShapeDtypeStructs."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_for(path_name(path), leaf.shape, mesh, rules)), tree
    )
