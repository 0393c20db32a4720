"""The distillation step: one for all stages, one or several students from one teacher pass (EUPE Fig. 3).

image -> augment -> one view per model -> frozen teachers -> normalised targets
                                       -> students -> adapters -> losses -> gradients -> AdamW
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eupe_jax.distill.adapters import AdapterBank
from eupe_jax.distill.losses import cosine_loss, patch_losses
from eupe_jax.distill.normalization import normalize_tokens
from eupe_jax.distill.resolutions import Resolutions
from eupe_jax.distill.spikes import is_spike
from eupe_jax.distill.teachers import Teacher, view
from eupe_jax.sharding.activations import pinned
from eupe_jax.sharding.mesh import BATCH_AXES
from eupe_jax.sharding.rules import shardings

ROPE_STREAM = 0x209E  # keeps these draws apart from every other use of the seed


@dataclass(frozen=True)
class Loss:
    """Weights of EUPE Eq. 4-6, and the smooth-L1 beta that the paper leaves open.

    pair_scale: (pair of resolutions by name, factor of its loss) pairs; 1 for those that are not named.
    """

    patch_cosine: float = 0.9
    patch_smooth_l1: float = 0.1
    smooth_l1_beta: float = 1.0
    pair_scale: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Student:
    """A trainable backbone with its adapters, optimiser and pixel statistics."""

    module: nn.Module
    adapters: AdapterBank
    optimizer: optax.GradientTransformation
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def init(self, key: jax.Array, resolution: int) -> dict:
        """{"params": {"backbone", "adapters"}, "buffers", "optimizer"} for a fresh student."""
        backbone_key, adapter_key = jax.random.split(key)
        images = jnp.zeros((1, resolution, resolution, 3), jnp.float32)
        # weights do not depend on how attention is computed, and a kernel for a mesh would not take a single image
        module = self.module.clone(attention_fn=None) if getattr(self.module, "attention_fn", None) else self.module
        variables = module.init(backbone_key, images)
        # shapes are all that adapters need: tracing the backbone is seconds, compiling it for nothing is many more
        tokens = jax.tree.map(jnp.zeros_like, jax.eval_shape(module.apply, variables, images))
        params = {
            "backbone": variables["params"],
            "adapters": self.adapters.init(adapter_key, tokens).get("params", {}),
        }
        return {
            "params": params,
            "buffers": variables.get("buffers", {}),
            "optimizer": self.optimizer.init(params),
        }

    def predict(
        self, params: Mapping, buffers: Mapping, images_BxSxSx3: jax.Array, resolution: int, rope_key: jax.Array | None
    ) -> dict[str, dict[str, jax.Array]]:
        """Adapted tokens for every teacher from images in [0, 1]; `rope_key` switches train mode on."""
        x = view(images_BxSxSx3, resolution, self.mean, self.std)
        variables = {"params": params["backbone"], "buffers": buffers}
        if rope_key is None:
            tokens = self.module.apply(variables, x)
        else:
            tokens = self.module.apply(variables, x, train=True, rngs={"rope": rope_key})
        return self.adapters.apply({"params": params["adapters"]}, tokens)


def distillation_loss(
    predictions: Mapping[str, Mapping[str, jax.Array]],
    targets: Mapping[str, Mapping[str, jax.Array]],
    teachers: Mapping[str, Teacher],
    loss: Loss,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Summed loss over teachers and token kinds, and its unweighted parts as {"TEACHER/PART": []}."""
    total, parts = jnp.zeros((), jnp.float32), {}
    for name, target in targets.items():
        teacher, prediction = teachers[name], predictions[name]
        if "cls" in target:
            parts[f"{name}/cls_cosine"] = value = cosine_loss(prediction["cls"], target["cls"])
            total += teacher.class_weight * value
        patch = patch_losses(prediction["patches"], target["patches"], loss.smooth_l1_beta)
        parts |= {f"{name}/patch_{part}": value for part, value in patch.items()}
        weighted = loss.patch_cosine * patch["cosine"] + loss.patch_smooth_l1 * patch["smooth_l1"]
        total += teacher.patch_weight * weighted
    return total, parts


