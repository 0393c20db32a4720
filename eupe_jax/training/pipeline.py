"""From a config to batches on the mesh, and to the functions that consume them."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from eupe_jax.data import sources as source_kinds
from eupe_jax.data.augment import AugmentConfig, augment, host_augment, sample_keys
from eupe_jax.data.host import REASONS, HostConfig
from eupe_jax.data.loader import Loader
from eupe_jax.data.teacher_stage import with_host_teachers
from eupe_jax.distill import resolutions
from eupe_jax.distill.host_teachers import HostTeacher
from eupe_jax.distill.step import Loss, Student
from eupe_jax.distill.step import make_step as make_distillation_step
from eupe_jax.distill.teachers import Teacher
from eupe_jax.models import zoo
from eupe_jax.sharding.activations import pinned
from eupe_jax.sharding.mesh import batch_sharding
from eupe_jax.training import kernels
from eupe_jax.training.assemble import Teachers, check_sides
from eupe_jax.training.cached_teachers import open_cache
from eupe_jax.training.distributed import local_positions
from eupe_jax.training.flat_rows import with_flat_rows


def teacher_sizes(config: ConfigDict) -> dict[str, tuple[int, ...]]:
    """{teacher: sides in pixels that it may draw}."""
    return {name: tuple(entry.resolutions) for name, entry in config.teachers.items()}


def every_pair(config: ConfigDict) -> list[resolutions.Resolutions]:
    """Every choice of resolutions that a step of this config may draw."""
    return resolutions.every(config.student_resolutions, teacher_sizes(config))


def check_config(config: ConfigDict) -> None:
    """What can be seen to be wrong before anything is loaded.

    Raises:
      ValueError: names the field and the fix.
    """
    for field in ("total_steps", "batch_size", "accumulate", "log_every"):
        if config[field] < 1:
            raise ValueError(f"{field} must be at least 1, got {config[field]}")
    if config.checkpoint.save_every < 1:
        raise ValueError(f"checkpoint.save_every must be at least 1, got {config.checkpoint.save_every}")
    check_faults(config.faults)
    sides = {"student_resolutions": config.student_resolutions}
    sides |= {f"teachers.{name}.resolutions": sizes for name, sizes in teacher_sizes(config).items()}
    for field, sizes in sides.items():
        if not sizes or min(sizes) < 1:
            raise ValueError(f"{field} must list at least one positive size, got {tuple(sizes)}")
    kernels.check(config.compute)
    for name, entry in config.students.items():
        check_sides(f"students.{name}", zoo.spec(entry.model, **entry.overrides), config.student_resolutions)
    pairs = [str(pair) for pair in every_pair(config)]
    for name, factor in config.loss.pair_scale.items():
        if factor != 1 and name not in pairs:
            raise ValueError(f"loss.pair_scale.{name} is no pair of resolutions of this run; its pairs: {pairs}")
        if not 0 < factor < float("inf"):
            raise ValueError(f"loss.pair_scale.{name} must be a positive number, got {factor}")
    if not config.data.sources:
        raise ValueError("data.sources is empty: a run needs images")


def check_faults(faults: ConfigDict) -> None:
    """Raises ValueError, naming the field and the fix, where `config.faults` cannot be followed."""
    if faults.max_skipped < 1:
        raise ValueError(f"faults.max_skipped must be at least 1 step, got {faults.max_skipped}")
    if faults.spike_factor and not 1 < faults.spike_factor < float("inf"):
        raise ValueError(
            f"faults.spike_factor must be more than 1, or 0 to apply every finite step, got {faults.spike_factor}"
        )
    if faults.fingerprint_every < 0:
        raise ValueError(f"faults.fingerprint_every must be at least 1 step, or 0, got {faults.fingerprint_every}")


def make_source(name: str, entry: ConfigDict) -> source_kinds.Source:
    """The image source that one entry of `config.data.sources` describes; see `sources.open_source`."""
    options = entry.options.to_dict()
    return source_kinds.open_source(entry.kind, entry.path, field=f"data.sources.{name}", **options)


def make_loader(config: ConfigDict) -> Loader:
    """The loader that `config.data` describes. A source of weight 0 is never drawn from, and need not be there."""
    data = config.data
    drawn = {name: entry for name, entry in data.sources.items() if entry.weight} or data.sources
    return Loader(
        {name: make_source(name, entry) for name, entry in drawn.items()},
        host_config(data),
        batch_size=config.batch_size,
        seed=config.seed,
        weights={name: entry.weight for name, entry in drawn.items()},
        mixing=data.mixing,
        repeats={name: entry.repeat for name, entry in drawn.items() if entry.get("repeat", 0)},
        total_steps=config.total_steps,
        threads=data.threads,
        workers=data.workers,
    )


def host_config(data: ConfigDict) -> HostConfig:
    """How the host makes images, from `config.data`."""
    return HostConfig(
        size=data.image_size,
        mode=data.mode,
        scale=tuple(data.crop_scale),
        ratio=tuple(data.crop_ratio),
        max_pixels=data.max_pixels,
        max_broken_fraction=data.max_broken_fraction,
    )


class Data:
    """What a run sees, opened: its image sources or its feature cache.

    Raises:
      ValueError, OSError: the sources or the cache cannot be opened, or do not fit the config.
    """

    def __init__(self, config: ConfigDict) -> None:
        self._config = config
        self._cache = open_cache(config)
        self._loader = make_loader(config) if self._cache is None else None

    @property
    def facts(self) -> dict[str, dict]:
        """What identifies the data, as JSON takes it: records and digest of every source, or those of the cache."""
        if self._cache is not None:
            return {"feature_cache": {"records": self._cache.records, "fingerprint": self._cache.fingerprint}}
        opened = self._loader.sources
        return {"sources": {name: {"records": len(s), "digest": s.digest} for name, s in opened.items()}}

    def describe(self, step: int) -> dict:
        """What identifies a step, as JSON takes it: {"pair" of resolutions, "seed" (with the step, that of every draw),
        "records": {source: indices in the order of the batch's places}}. A function of config and step, for the whole
        batch on every host. A record that turns out to be broken is replaced when it is read.
        """
        config = self._config
        chosen = resolutions.choose(config.seed, step, config.student_resolutions, teacher_sizes(config))
        return {
            "pair": str(chosen),
            "seed": int(config.seed),
            "records": {name: index.tolist() for name, index in self._records(step).items()},
        }

    def _records(self, step: int) -> dict[str, np.ndarray]:
        if self._cache is not None:
            entries = self._cache.entries_of_step(step, self._config.batch_size, self._config.seed)
            return {"feature_cache": entries}  # view v of record i is v * records + i
        ids, found, first = self._loader.record_ids(step), {}, 0
        for name, source in self._loader.sources.items():
            here = (ids >= first) & (ids < first + len(source))
            if here.any():
                found[name] = ids[here] - first
            first += len(source)
        return found

    def batches(self, hosts: Mapping[str, HostTeacher], mesh: Mesh, *, start_step: int) -> "Batches":
        """Global batches from `start_step` on, with the features of these host teachers. Each host makes the images
        that its own devices take."""
        config, loader = self._config, self._loader
        sharding = batch_sharding(mesh)
        positions = local_positions(sharding, config.batch_size)
        if loader is None:
            local = self._cache.batches(
                start_step,
                batch_size=config.batch_size,
                seed=config.seed,
                positions=positions,
                teachers=[name for name in config.teachers if name in self._cache.teachers],
            )
            if hosts:
                local = with_host_teachers(local, hosts, start_step=start_step)
            return Batches(local, sharding, start_step)
        local = loader.batches(start_step, positions)
        if hosts:
            run_augment = host_augment(AugmentConfig.from_dict(config.augment), config.seed)
            local = with_host_teachers(local, hosts, run_augment, start_step=start_step, positions=positions)
        return Batches(local, sharding, start_step, list(loader.sources))


class Batches:
    """Global batches on the mesh: {"image": uint8 [B, S, S, 3], "index": [B]}; with host teachers or a feature cache
    also {"features": {name: tokens}}, of those of the run, and pixels already augmented. Endless; close it when done.
    """

    def __init__(
        self, local: Iterator[dict], sharding: NamedSharding, start_step: int, sources: Sequence[str] = ()
    ) -> None:
        self._local, self._sharding, self._sources = local, sharding, sources
        self._step = start_step
        self._broken: dict[int, np.ndarray] = {}  # step -> [sources, kinds] of this host's part of its batch

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict:
        try:
            batch = next(self._local)
        except BaseException:
            self.close()
            raise
        if (broken := batch.pop("broken", None)) is not None and broken.any():
            self._broken[self._step] = broken
        self._step += 1
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self._sharding, np.asarray(x)), batch)

    def broken(self, *, before: int) -> dict[str, int]:
        """{"data/broken/SOURCE/KIND": how often such records were met} in the batches of the steps before `before`
        that were not asked about yet, on all hosts together; none that are zero. All hosts must call it alike.
        """
        if not self._sources:
            return {}
        counts = np.zeros((len(self._sources), len(REASONS)), np.int32)
        for step in [step for step in self._broken if step < before]:
            counts += self._broken.pop(step)
        # hosts that make the same images (cut by the tensor axis) count them once
        first = local_positions(self._sharding, self._sharding.mesh.size)[0]
        firsts, gathered = process_allgather((np.int32(first), counts))
        _, distinct = np.unique(firsts, return_index=True)
        total = gathered.reshape(-1, *counts.shape)[distinct].sum(axis=0)
        return {
            f"data/broken/{self._sources[source]}/{REASONS[kind]}".replace(" ", "_"): int(total[source, kind])
            for source, kind in zip(*np.nonzero(total), strict=True)
        }

    def close(self) -> None:
        """Stops what prepares batches ahead."""
        self._local.close()


def batches(config: ConfigDict, hosts: Mapping[str, HostTeacher], mesh: Mesh, *, start_step: int) -> Batches:
    """The batches of a config's data, opened for them alone; see `Data`."""
    return Data(config).batches(hosts, mesh, start_step=start_step)


def device_augment(config: ConfigDict, teachers: Mapping[str, Teacher]) -> Callable | None:
    """`augment(step, images, positions)` for the jitted step; None where the batch brings augmented pixels, as it does
    with the features of host teachers, and from a cache."""
    if config.data.feature_cache or any(teacher.is_host for teacher in teachers.values()):
        return None
    settings = AugmentConfig.from_dict(config.augment)

    def run(step: jax.Array, images_BxSxSx3: jax.Array, positions_B: jax.Array) -> jax.Array:
        return augment(sample_keys(jax.random.key(config.seed), step, positions_B), images_BxSxSx3, settings)

    return run


def make_loss(config: ConfigDict) -> Loss:
    """What `config.loss` says of the weights of the loss's parts."""
    loss = config.loss
    return Loss(loss.patch_cosine, loss.patch_smooth_l1, loss.smooth_l1_beta, tuple(loss.pair_scale.items()))


def make_step(
    config: ConfigDict,
    students: Mapping[str, Student],
    teachers: Mapping[str, Teacher],
    chosen: resolutions.Resolutions,
    mesh: Mesh | None = None,
) -> Callable:
    """The distillation step of this config for one choice of resolutions."""
    step = make_distillation_step(
        students,
        teachers,
        chosen,
        make_loss(config),
        seed=config.seed,
        augment=device_augment(config, teachers),
        shuffle_targets=config.loss.shuffle_targets,
        accumulate=config.accumulate,
        per_pair=len(every_pair(config)) > 1,
        spike_factor=config.faults.spike_factor,
        mesh=mesh,
    )
    return with_flat_rows(step, mesh)


class TeacherForward:
    """`forward(step, batch) -> {teacher: targets}`: teachers alone, on the very pixels that training sees at `step`."""

    def __init__(self, config: ConfigDict, teachers: Teachers, mesh: Mesh | None = None) -> None:
        self._config, self._teachers = config, teachers
        self._augment = device_augment(config, teachers.by_name)
        self._run = jax.jit(pinned(mesh)(self._forward), static_argnums=3)

    def _forward(self, step: jax.Array, batch: Mapping, variables: Mapping, chosen: resolutions.Resolutions) -> dict:
        images = batch["image"].astype(jnp.float32) / 255.0
        if self._augment is not None:
            images = self._augment(step, images, jnp.arange(len(images)))
        sides = dict(chosen.teachers)
        return {
            name: teacher.targets(batch["features"][name])
            if teacher.is_host
            else teacher(variables[name], images, sides[name])
            for name, teacher in self._teachers.by_name.items()
        }

    def __call__(self, step: int, batch: Mapping) -> dict[str, dict[str, jax.Array]]:
        config = self._config
        chosen = resolutions.choose(config.seed, step, config.student_resolutions, teacher_sizes(config))
        return self._run(jnp.int32(step), batch, self._teachers.variables, chosen)
