"""Running a config's teachers once over augmented views of its images: for finite sets and slow or foreign teachers."""

import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from eupe_jax.data.augment import AugmentConfig, augment_uint8
from eupe_jax.data.feature_builder import build_feature_cache
from eupe_jax.data.feature_cache import FeatureCache
from eupe_jax.data.teacher_stage import Features, run_teachers
from eupe_jax.distill.host_teachers import check_features
from eupe_jax.distill.teachers import view
from eupe_jax.sharding.mesh import batch_sharding, make_mesh
from eupe_jax.training import assemble, pipeline
from eupe_jax.training.cached_teachers import relevant_fields

PIECE = 64  # images augmented and shown to the teachers at a time


def precompute(
    config: ConfigDict,
    folder: str | os.PathLike,
    *,
    views: int,
    precision: str = "bf16",
    shards: int | None = None,
    records: int | None = None,
    teachers: Sequence[str] = (),
    progress: bool = True,
    verify: bool = False,
) -> FeatureCache:
    """Writes the features of `views` augmented views of every image, goes on where it was stopped, or repairs a cache.

    A run whose `data.feature_cache` names the folder then trains without these teachers. teachers: which of the
    config's, default all; records: the first so many of the source. verify: whether shards that are there are hashed,
    and built anew where they are damaged, beyond looking at their sizes. In-graph teachers run jitted, a batch cut over
    this host's devices; host teachers run beside.

    Raises:
      ValueError: several hosts, sources, or resolutions of a teacher; or `folder` holds a cache of something else.
    """
    if jax.process_count() > 1:
        raise ValueError("a feature cache is built by one host: start one process, on as many devices as it has")
    if len(config.data.sources) != 1:
        raise ValueError(
            f"data.sources names {sorted(config.data.sources)}: a feature cache is built from exactly one finite source"
        )
    config = _with_teachers(config, teachers)
    mesh = make_mesh(**config.mesh)
    loaded = assemble.load_teachers(config, mesh)
    ((name, entry),) = config.data.sources.items()
    return build_feature_cache(
        folder,
        pipeline.make_source(name, entry),
        pipeline.host_config(config.data),
        {name: teacher.spec for name, teacher in loaded.by_name.items()},
        ViewForward(config, loaded, mesh),
        seed=config.seed,
        views=views,
        records=records,
        precision=precision,
        shards=shards,
        facts={"config": relevant_fields(config, config.teachers)},
        chains={
            name: {"header": loaded.chain_headers[name], "arrays": flatten_dict(chain, sep="/")}
            for name, chain in loaded.chains.items()
        },
        piece=PIECE,
        threads=config.data.threads,
        progress=progress,
        verify=verify,
    )


def _with_teachers(config: ConfigDict, chosen: Sequence[str]) -> ConfigDict:
    """The config with these of its teachers alone, each at one resolution, and without a cache."""
    if unknown := sorted(set(chosen) - set(config.teachers)):
        raise ValueError(f"the config has no teachers {unknown}; it has {sorted(config.teachers)}")
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.feature_cache = ""
        for name in set(config.teachers) - set(chosen or config.teachers):
            del config.teachers[name]
    for name, entry in config.teachers.items():
        if len(entry.resolutions) != 1:
            raise ValueError(
                f"teachers.{name}.resolutions lists {tuple(entry.resolutions)}: a feature cache holds a teacher's "
                "features at one resolution; give one, or train without data.feature_cache"
            )
    return config


class ViewForward:
    """`forward(step, images uint8 [b, S, S, 3], first) -> (augmented pixels, key words [b, 2], features)`, for at most
    PIECE images at the positions from `first` on. Teachers see the very pixels that are returned, as uint8.
    """

    def __init__(self, config: ConfigDict, teachers: assemble.Teachers, mesh: Mesh) -> None:
        self._config, self._teachers = config, teachers
        self._settings = AugmentConfig.from_dict(config.augment)
        self._sharding = batch_sharding(mesh)
        self._batch = -(-PIECE // mesh.size) * mesh.size  # always the same: one program, cut evenly
        self._in_graph = {name: t for name, t in teachers.by_name.items() if not t.is_host}
        self._run = jax.jit(self._tokens)

    def _tokens(self, variables: dict, pixels: jax.Array) -> dict:
        x, tokens = pixels.astype(jnp.float32) / 255.0, {}
        for name, teacher in self._in_graph.items():
            spec = teacher.spec
            given = teacher.module.apply(variables[name], view(x, spec.resolution, spec.mean, spec.std))
            kinds = ("patches",) if spec.cls_dim is None else ("cls", "patches")
            tokens[name] = {kind: given[kind].astype(jnp.float32) for kind in kinds}
        return tokens

    def __call__(self, step: int, images: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray, Features]:
        n = len(images)
        filled = np.concatenate([images, np.repeat(images[-1:], self._batch - n, axis=0)])
        filled, positions = jax.device_put((filled, first + np.arange(self._batch)), self._sharding)
        key = jax.random.key(self._config.seed)
        augmented, keys = augment_uint8(key, step, positions, filled, self._settings)
        tokens = self._run(self._teachers.variables, augmented)  # under way while host teachers run
        pixels = np.asarray(augmented)[:n]
        features = run_teachers(self._teachers.hosts, pixels)
        for name, kinds in jax.device_get(tokens).items():
            features[name] = {kind: x[:n] for kind, x in kinds.items()}
            check_features(self._teachers.by_name[name].spec, features[name], n)
        return pixels, np.asarray(keys)[:n], features
