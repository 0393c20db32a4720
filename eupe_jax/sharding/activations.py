"""Where activations live: pinned to the devices that hold their images, whatever the parameters' cuts suggest.

Left to itself the compiler may let a parameter's cut spread into the activations: with a patch embedding cut on its
outputs it cut the whole residual stream by channels, and gathered images instead of weights in every layer. The models
know no mesh, so this is done from outside, to what goes into and comes out of every module while a step is traced.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eupe_jax.sharding.mesh import BATCH_AXES, data_shards

# Modules that take, or give, channels which a tensor group may have cut: between a kernel cut on its outputs and the
# next one, cut on its inputs. Everywhere else the channels are the same on every device of a group.
CUT_INPUTS = re.compile(r"(/(proj|fc2|w3|pwconv2)|_(cls|patches)/norm)$")
CUT_OUTPUTS = re.compile(r"(/(qkv|fc1|w1|w2|pwconv1)|_(cls|patches)/norm)$")


@contextlib.contextmanager
def pinned(mesh: Mesh | None) -> Iterator[None]:
    """Within it, or in a function that it decorates, activations of every flax module are cut by images over `mesh`.

    What counts as activations: the first argument of a module's call, and outputs with as many images.
    """
    if mesh is None or mesh.size == 1:
        yield
        return

    def interceptor(call: Any, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        if context.method_name != "__call__" or not args or getattr(args[0], "ndim", 0) < 2:
            return call(*args, **kwargs)
        images, path = args[0].shape[0], "/".join(context.module.path)

        def pin(x: Any, may_be_cut: bool) -> Any:
            # one image of a model that is initialised, or a table: no batch
            if getattr(x, "ndim", 0) < 2 or x.shape[0] != images or images % data_shards(mesh):
                return x
            rest = PartitionSpec.UNCONSTRAINED if may_be_cut else None
            spec = PartitionSpec(BATCH_AXES, *[rest] * (x.ndim - 1))
            return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

        outputs = call(pin(args[0], bool(CUT_INPUTS.search(path))), *args[1:], **kwargs)
        return jax.tree.map(lambda x: pin(x, bool(CUT_OUTPUTS.search(path))), outputs)

    with nn.intercept_methods(interceptor):
        yield
