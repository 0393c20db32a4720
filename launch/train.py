"""Trains a recipe: python launch/train.py --config=configs/stage2_vitb.py --workdir=gs://BUCKET/stage2_vitb

The same command again resumes. `--config=...:runlocal` shrinks any recipe to a seconds-long smoke test that needs
neither data nor weights; --print_config shows the whole recipe.
"""

import jax
from absl import flags
from etils import epath

from eupe_jax.training.loop import train
from eupe_jax.training.measure import measure_statistics
from launch import cli
from launch.training_evals import training_evals

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run (local or gs://): checkpoints, metrics, config")
PRINT_CONFIG = flags.DEFINE_bool("print_config", False, "print the complete recipe and stop")
STOP_AT = flags.DEFINE_integer("stop_at", None, "stop after this step, with a checkpoint", lower_bound=1)
CACHE = flags.DEFINE_string("compilation_cache", None, "folder that keeps compiled programs between runs")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "several hosts: join them with jax.distributed.initialize()")


def main() -> None:
    config = cli.require(CONFIG, "config")
    if PRINT_CONFIG.value:
        print(config)
        return
    workdir = epath.Path(cli.require(WORKDIR, "workdir"))
    if CACHE.value:
        jax.config.update("jax_compilation_cache_dir", CACHE.value)
    if DISTRIBUTED.value:
        jax.distributed.initialize()
    if not config.statistics and not config.statistics_from and _all_random(config):
        # a smoke test: nobody has measured its random teachers, so do that first
        config.statistics = str(workdir / "statistics")
        measure_statistics(config, config.statistics)
    train(config, workdir, evals=training_evals(config, workdir), stop_at=STOP_AT.value)
    print(f"done: {workdir}")


def _all_random(config) -> bool:
    return all(entry.kind == "encoder" and entry.checkpoint == "random" for entry in config.teachers.values())


if __name__ == "__main__":
    cli.run(main)
