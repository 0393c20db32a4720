"""The folder of a run, written by the very parts that write one in training, without its step."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from eupe_jax.files import write_whole
from eupe_jax.sharding.mesh import make_mesh
from eupe_jax.training import assemble, pipeline, workdirs
from eupe_jax.training.checkpoints import Checkpoints
from eupe_jax.training.health import Health
from eupe_jax.training.metrics import MetricWriter
from eupe_jax.training.timing import Timing


def write_run(config: ConfigDict, workdir: Path, bad: frozenset[int] = frozenset()) -> None:
    """What `train(config, workdir)` would leave, but for weights and figures, which are random.

    Compiling a step takes five times as long as all else. bad: steps, 0-based, whose gradients were not finite.
    """
    teachers = assemble.load_teachers(config, make_mesh(devices=jax.local_devices()[:1]))
    statistics = assemble.find_statistics(config, teachers.by_name)
    students = assemble.make_students(config, teachers.by_name)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(assemble.fresh_state, config, students))
    state = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.2, x.dtype), shapes)
    workdir.mkdir()
    write_whole(workdir / workdirs.CONFIG, json.dumps(config.to_dict(), indent=2))
    saver, writer = Checkpoints(workdir, config.checkpoint), MetricWriter(workdir)
    timing = Timing(config.batch_size, None, jax.devices())
    health = Health(workdir, config, pipeline.Data(config).describe, enabled=True)
    parts = [f"{t}/{part}" for t in teachers.by_name for part in ("cls_cosine", "patch_cosine", "patch_smooth_l1")]
    arrays = {name: found.arrays() for name, found in statistics.items()}
    manifest = assemble.manifest(config, teachers, statistics)
    for step in range(config.total_steps):
        metrics = {f"{name}/{what}": rng.uniform(0.5, 1) for name in students for what in ("loss", "grad_norm", *parts)}
        metrics |= {f"{name}/skipped": float(step in bad) for name in students}
        if step in bad:
            metrics |= {f"{name}/{what}": np.nan for name in students for what in ("loss", "grad_norm")}
        health.add(step, {name: jnp.asarray(value) for name, value in metrics.items()})
        health.check(final=True)
        with timing.part("data"):
            timing.step(None)
        writer.write(step + 1, metrics | {"learning_rate": config.optimizer.learning_rate})
        writer.write_timings(step + 1, timing.pop())
        saver.save(step + 1, state, arrays, teachers.chains, manifest)
    saver.wait()
    saver.close()
    writer.close()
