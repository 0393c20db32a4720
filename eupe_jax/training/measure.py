"""Measuring the frozen statistics of a run's teachers (EUPE §3.3: 500 iterations before training)."""

import contextlib

import jax
from etils import epath
from jax.experimental.multihost_utils import sync_global_devices
from ml_collections import ConfigDict
from tqdm import tqdm

from eupe_jax.distill.normalization import Accumulator, Statistics
from eupe_jax.sharding.mesh import make_mesh
from eupe_jax.training import assemble, distributed, pipeline
from eupe_jax.training.mesh_check import check_mesh


def measure_statistics(config: ConfigDict, out: epath.PathLike) -> dict[str, Statistics]:
    """Runs every teacher over `config.statistics_steps` batches of the run's own data and writes
    `out/TEACHER.safetensors`.

    Batches, crops and augmentations are those that training will see first. A teacher that draws among several
    resolutions is measured over all its draws.

    Raises:
      ValueError, OSError: bad config, data, or output folder. Files are written only when all is measured.
    """
    pipeline.check_config(config)
    mesh = make_mesh(**config.mesh)
    check_mesh(config, mesh, jax.process_count())
    out = epath.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    teachers = assemble.load_teachers(config, mesh)
    accumulators = {name: Accumulator() for name in teachers.by_name}
    forward = pipeline.TeacherForward(config, teachers, mesh)
    silent = not distributed.is_main()
    with contextlib.closing(pipeline.batches(config, teachers.hosts, mesh, start_step=0)) as batches:
        for step in tqdm(range(config.statistics_steps), desc="statistics", unit="batch", disable=silent):
            for name, tokens in forward(step, next(batches)).items():
                accumulators[name].add(tokens)
    statistics = {
        name: accumulators[name].finish(assemble.provenance(config, name, teacher))
        for name, teacher in teachers.by_name.items()
    }
    if distributed.is_main():
        for name, value in statistics.items():
            value.save(out / f"{name}.safetensors")
    sync_global_devices("statistics written")  # the others may read them at once
    return statistics
