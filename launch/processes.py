"""Flags of commands that run on several hosts at once; `join()` comes before anything asks JAX for devices."""

import logging

import jax
from absl import flags

from eupe_jax.training import distributed
from eupe_jax.training.preemption import Preemption

LOGGER = logging.getLogger(__name__)

DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "several processes: join them; on TPU pods, GKE, Slurm and Open MPI they find each other"
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if nothing else tells: so the next two")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "how many processes the run has", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "number of this process, from 0", lower_bound=0)
LOST_AFTER = flags.DEFINE_integer(
    "lost_after", distributed.LOST_AFTER, "several processes: seconds without a sign of one until the others end",
    lower_bound=5,
)  # fmt: skip


def join(preemption: Preemption | None = None) -> None:
    """Joins the processes of this run, if it has several; from then on only the first says more than warnings.

    `preemption`, if any, then hears of a notice that any of them gets.

    Raises:
      ValueError, ConnectionError: see `distributed.join`.
    """
    explicit = (COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    if not DISTRIBUTED.value and explicit == (None, None, None):
        return
    distributed.join(*explicit, lost_after=LOST_AFTER.value)
    if preemption is not None:
        preemption.joined()
    LOGGER.info("%d processes", jax.process_count())
    if not distributed.is_main():
        for name in ("eupe_jax", "launch"):
            logging.getLogger(name).setLevel(logging.WARNING)
