"""Several processes of one run: joining them, and which part of a batch each of them makes."""

import logging
import re
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Sharding

LOGGER = logging.getLogger(__name__)

TIMEOUT = 300  # seconds to wait for the other processes


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = TIMEOUT,
) -> None:
    """Joins the processes of a run with `jax.distributed`, before anything asks JAX for devices.

    Without arguments JAX finds them by itself: on TPU pods and slices of them, on GKE, under Slurm and Open MPI. With
    other launchers every process is told all three: `coordinator` ("HOST:PORT" of process 0), how many there are, and
    its own number.

    Raises:
      ValueError: arguments that do not fit together, or none where nothing can be found.
      ConnectionError: the others did not come within `timeout` seconds.
    """
    explicit = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    given = {flag: value for flag, value in explicit.items() if value is not None}
    if given:
        _check(explicit, given)
        arguments = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    else:
        arguments = {}
    try:
        jax.distributed.initialize(**arguments, initialization_timeout=timeout)
    except ValueError as error:  # "coordinator_address should be defined", and the like
        raise ValueError(
            f"--distributed found no cluster here ({_line(error)}): on TPU pods, GKE, Slurm and Open MPI it finds the "
            "processes by itself; elsewhere give --coordinator=HOST:PORT --num_processes=N --process_id=I"
        ) from error
    except RuntimeError as error:
        if "must be called before" in str(error):
            raise
        raise ConnectionError(
            f"the processes of this run did not come together within {timeout} s ({_line(error)}): start all of them, "
            f"with a coordinator that each can reach{f' ({coordinator})' if coordinator else ''}"
        ) from error
    LOGGER.info("process %d of %d", jax.process_index(), jax.process_count())


def _check(explicit: Mapping, given: Mapping) -> None:
    if missing := sorted(set(explicit) - set(given)):
        given = ", ".join(sorted(given))
        raise ValueError(f"{given} without {', '.join(missing)}: give all three, or --distributed alone")
    if not re.fullmatch(r".+:\d+", coordinator := explicit["--coordinator"]):
        raise ValueError(f"--coordinator={coordinator!r} must be HOST:PORT, of the machine of process 0")
    if not 0 <= explicit["--process_id"] < explicit["--num_processes"]:
        raise ValueError(
            f"--process_id={explicit['--process_id']} is not one of the {explicit['--num_processes']} processes, which "
            "are numbered from 0"
        )


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def is_main() -> bool:
    """Whether this process is the one that writes files and draws bars. (Orbax writes checkpoints from all.)"""
    return jax.process_index() == 0


def local_positions(sharding: Sharding, batch_size: int, process_index: int | None = None) -> np.ndarray:
    """Positions in the global batch (int64 [b], ascending) that the devices of a process take.

    On a torus the devices of one host are in general no neighbours in the mesh: it takes several runs of positions.
    Hosts whose devices hold the same part (cut by the tensor axis) make the same images.

    Raises:
      ValueError: the batch does not divide over the mesh.
    """
    process = jax.process_index() if process_index is None else process_index
    slices = [
        index[0]
        for device, index in sharding.devices_indices_map((batch_size,)).items()
        if device.process_index == process
    ]
    return np.unique(np.concatenate([np.arange(batch_size)[part] for part in slices]))
