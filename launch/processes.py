"""Flags of commands that run on several hosts at once; `join()` comes before anything asks JAX for devices."""

import logging

from absl import flags

from eupe_jax.training import distributed

DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "several processes: join them; on TPU pods, GKE, Slurm and Open MPI they find each other"
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if nothing else tells: so the next two")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "how many processes the run has", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "number of this process, from 0", lower_bound=0)


def join() -> None:
    """Joins the processes of this run, if it has several; from then on only the first says more than warnings.

    Raises:
      ValueError, ConnectionError: see `distributed.join`.
    """
    explicit = (COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    if not DISTRIBUTED.value and explicit == (None, None, None):
        return
    distributed.join(*explicit)
    if not distributed.is_main():
        for name in ("eupe_jax", "launch"):
            logging.getLogger(name).setLevel(logging.WARNING)
