"""Trains a recipe: python launch/train.py --config=configs/stage2_vitb.py --workdir=gs://BUCKET/stage2_vitb

The same command again resumes, also after SIGTERM: then all is saved, and the status 75 asks to be run again. --fresh
starts over in the same folder. `--config=...:runlocal` shrinks any recipe to a seconds-long smoke test that needs
neither data nor weights; --print_config shows the whole recipe. On several hosts, start it on each of them with
--distributed (docs/pods.md).
"""

if __name__ == "__main__":
    import launch.early  # noqa: F401

import os

import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from eupe_jax.training import distributed, loop, profiling, workdirs
from eupe_jax.training.host_memory import keep_freed_memory
from eupe_jax.training.measure import measure_statistics
from eupe_jax.training.preemption import AGAIN, GRACE_SECONDS, Preemption
from launch import cli, processes
from launch.training_evals import training_evals

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run (local or gs://): checkpoints, metrics, config")
PRINT_CONFIG = flags.DEFINE_bool("print_config", False, "print the complete recipe and stop")
STOP_AT = flags.DEFINE_integer("stop_at", None, "stop after this step, with a checkpoint", lower_bound=1)
PROFILE = flags.DEFINE_string("profile", None, "FIRST:LAST: trace these steps into WORKDIR/profile, such as 100:105")
ON_CORRUPT = flags.DEFINE_enum(
    "on_corrupt",
    "stop",
    loop.ON_CORRUPT,
    "where the newest checkpoint is damaged: stop, or put it aside (WORKDIR/damaged) and go on from an intact one",
)
FRESH = flags.DEFINE_bool("fresh", False, "move the run that WORKDIR holds into WORKDIR/old.N, and start a new one")
GRACE = flags.DEFINE_float(
    "grace", GRACE_SECONDS, "seconds from SIGTERM within which to save and leave; clouds kill after 30", lower_bound=1.0
)
CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    "folder that keeps compiled programs between runs, for all hosts; else $JAX_COMPILATION_CACHE_DIR, or on TPUs "
    "and GPUs WORKDIR/compilation_cache",
)


def main() -> None:
    config = cli.require(CONFIG, "config")
    if PRINT_CONFIG.value:
        print(config)
        return
    workdir = epath.Path(cli.require(WORKDIR, "workdir"))
    profile = profiling.parse_steps(PROFILE.value) if PROFILE.value else None
    with Preemption(GRACE.value) as preemption:
        processes.join(preemption)
        train(config, workdir, profile, preemption)
    if distributed.is_main():
        print(f"done: {workdir}")


def _statistics_inside(config: ConfigDict, workdir: epath.Path) -> tuple[str, ...]:
    """The name of the workdir's folder of statistics, where the config says that a run takes them from there."""
    named = {os.path.abspath(path) for path in (config.statistics, config.statistics_from) if path}
    return ("statistics",) if os.path.abspath(workdir / "statistics") in named else ()


def train(config: ConfigDict, workdir: epath.Path, profile: tuple[int, int] | None, preemption: Preemption) -> None:
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    _keep_compiled(workdir)
    evals = training_evals(config, workdir)
    if FRESH.value:
        loop.check_run(config, workdir, evals, fresh=True)
        workdirs.set_aside(workdir, keep=_statistics_inside(config, workdir))
        preemption.again = f"{AGAIN}, now without --fresh,"  # which would begin once more
    if not config.statistics and not config.statistics_from and _all_random(config):
        # a smoke test: nobody has measured its random teachers, so do that first, once
        config.statistics = str(workdir / "statistics")
        loop.check_run(config, workdir, evals)
        if not (workdir / workdirs.CONFIG).exists():
            measure_statistics(config, config.statistics)
    loop.train(
        config,
        workdir,
        evals=evals,
        stop_at=STOP_AT.value,
        profile=profile,
        on_corrupt=ON_CORRUPT.value,
        preemption=preemption,
    )


def _keep_compiled(workdir: epath.Path) -> None:
    """Turns on the persistent compilation cache: only process 0 writes to it, so it lies where all of them read.

    On CPUs only where --compilation_cache asks for it: little is gained there, and what is compiled fits one machine.
    """
    folder = CACHE.value
    if not folder and not jax.config.jax_compilation_cache_dir and jax.default_backend() != "cpu":
        folder = str(workdir / "compilation_cache")
    if folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        if "://" in folder:  # XLA's own caches (GPUs) know no buckets
            jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def _all_random(config) -> bool:
    return all(entry.kind == "encoder" and entry.checkpoint == "random" for entry in config.teachers.values())


if __name__ == "__main__":
    cli.run(main)
