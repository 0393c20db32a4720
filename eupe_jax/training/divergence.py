"""Silent divergence: whether all copies of every parameter are still the same, on all devices of all hosts.

Whatever is not cut over all devices lies on several of them, and every step computes each copy anew. A chip or a memory
that errs without a word makes one of them another, and the run goes on with two models at once.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from eupe_jax.sharding.mesh import replicated
from eupe_jax.sharding.rules import path_name
from eupe_jax.training.fingerprint import digest


class Diverging(ValueError):
    """Copies that must be the same are not."""


class ReplicaCheck:
    """Compares the copies of trees of arrays on a mesh. A copy is read once, on its own device; a few bytes travel."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._devices = mesh.devices.flatten().tolist()
        self._run = jax.jit(self._digests, static_argnums=0, out_shardings=replicated(mesh))
        self._alike: int | None = None

    def check(self, step: int, tree: Any) -> None:
        """Compares all copies of `tree`, arrays on the mesh, after `step` steps. All hosts must call it alike.

        Raises:
          Diverging: names the parameters, the devices whose copy is not that of most, and their hosts.
        """
        names, leaves, groups = [], [], []
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            group = self._copies(leaf)
            if len(set(group)) < len(group):  # some parts have several copies
                names.append(path_name(path))
                leaves.append(leaf)
                groups.append(group)
        if not leaves:
            return
        specs = tuple(leaf.sharding.spec for leaf in leaves)
        found = jax.device_get(self._run(specs, leaves))
        different = {
            name: odd
            for name, values, group in zip(names, found, groups, strict=True)
            if (odd := odd_ones(values, group))
        }
        if different:
            raise Diverging(self._words(step, different))
        self._alike = step

    def _copies(self, leaf: jax.Array) -> tuple[int, ...]:
        """Which part of the array every device of the mesh holds, as the first device that holds it."""
        held = leaf.sharding.devices_indices_map(leaf.shape)
        first: dict[tuple, int] = {}
        parts = [tuple((cut.start, cut.stop) for cut in held[device]) for device in self._devices]
        return tuple(first.setdefault(part, number) for number, part in enumerate(parts))

    def _digests(self, specs: tuple[PartitionSpec, ...], leaves: list[jax.Array]) -> jax.Array:
        """uint32 [leaves, devices], devices in the order of the mesh."""

        def local(*shards: jax.Array) -> jax.Array:
            return jnp.stack([digest(shard) for shard in shards])[:, None]

        everywhere = PartitionSpec(None, self._mesh.axis_names)
        return jax.shard_map(local, mesh=self._mesh, in_specs=specs, out_specs=everywhere, check_vma=False)(*leaves)

    def _words(self, step: int, different: dict[str, list[int]]) -> str:
        name, odd = next(iter(different.items()))
        more = f" and {len(different) - 1} more" if len(different) > 1 else ""
        devices = [self._devices[number] for number in sorted(set().union(*different.values()))]
        hosts = sorted({device.process_index for device in devices})
        known = "never before" if self._alike is None else f"last after step {self._alike}"
        return (
            f"after step {step} not all copies of {name}{more} are the same: suspect device(s) "
            f"{', '.join(str(device.id) for device in devices)} of host(s) {', '.join(map(str, hosts))}; take what "
            f"fails out and go on from a checkpoint of when all were alike ({known})"
        )


def odd_ones(values: np.ndarray, group: Sequence[int]) -> list[int]:
    """The numbers of those of values [N] that are not what most of their group are; of all there where no value is."""
    if np.array_equal(values, values[list(group)]):
        return []
    odd = []
    for part in set(group):
        members = [number for number, other in enumerate(group) if other == part]
        usual, count = Counter(values[members].tolist()).most_common(1)[0]
        odd += [number for number in members if values[number] != usual or 2 * count <= len(members)]
    return odd
