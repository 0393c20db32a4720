"""Which was first: where in a step the first value appears that is not finite.

A step is taken apart here, in the order in which it is computed, and every part runs once more and is watched (see
finiteness.py): what the batch brings, the teachers one by one, the students one by one with their gradients. It takes
minutes of compiling for large models, and happens at most once in a run's life, or when a person asks.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from eupe_jax.distill import resolutions
from eupe_jax.distill.normalization import normalize_tokens
from eupe_jax.distill.step import ROPE_STREAM, Student, distillation_loss
from eupe_jax.distill.teachers import Teacher
from eupe_jax.sharding.activations import pinned
from eupe_jax.sharding.mesh import BATCH_AXES, replicated
from eupe_jax.sharding.rules import path_name, shardings
from eupe_jax.training import assemble, pipeline
from eupe_jax.training.finiteness import FINITE, NAMES, Watched, kinds_along, worst

TOKENS = {"cls": "class tokens", "patches": "patch tokens"}
STACKED = re.compile(r"(^|/)(blocks|stages_\d+)/")  # parameters of repeated blocks: the first axis is the block
NAMED = 8  # of many, so many are named


def first_not_finite(
    config: ConfigDict,
    state: Mapping,
    step: int,
    batch: Mapping,
    teachers: assemble.Teachers,
    statistics: Mapping,
    mesh: Mesh,
) -> str:
    """Words for a person: the first of input, teachers and students that is not finite in a step, and where in it.

    All hosts of a run must call it alike, with what the step itself takes; nothing of it is changed or donated.

    Args:
      state: before the step; its own counter is not looked at.
      step: which it is, from 0.
      statistics: {teacher: {"mean": {kind: [D]}, "std": {kind: [D]}}}.
    """
    with pinned(mesh):
        found = next(_Step(config, state, step, batch, teachers, statistics, mesh, watch=True).findings(), None)
    return found or (
        f"every value of step {step} is finite when it is computed again: if its gradients were too large "
        "(faults.spike_factor), that is all; if they were not finite, suspect a device or its memory"
    )


def gradient_norms(
    config: ConfigDict,
    state: Mapping,
    step: int,
    batch: Mapping,
    teachers: assemble.Teachers,
    statistics: Mapping,
    mesh: Mesh,
) -> dict[str, dict[str, float]]:
    """{student: {parameter: norm of its gradient}} of a step, before clipping; arguments as `first_not_finite`'s."""
    with pinned(mesh):
        taken = _Step(config, state, step, batch, teachers, statistics, mesh, watch=False)
        for _ in taken.findings():
            pass
        return taken.norms()