def make_step(
    students: Mapping[str, Student],
    teachers: Mapping[str, Teacher],
    resolutions: Resolutions,
    loss: Loss,
    *,
    seed: int,
    augment: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None,
    shuffle_targets: bool = False,
    accumulate: int = 1,
    per_pair: bool = False,
    spike_factor: float = 0.0,
    mesh: Mesh | None = None,
) -> Callable:
    """The step function for one choice of resolutions, to be jitted by the caller.

    Args:
      augment: `augment(step, images_BxSxSx3, positions_B)` on images in [0, 1] that stand at these places of the global
        batch; None where the batch brings augmented pixels.
      shuffle_targets: a control, not a recipe: every image gets the targets of its neighbour in the (micro-)batch.
      accumulate: micro-batches that the batch is cut into, one after the other through teachers and students. Losses
        are means over images, so the mean of their gradients is the gradient of the whole, within rounding.
      per_pair: log losses under the name of `resolutions` as well; the average of a run's steps then is one a pair.
      spike_factor: more than 0, and the students' optimisers keep a `spikes.average_norm`: a step whose gradient's norm
        is so many times that average is not applied either.
      mesh: devices the batch and the parameters are cut over; None on a single device.

    Returns:
      `step(state, batch, teacher_variables, statistics) -> (state, metrics)` with
        state: {"step": int32 [], "students": {name: what Student.init gives}};
        batch: {"image": uint8 [B, S, S, 3], optionally "features": {host teacher: {"cls", "patches"}}};
        teacher_variables: {in-graph teacher: variables};
        statistics: {teacher: {"mean": {kind: [D]}, "std": {kind: [D]}}};
        metrics: {"STUDENT/loss", "STUDENT/grad_norm", "STUDENT/skipped", "STUDENT/TEACHER/PART",
          "pair/RESOLUTIONS/STUDENT/loss" if `per_pair`}: float32 []. The pair's scale is in gradients, not in losses.

      A student whose loss or gradients are not finite keeps its parameters and its optimiser's moments ("skipped" is 1
      then); its learning rate goes on with the steps of the run, and the others of a family train on.
    """
    teacher_sides = dict(resolutions.teachers)
    scale = dict(loss.pair_scale).get(str(resolutions), 1.0)

    def targets_of(images: jax.Array, batch: Mapping, variables: Mapping, statistics: Mapping) -> dict:
        targets = {}
        for name, teacher in teachers.items():
            if teacher.is_host:
                tokens = teacher.targets(batch["features"][name])
            else:
                tokens = teacher(variables[name], images, teacher_sides[name])
            targets[name] = normalize_tokens(tokens, statistics[name])
        if shuffle_targets:
            targets = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), targets)
        return targets

    def loss_of(
        params: Mapping, student: Student, buffers: Mapping, images: jax.Array, targets: Mapping, rope_key: jax.Array
    ) -> tuple[jax.Array, dict]:
        predictions = student.predict(params, buffers, images, resolutions.student, rope_key)
        value, parts = distillation_loss(predictions, targets, teachers, loss)
        return scale * value, {"loss": value} | parts

    @pinned(mesh)
    def step(state: dict, batch: Mapping, teacher_variables: Mapping, statistics: Mapping) -> tuple[dict, dict]:
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        # The same key for every student: a student of a family trains exactly as it would alone.
        rope_key = jax.random.fold_in(key, ROPE_STREAM)
        params = {name: student["params"] for name, student in state["students"].items()}
        placed = None if mesh is None else shardings(state, mesh)["students"]

        def gradients_of(part: Mapping) -> tuple[dict, dict]:
            """Gradients of every student, cut as its parameters are, and metrics: means over one micro-batch."""
            images = part["image"].astype(jnp.float32) / 255.0
            if augment is not None:
                images = augment(state["step"], images, part["position"])
            targets = targets_of(images, part, teacher_variables, statistics)
            gradients, metrics = {}, {}
            for name, student in students.items():
                given = (student, state["students"][name]["buffers"], images, targets, rope_key)
                found, parts = jax.grad(loss_of, has_aux=True)(params[name], *given)
                if placed is not None:  # reduce-scattered at once: nobody holds a whole gradient
                    found = jax.lax.with_sharding_constraint(found, placed[name]["params"])
                gradients[name] = found
                metrics |= {f"{name}/{part}": value for part, value in parts.items()}
                if len(gradients) < len(students):  # one student after the other: memory for the activations of one
                    images, targets, gradients = jax.lax.optimization_barrier((images, targets, gradients))
            return gradients, metrics

        positions = jnp.arange(batch["image"].shape[0])
        whole = {k: v for k, v in batch.items() if k in ("image", "features")} | {"position": positions}
        gradients, metrics = _mean_over_parts(gradients_of, whole, accumulate, mesh)

        def is_sound(name: str, norm: jax.Array) -> jax.Array:
            finite = jnp.isfinite(norm) & jnp.isfinite(metrics[f"{name}/loss"])
            if not spike_factor:
                return finite
            return finite & ~is_spike(state["students"][name]["optimizer"], norm, spike_factor)

        new_students = {}
        for name, student in students.items():
            norm = optax.tree.norm(gradients[name])
            new_students[name] = _update(student, state["students"][name], gradients[name], is_sound(name, norm))
            metrics[f"{name}/grad_norm"] = norm
            metrics[f"{name}/skipped"] = 1.0 - is_sound(name, norm).astype(jnp.float32)
            if per_pair:
                metrics[f"pair/{resolutions}/{name}/loss"] = metrics[f"{name}/loss"]
        return {"step": state["step"] + 1, "students": new_students}, metrics

    return step


def _update(student: Student, old: Mapping, gradients: Any, sound: jax.Array) -> dict:
    """The student after one step of its optimiser, or as it was where it is not `sound`.

    Only the schedule counts every step, so that its rate is that of the run's step, for all students alike; Adam counts
    the gradients it has seen, which is what its bias correction needs.
    """
    updates, optimizer = student.optimizer.update(gradients, old["optimizer"], old["params"])
    new = {"params": optax.apply_updates(old["params"], updates), "optimizer": optimizer}
    kept = {name: old[name] for name in new}
    counts = lambda x: isinstance(x, optax.ScaleByScheduleState)  # noqa: E731
    chosen = jax.tree.map(lambda a, b: a if counts(a) else jnp.where(sound, a, b), new, kept, is_leaf=counts)
    return chosen | {"buffers": old["buffers"]}


def _mean_over_parts(function: Callable, batch: Any, parts: int, mesh: Mesh | None) -> Any:
    """The mean of `function` over `parts` equal parts of a batch [B, ...], taken one after the other.

    Part i has the images at i, i + parts, ...: every device finds an equal share of each among its own images.
    """
    if parts == 1:
        return function(batch)

    def cut(x_B: jax.Array) -> jax.Array:
        x = x_B.reshape(-1, parts, *x_B.shape[1:]).swapaxes(0, 1)
        if mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, BATCH_AXES)))

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(part)), None

    batches = jax.tree.map(cut, batch)
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], batches))
    total, _ = jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), batches)
    return jax.tree.map(lambda x: x / parts, total)
