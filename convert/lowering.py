"""From PyTorch networks to the bytes of one ExecuTorch program."""

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from torch import Tensor, nn

from convert import delegation

BACKENDS = ("xnnpack", "portable")


@dataclass(frozen=True)
class Lowered:
    """A program. For every method: what is delegated (delegation.summary), and the bytes that the runtime plans for
    inputs, outputs and tensors between partitions; XNNPACK's own workspace is allocated on top when a method loads."""

    pte: bytes
    delegation: dict[str, dict[str, Any]]
    planned_bytes: dict[str, int]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's deprecation notices; around calls of the exporter alone, so that ours are still heard."""
    noisy = [logging.getLogger(name) for name in ("torch", "torchao", "executorch")]
    levels = [logger.level for logger in noisy]
    try:
        for logger in noisy:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)


def lower(
    networks: Mapping[str, tuple[nn.Module, tuple[Tensor, ...]]],
    backend: str = "xnnpack",
    constants: Mapping[str, Any] | None = None,
    alias: str | None = None,
) -> Lowered:
    """Lowers every network, with its example inputs, into a method of one program; equal weights are stored once.

    Args:
      backend: "xnnpack", or "portable" (reference kernels only: slow, runs anywhere).
      constants: constant methods, name -> a number, a string, or a list of them.
      alias: a second name for the only method; costs a few kilobytes.
    """
    partitioners = [XnnpackPartitioner()] if backend == "xnnpack" else []
    with quiet(), torch.no_grad():
        programs = {name: torch.export.export(*network) for name, network in networks.items()}
        edge = to_edge_transform_and_lower(
            programs, partitioner=partitioners, constant_methods=dict(constants or {}) or None
        )
        found = {name: delegation.summary(edge, name) for name in networks}
        if alias:
            (method,) = networks
            # Lowering it twice would double the time; what the delegate made is stored once, by its hash.
            edge._edge_programs[alias] = copy.deepcopy(edge._edge_programs[method])
        program = edge.to_executorch()
    plans = {plan.name: plan.non_const_buffer_sizes for plan in program.executorch_program.execution_plan}
    return Lowered(bytes(program.buffer), found, {name: int(sum(plans[name])) for name in networks})