class _Step:
    """One step, taken apart; see `first_not_finite`. `watch`: whether places are looked for, not only parts."""

    def __init__(
        self,
        config: ConfigDict,
        state: Mapping,
        step: int,
        batch: Mapping,
        teachers: assemble.Teachers,
        statistics: Mapping,
        mesh: Mesh,
        *,
        watch: bool,
    ) -> None:
        self._config, self._state, self._number, self._batch = config, state, step, batch
        self._teachers, self._statistics, self._mesh = teachers, statistics, mesh
        sizes = pipeline.teacher_sizes(config)
        self._chosen = resolutions.choose(config.seed, step, config.student_resolutions, sizes)
        self._students = assemble.make_students(config, teachers.by_name, mesh)
        self._augment = pipeline.device_augment(config, teachers.by_name)
        self._watch_places = watch
        self._compiled: dict[str, tuple[Watched | None, Any]] = {}  # once for all micro-batches
        self._gradients: dict[str, Any] = {}  # of each student, summed over micro-batches

    def findings(self) -> Iterator[str]:
        """What is not finite, in the order of computation."""
        yield from self._weights()
        for part in range(self._config.accumulate):
            yield from self._part(part)

    def _weights(self) -> Iterator[str]:
        for name, variables in self._teachers.variables.items():
            if names := bad_leaves(variables, self._mesh):
                yield f"teacher {name!r}: its weights are not finite: {in_words(names)}"
        for name, arrays in self._statistics.items():
            if names := bad_leaves(arrays, self._mesh):
                yield f"statistics of teacher {name!r}: not finite: {in_words(names)}"
        for name, student in self._state["students"].items():
            held = {"params": student["params"], "buffers": student["buffers"]}
            if names := bad_leaves(held, self._mesh):
                yield f"student {name!r}: its parameters are not finite before the step: {in_words(names)}"

    def _part(self, number: int) -> Iterator[str]:
        """Of the micro-batch that has the images at `number`, `number` + parts, ...: as distill/step.py cuts them."""
        parts = self._config.accumulate
        part = {k: v for k, v in self._batch.items() if k in ("image", "features")}
        part["position"] = jnp.arange(len(self._batch["image"]))
        if parts > 1:
            sharding = NamedSharding(self._mesh, PartitionSpec(BATCH_AXES))
            part = jax.jit(lambda b: jax.tree.map(lambda x: x[number::parts], b), out_shardings=sharding)(part)
        places = np.arange(number, len(self._batch["image"]), parts)

        for name, tokens in part.get("features", {}).items():
            if words := self._images(tokens, places):
                kind = "host teacher" if name in self._teachers.hosts else "feature cache"
                yield f"teacher {name!r}: its {words}, as the batch brings them ({kind})"
        images, _ = self._watch("input", self._pixels, part["image"], part["position"])
        if words := self._images({"input images": images}, places):
            yield f"{words}, after augmentation"

        targets = {}
        for name, teacher in self._teachers.by_name.items():
            taken = part["features"][name] if teacher.is_host else self._teachers.variables[name]

            def run(taken: Mapping, images: jax.Array, name: str = name, teacher: Teacher = teacher) -> dict:
                if teacher.is_host:
                    return teacher.targets(taken)
                return teacher(taken, images, dict(self._chosen.teachers)[name])

            tokens, place = self._watch(f"teacher {name}", run, taken, images)
            if words := self._images(tokens, places):
                yield f"teacher {name!r}: its {words}{_first_in(place)}"
            normalised = jax.jit(normalize_tokens)
            targets[name] = normalised(tokens, self._statistics[name])
            if words := self._images(targets[name], places):
                yield f"teacher {name!r}: its {words}, once normalised by its statistics"
        if self._config.loss.shuffle_targets:
            targets = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), targets)
        for name, student in self._students.items():
            yield from self._student(name, student, images, targets)

    def _student(self, name: str, student: Student, images: jax.Array, targets: Mapping) -> Iterator[str]:
        teachers, loss = self._teachers.by_name, pipeline.make_loss(self._config)
        scale = dict(loss.pair_scale).get(str(self._chosen), 1.0)

        def loss_of(params: Mapping, buffers: Mapping, images: jax.Array, targets: Mapping, step: jax.Array) -> tuple:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self._config.seed), step), ROPE_STREAM)
            predictions = student.predict(params, buffers, images, self._chosen.student, key)
            value, parts = distillation_loss(predictions, targets, teachers, loss)
            return scale * value, {"predictions": predictions, "loss": {"loss": value} | parts}

        def gradients_of(*given: Any) -> tuple:
            gradients, found = jax.grad(loss_of, has_aux=True)(*given)
            return jax.lax.with_sharding_constraint(gradients, placed), found  # nobody holds a whole one

        held = self._state["students"][name]
        placed = shardings(held["params"], self._mesh)
        given = (held["params"], held["buffers"], images, targets, jnp.int32(self._number))
        (gradients, found), place = self._watch(f"student {name}", gradients_of, *given)
        for what, tree in (("the tokens that its adapters give", found["predictions"]), ("its loss", found["loss"])):
            if names := bad_leaves(tree, self._mesh):
                yield f"student {name!r}: {what} ({in_words(names)}){_first_in(place)}"
        if names := bad_leaves(gradients, self._mesh):
            yield f"student {name!r}: gradients of {in_words(names)}{_first_in(place)}"
        before = self._gradients.get(name)
        self._gradients[name] = gradients if before is None else jax.tree.map(jnp.add, before, gradients)
        norms = self.norms()[name]
        if not np.isfinite(np.linalg.norm(np.float32(list(norms.values())))):
            largest = sorted(norms, key=norms.get, reverse=True)
            yield f"student {name!r}: the norm of its finite gradients is not; the largest are of {in_words(largest)}"

    def _pixels(self, images: jax.Array, positions: jax.Array) -> jax.Array:
        images = images.astype(jnp.float32) / 255.0
        return images if self._augment is None else self._augment(jnp.int32(self._number), images, positions)

    def _watch(self, part: str, function: Any, *args: Any) -> tuple[Any, tuple | None]:
        """What `function` gives, and its first place to blame."""
        if part not in self._compiled:
            watched = Watched(function) if self._watch_places else None
            self._compiled[part] = (watched, jax.jit(watched or function))
        watched, run = self._compiled[part]
        if watched is None:
            return run(*args), None
        outputs, flags = run(*args)
        return outputs, watched.first(self._fetch(flags))

    def norms(self) -> dict[str, dict[str, float]]:
        """Of the gradients of the micro-batches seen."""
        found = {}
        for name, gradients in self._gradients.items():
            mean = jax.tree.map(lambda x: x / self._config.accumulate, gradients)
            found[name] = {path: float(norm) for path, norm in self._fetch(jax.jit(leaf_norms)(mean)).items()}
        return found

    def _images(self, tokens: Mapping[str, jax.Array], places: np.ndarray) -> str:
        """Which tokens of which images are not finite, as a phrase; empty where all are finite."""
        kinds = self._fetch({kind: kinds_along(x, 1) for kind, x in tokens.items()})
        for kind, bad in kinds.items():
            if bad.any():
                at = places[np.flatnonzero(bad)].tolist()
                records = self._fetch(self._batch["index"])[at].tolist() if "index" in self._batch else []
                return (
                    f"{TOKENS.get(kind, kind)} are {NAMES[bad.max()]} for {len(at)} of {len(places)} images: "
                    f"places {in_words(at)} of the batch" + (f", records {in_words(records)}" if records else "")
                )
        return ""

    def _fetch(self, tree: Any) -> Any:
        """Whole on this host, wherever its parts lie."""
        return jax.device_get(jax.jit(lambda x: x, out_shardings=replicated(self._mesh))(tree))


