"""Runs one step of a run again, to see what went wrong in it: python launch/replay.py --workdir=runs/x --step=1234

The run's own config, data and newest checkpoint before the step; nothing is written into its folder. Steps count from
0, as in WORKDIR/bad_steps.jsonl: what is logged after it stands in metrics.jsonl as step + 1. On several hosts, start
it on each of them with --distributed (docs/pods.md); the same bits need as many devices of the same kind.
"""

import io

import numpy as np
from absl import flags
from etils import epath

from eupe_jax import files
from eupe_jax.training import distributed
from eupe_jax.training import replay as replaying
from eupe_jax.training.preemption import Preemption
from launch import cli, processes

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run (local or gs://)")
STEP = flags.DEFINE_integer("step", None, "the step, from 0", lower_bound=0)
SAVE_BATCH = flags.DEFINE_string(
    "save_batch",
    None,
    "FILE.npz for what the step saw: image, index and, of host teachers or a feature cache, features/TEACHER/KIND",
)


def main() -> None:
    workdir, step = cli.require(WORKDIR, "workdir"), cli.require(STEP, "step")
    if SAVE_BATCH.value and not SAVE_BATCH.value.endswith(".npz"):
        raise ValueError(f"--save_batch={SAVE_BATCH.value} must end in .npz")
    if SAVE_BATCH.value:
        epath.Path(SAVE_BATCH.value).parent.mkdir(parents=True, exist_ok=True)  # not after all the work
    with Preemption() as preemption:  # SIGTERM ends it at once: there is nothing to save
        processes.join(preemption)
        found = replaying.replay(workdir, step)
        arrays = replaying.arrays_of(found.batch) if SAVE_BATCH.value else {}
    if not distributed.is_main():
        return
    for line in replaying.in_lines(found):
        print(line)
    if arrays:
        packed = io.BytesIO()
        np.savez(packed, **arrays)
        files.write_whole(epath.Path(SAVE_BATCH.value), packed.getvalue())
        print(f"batch: {SAVE_BATCH.value}")


if __name__ == "__main__":
    cli.run(main)
