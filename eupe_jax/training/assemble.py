"""From a config to the parts of a run: teachers with weights, students, optimisers."""

import dataclasses
import functools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from etils import epath
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from eupe_jax.distill.adapters import AdapterBank
from eupe_jax.distill.host_teachers import HostTeacher, load_host_teacher
from eupe_jax.distill.normalization import Provenance, Statistics
from eupe_jax.distill.step import Student
from eupe_jax.distill.teacher_spec import TeacherSpec
from eupe_jax.distill.teacher_spec import fingerprint as teacher_fingerprint
from eupe_jax.distill.teachers import Teacher
from eupe_jax.models import interchange, zoo
from eupe_jax.sharding.rules import shardings
from eupe_jax.training import checkpoints, encoders, integrity, kernels, weight_files
from eupe_jax.training.cached_teachers import open_cache
from eupe_jax.training.fingerprint import fingerprint
from eupe_jax.training.optimizer import make_optimizer

LOGGER = logging.getLogger(__name__)

RANDOM = "random"
# Constructor arguments that only choose which tokens an encoder gives; its weights are the same.
OUTPUT_FIELDS = ("cls_output", "patch_output")
# Others that weights do not depend on: how to compute, initial values, and what only training uses.
FREE_OVERRIDES = (
    *OUTPUT_FIELDS, "residual_dtype", "remat", "scan_unroll", "depthwise", "layerscale_init",
    "rope_rescale", "rope_shift", "rope_jitter",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Teachers:
    """All teachers of a run.

    by_name: what the step needs of each. variables: weights of the in-graph ones. hosts: the host ones.
    chains: {teacher: {"adapters", "statistics"}} and chain_headers: for teachers that were themselves distilled, the
    way back to their own teachers.
    """

    by_name: dict[str, Teacher]
    variables: dict[str, Any]
    hosts: dict[str, HostTeacher]
    chains: dict[str, dict]
    chain_headers: dict[str, dict]


def describe_teachers(config: ConfigDict, mesh: Mesh | None = None) -> dict[str, Teacher]:
    """The teachers as configured, without weights: enough for shapes and parameter counts. Checkpoints are not looked
    at; host teachers are opened and a feature cache is read, because only they know their widths.

    Raises:
      ValueError: as `load_teachers`, but for checkpoints.
    """
    cache, teachers = open_cache(config), {}
    for name, entry in config.teachers.items():
        if cache is not None and name in cache.teachers:
            teachers[name] = _teacher(entry, cache.teachers[name], None)
        elif entry.kind == "encoder":
            module, spec = _frozen_module(config, name, mesh), zoo.spec(entry.model, **entry.overrides)
            check_sides(f"teachers.{name}", spec, entry.resolutions)
            teachers[name] = _teacher(entry, _teacher_spec(name, entry, spec, "not loaded"), module)
        else:
            teachers[name] = _teacher(entry, _open_host(name, entry)[1], None)
    return _require_teachers(teachers)


def abstract_variables(entry: ConfigDict) -> Any:
    """The variables of an in-graph teacher as `load_teachers` stores them, as shapes and types."""
    dtype, side = jnp.dtype(entry.dtype), entry.resolutions[0]
    module = zoo.build(entry.model, dtype=dtype, **entry.overrides)
    images = jnp.zeros((1, side, side, 3))
    return jax.eval_shape(lambda key: _in_compute_type(module.init(key, images), dtype), jax.random.key(0))


def _frozen_module(config: ConfigDict, name: str, mesh: Mesh | None, overrides: Mapping | None = None) -> nn.Module:
    """The encoder of teacher `name`, with the kernels of these devices."""
    entry = config.teachers[name]
    fields = {} if mesh is None else kernels.model_fields(config.compute, mesh, entry.model, frozen=True)
    overrides = entry.overrides if overrides is None else overrides
    return zoo.build(entry.model, **{**fields, "dtype": jnp.dtype(entry.dtype), **overrides})


def _in_compute_type(variables: Any, dtype: Any) -> Any:
    """Exact: kernels are cast to the compute type at every use anyway."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x.astype(dtype) if getattr(path[-1], "key", "") == "kernel" else x, variables
    )


def _open_host(name: str, entry: ConfigDict) -> tuple[HostTeacher, TeacherSpec]:
    if entry.kind != "host":
        raise ValueError(f"teachers.{name}.kind is {entry.kind!r}: use 'encoder' or 'host'")
    host = load_host_teacher(entry.factory, **entry.kwargs, resolution=entry.resolutions[0])
    spec = dataclasses.replace(host.spec, name=name, fingerprint=_with_token(host.spec.fingerprint, entry))
    return host, spec


def _require_teachers(teachers: dict[str, Teacher]) -> dict[str, Teacher]:
    if not teachers:
        raise ValueError("config.teachers is empty: a run needs at least one teacher")
    return teachers


def load_teachers(config: ConfigDict, mesh: Mesh) -> Teachers:
    """Loads every teacher's weights, frozen and placed on the mesh. Of one whose features are in the config's feature
    cache, nothing is loaded: neither checkpoint nor package needs to be there.

    Raises:
      ValueError, FileNotFoundError: a checkpoint is missing, is another model, or a field is wrong.
    """
    loaded = Teachers({}, {}, {}, {}, {})
    cache = open_cache(config)
    for name, entry in config.teachers.items():
        if cache is not None and name in cache.teachers:
            loaded.by_name[name] = _teacher(entry, cache.teachers[name], None)
            if chain := cache.chain(name):
                loaded.chain_headers[name], loaded.chains[name] = chain[0], unflatten_dict(chain[1], sep="/")
        elif entry.kind == "encoder":
            _load_encoder_teacher(loaded, name, config, mesh)
        else:
            loaded.hosts[name], spec = _open_host(name, entry)
            loaded.by_name[name] = _teacher(entry, spec, None)
    _require_teachers(loaded.by_name)
    return loaded


def _load_encoder_teacher(loaded: Teachers, name: str, config: ConfigDict, mesh: Mesh) -> None:
    entry = config.teachers[name]
    if not entry.checkpoint:
        raise ValueError(f"teachers.{name}.checkpoint is empty: give --config.teachers.{name}.checkpoint=DIR")
    dtype = jnp.dtype(entry.dtype)
    if entry.checkpoint == RANDOM:
        LOGGER.warning("teacher %r has random weights: good for a smoke test only", name)
        spec, module = zoo.spec(entry.model, **entry.overrides), _frozen_module(config, name, mesh)
        side, plain = entry.resolutions[0], zoo.build(entry.model, dtype=dtype, **entry.overrides)
        variables = jax.jit(plain.init)(jax.random.key(sum(map(ord, name))), jnp.zeros((1, side, side, 3)))
    else:
        encoder = encoders.load_encoder(entry.checkpoint, entry.student or None, dtype=dtype, mesh=mesh)
        if encoder.name != entry.model:
            raise ValueError(
                f"teachers.{name}.model is {entry.model!r}, but {entry.checkpoint} holds {encoder.name!r}"
            )
        overrides = _overrides(name, entry, encoder)
        spec, module = zoo.spec(encoder.name, **overrides), _frozen_module(config, name, mesh, overrides)
        spec, variables = dataclasses.replace(spec, mean=encoder.mean, std=encoder.std), encoder.variables
        if encoder.manifest.get("adapters"):
            statistics = encoders.load_statistics(entry.checkpoint)
            loaded.chains[name] = {
                "adapters": encoders.load_adapters(entry.checkpoint, entry.student or None),
                "statistics": {k: s.arrays() for k, s in statistics.items()},
            }
            loaded.chain_headers[name] = {
                "adapters": encoder.manifest["adapters"],
                "statistics": {k: s.header() for k, s in statistics.items()},
            }
    check_sides(f"teachers.{name}", spec, entry.resolutions)
    # Another choice of outputs makes other features of the same weights.
    usual = zoo.build(entry.model)
    chosen = {k: v for k, v in entry.overrides.items() if k in OUTPUT_FIELDS and v != getattr(usual, k)}
    weights = "+".join([fingerprint(variables), *(f"{k}={v}" for k, v in sorted(chosen.items()))])
    variables = kernels.in_kernel_order(module, _in_compute_type(variables, dtype))
    loaded.variables[name] = jax.device_put(variables, shardings(variables, mesh))
    loaded.by_name[name] = _teacher(entry, _teacher_spec(name, entry, spec, weights), module)


def check_sides(field: str, spec: zoo.EncoderSpec, sides: Sequence[int]) -> None:
    """Raises ValueError, naming the nearest that fit, when the encoder cannot take squares of one of these sides."""
    patch = spec.patch_size
    # A native size that does not divide (SigLIP's 384 at patch 14) is cut off as published.
    if unfit := [side for side in sides if side % patch and side != spec.resolution]:
        nearest = sorted({max(side // patch + up, 1) * patch for side in unfit for up in (0, 1)})
        raise ValueError(
            f"{field} ({spec.name}) takes sides that are multiples of {patch} pixels, not {unfit}; nearest: {nearest}"
        )


def _overrides(name: str, entry: ConfigDict, encoder: encoders.LoadedEncoder) -> dict:
    """How the checkpoint's encoder was built, with the outputs that the config chooses.

    Raises:
      ValueError: the config changes more than the outputs, which the checkpoint's weights would not fit.
    """
    wanted = encoders.hashable(entry.overrides.to_dict())
    for field, value in wanted.items():
        held = getattr(encoder.module, field)
        if field not in FREE_OVERRIDES and value != held:
            raise ValueError(
                f"teachers.{name}.overrides.{field} is {value!r}, but {entry.checkpoint} holds an encoder with {held!r}"
            )
    return {**encoder.overrides, **wanted}


def _with_token(weights: str, entry: ConfigDict) -> str:
    return weights if entry.class_token == "native" else f"{weights}+{entry.class_token}"


def _teacher_spec(name: str, entry: ConfigDict, spec: zoo.EncoderSpec, weights: str) -> TeacherSpec:
    digest = teacher_fingerprint(weights, {"class_token": entry.class_token}, spec.mean, spec.std)
    return TeacherSpec(
        name, spec.cls_dim, spec.patch_dim, spec.patch_size, entry.resolutions[0], spec.mean, spec.std, digest
    )


def _teacher(entry: ConfigDict, spec: TeacherSpec, module: Any) -> Teacher:
    return Teacher(spec, entry.class_token, module, entry.class_weight, entry.patch_weight)


def make_students(
    config: ConfigDict, teachers: Mapping[str, Teacher], mesh: Mesh | None = None
) -> dict[str, Student]:
    """Every student with its adapters, its optimiser and the kernels of the mesh's devices; no arrays yet.

    Raises:
      ValueError: no student, or one that the zoo does not know.
    """
    if not config.students:
        raise ValueError("config.students is empty: a run needs at least one student")
    students = {}
    for name, entry in config.students.items():
        spec = zoo.spec(entry.model, **entry.overrides)
        dtype = jnp.dtype(entry.dtype)
        fields = {} if mesh is None else kernels.model_fields(config.compute, mesh, entry.model, frozen=False)
        students[name] = Student(
            module=zoo.build(entry.model, **{**fields, "dtype": dtype, "remat": entry.remat, **entry.overrides}),
            adapters=AdapterBank(
                config.adapter.hidden_dim, {t: teacher.out_dims for t, teacher in teachers.items()},
                config.adapter.eps, dtype,
            ),
            optimizer=make_optimizer(
                config.optimizer, config.batch_size, config.total_steps, spike_factor=config.faults.spike_factor
            ),
            mean=spec.mean,
            std=spec.std,
        )
    return students


def fresh_state(config: ConfigDict, students: Mapping[str, Student]) -> dict:
    """{"step": int32 [], "students": {name: what `Student.init` gives}}, before any `init_from`. To be jitted."""
    key, side = jax.random.key(config.seed), config.student_resolutions[0]
    # every student starts from the same key: a family trains like its members alone
    fresh = {name: student.init(key, side) for name, student in students.items()}
    return {"step": jnp.zeros((), jnp.int32), "students": fresh}


def init_state(config: ConfigDict, students: Mapping[str, Student], mesh: Mesh) -> dict:
    """The state at step 0, created straight in its shardings, with `init_from` applied."""
    init = functools.partial(fresh_state, config, students)
    state = jax.jit(init, out_shardings=shardings(jax.eval_shape(init), mesh))()
    for name, entry in config.students.items():
        if entry.init_from:
            state["students"][name] = _initialise_from(name, entry, state["students"][name])
    return state


def _initialise_from(name: str, entry: ConfigDict, student: dict) -> dict:
    """Backbone (and adapters, where the source has them) from another run or an official file; fresh optimiser."""
    path = epath.Path(entry.init_from)
    backbone = {"params": student["params"]["backbone"], "buffers": student["buffers"]}
    if weight_files.is_weights(entry.init_from):
        if os.path.isdir(entry.init_from):
            raise ValueError(
                f"students.{name}.init_from: {path} is a folder of weights; name the file in it, or convert it first "
                "(convert/teachers_to_orbax.py), which checks its config.json as well"
            )
        with weight_files.open_weights(entry.init_from) as weights:
            described = weight_files.read_description(weights) or {"model": entry.model}
            if described["model"] != entry.model:
                raise ValueError(f"students.{name}.init_from: {path} holds {described['model']!r}, not {entry.model!r}")
            try:
                variables = interchange.from_state_dict(entry.model, weights, **entry.overrides)
            except interchange.InterchangeError as error:
                raise ValueError(f"students.{name}.init_from: {path}: {error}") from None
            weights.require_finite()
        variables = {"params": variables["params"], "buffers": variables.get("buffers", {})}
        variables = jax.tree.map(lambda new, old: jax.device_put(jnp.asarray(new), old.sharding), variables, backbone)
        adapters = student["params"]["adapters"]
        LOGGER.info("students.%s: backbone from %s, fresh adapters", name, path)
    else:
        step = checkpoints.step_directory(path)
        manifest = checkpoints.read_manifest(step)
        source = name if name in manifest["students"] else encoders.pick_student(manifest, None, path)
        if manifest["students"][source]["model"] != entry.model:
            held = manifest["students"][source]["model"]
            raise ValueError(f"students.{name}.init_from: {path} holds {held!r}, not {entry.model!r}")
        variables = checkpoints.restore_item(step, f"{source}.backbone", backbone)
        adapters = student["params"]["adapters"]
        take_adapters = entry.init_adapters and "adapters" in manifest["students"][source]
        if take_adapters:
            try:
                adapters = checkpoints.restore_item(step, f"{source}.adapters", adapters)
            except integrity.CorruptCheckpoint:
                raise
            except (ValueError, FileNotFoundError) as error:
                raise ValueError(
                    f"students.{name}.init_from: the adapters in {path} do not fit this run's teachers and "
                    f"adapter.hidden_dim; --config.students.{name}.init_adapters=False starts fresh ones"
                ) from error
        LOGGER.info("students.%s: backbone%s from %s", name, " and adapters" * take_adapters, step)
    return {
        "params": {"backbone": variables["params"], "adapters": adapters},
        "buffers": variables["buffers"],
        "optimizer": student["optimizer"],
    }


def find_statistics(config: ConfigDict, teachers: Mapping[str, Teacher]) -> dict[str, Statistics]:
    """Reads the statistics a config names and refuses those of other teachers.

    Raises:
      ValueError: not exactly one of `statistics` and `statistics_from` is set, or a teacher's are missing.
      StatisticsMismatch: they were measured on something else.
    """
    if bool(config.statistics) == bool(config.statistics_from):
        raise ValueError(
            "set exactly one of --config.statistics=FOLDER (measured for this run by launch/measure_statistics.py) and "
            "--config.statistics_from=FOLDER_OR_CHECKPOINT (another run's)"
        )
    declared = bool(config.statistics_from)
    folder = epath.Path(config.statistics_from or config.statistics)
    if declared and not any(folder.glob("*.safetensors")):
        found = encoders.load_statistics(folder)
    else:
        found = {name: Statistics.load(folder / f"{name}.safetensors") for name in teachers}
    for name, teacher in teachers.items():
        if name not in found:
            raise ValueError(f"{folder} has statistics of {sorted(found)}, none of teacher {name!r}")
        found[name].require(provenance(config, name, teacher), declared=declared, source=str(folder))
        missing = set(teacher.out_dims) - set(found[name].mean)
        if missing:
            raise ValueError(f"statistics of {name!r} in {folder} lack {sorted(missing)} tokens: measure them again")
    return {name: found[name] for name in teachers}


def provenance(config: ConfigDict, name: str, teacher: Teacher) -> Provenance:
    """What statistics measured for this config would say of themselves."""
    sources = ", ".join(f"{k}: {s.kind} {s.path} x {s.weight}" for k, s in sorted(config.data.sources.items()))
    recipe = f"{sources}; crop {tuple(config.data.crop_scale)} to {config.data.image_size}"
    return Provenance.of(teacher.spec, tuple(config.teachers[name].resolutions), recipe)


def manifest(config: ConfigDict, teachers: Teachers, statistics: Mapping[str, Statistics]) -> dict:
    """What a person, or a loader, needs to know about this run's checkpoints."""
    students = {}
    for name, entry in config.students.items():
        spec = zoo.spec(entry.model, **entry.overrides)
        students[name] = {
            "model": entry.model,
            "overrides": entry.overrides.to_dict(),
            "resolution": max(config.student_resolutions),
            "resolutions": list(config.student_resolutions),
            "mean": list(spec.mean),
            "std": list(spec.std),
            "patch_size": spec.patch_size,
            "cls_dim": spec.cls_dim,
            "patch_dim": spec.patch_dim,
            "num_storage_tokens": spec.num_storage_tokens,
            "token_layout": checkpoints.TOKEN_LAYOUT,
            "adapters": {
                "hidden_dim": config.adapter.hidden_dim,
                "eps": config.adapter.eps,
                "out_dims": {t: teacher.out_dims for t, teacher in teachers.by_name.items()},
            },
        }
    return {
        "students": students,
        "teachers": {
            t: dataclasses.asdict(v.spec) | {"class_token": v.class_token} for t, v in teachers.by_name.items()
        },
        "statistics": {name: s.header() for name, s in statistics.items()},
        "chain": teachers.chain_headers,
        "config": config.to_dict(),
        "versions": checkpoints.versions(),
    }