def bad_leaves(tree: Any, mesh: Mesh) -> list[str]:
    """The paths of the leaves that are not finite, with the blocks of stacked ones."""
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    axes = [int(bool(STACKED.search(path))) for path in paths]

    def kinds(leaves: Sequence[jax.Array]) -> list[jax.Array]:
        return [kinds_along(x, n) if n else worst(x) for x, n in zip(leaves, axes, strict=True)]

    found = jax.device_get(jax.jit(kinds, out_shardings=replicated(mesh))(jax.tree.leaves(tree)))
    names = []
    for path, bad in zip(paths, found, strict=True):
        if np.any(bad != FINITE):
            layers = f", layers {in_words(np.flatnonzero(bad).tolist())} of {bad.size}" if bad.ndim else ""
            names.append(f"{path} ({NAMES[bad.max()]}{layers})")
    return names


def leaf_norms(tree: Any) -> dict[str, jax.Array]:
    """{path: float32 []}: the norm of every leaf."""
    return {path_name(path): optax.tree.norm(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def in_words(items: Sequence) -> str:
    """The first few, and how many more there are."""
    more = f" and {len(items) - NAMED} more" if len(items) > NAMED else ""
    return ", ".join(map(str, items[:NAMED])) + more


def _first_in(found: tuple | None) -> str:
    if found is None:
        return ""
    place, kind = found
    return f"; first {kind} {place}"
