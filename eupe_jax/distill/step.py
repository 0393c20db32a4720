"""The distillation step: one for all stages, one or several students from one teacher pass (EUPE Fig. 3).

image -> augment -> one view per model -> frozen teachers -> normalised targets
                                       -> students -> adapters -> losses -> gradients -> AdamW
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from eupe_jax.distill.adapters import AdapterBank
from eupe_jax.distill.losses import cosine_loss, patch_losses
from eupe_jax.distill.normalization import normalize_tokens
from eupe_jax.distill.resolutions import Resolutions
from eupe_jax.distill.teachers import Teacher, view

ROPE_STREAM = 0x209E  # keeps these draws apart from every other use of the seed


@dataclass(frozen=True)
class Loss:
    """Weights of EUPE Eq. 4-6, and the smooth-L1 beta that the paper leaves open."""

    patch_cosine: float = 0.9
    patch_smooth_l1: float = 0.1
    smooth_l1_beta: float = 1.0


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
        variables = self.module.init(backbone_key, images)
        # shapes are all that adapters need: tracing the backbone is seconds, compiling it for nothing is many more
        tokens = jax.tree.map(jnp.zeros_like, jax.eval_shape(self.module.apply, variables, images))
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
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    shuffle_targets: bool = False,
) -> Callable:
    """The step function for one choice of resolutions, to be jitted by the caller.

    Args:
      augment: `augment(step, images_BxSxSx3)` on images in [0, 1]; None where the batch brings augmented pixels.
      shuffle_targets: a control, not a recipe: every image gets the targets of its neighbour in the batch.

    Returns:
      `step(state, batch, teacher_variables, statistics) -> (state, metrics)` with
        state: {"step": int32 [], "students": {name: what Student.init gives}};
        batch: {"image": uint8 [B, S, S, 3], optionally "features": {host teacher: {"cls", "patches"}}};
        teacher_variables: {in-graph teacher: variables};
        statistics: {teacher: {"mean": {kind: [D]}, "std": {kind: [D]}}};
        metrics: {"STUDENT/loss", "STUDENT/grad_norm", "STUDENT/TEACHER/PART"}: float32 [].
    """
    teacher_sides = dict(resolutions.teachers)

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

    def step(state: dict, batch: Mapping, teacher_variables: Mapping, statistics: Mapping) -> tuple[dict, dict]:
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        images = batch["image"].astype(jnp.float32) / 255.0
        if augment is not None:
            images = augment(state["step"], images)
        targets = targets_of(images, batch, teacher_variables, statistics)
        # The same key for every student: a student of a family trains exactly as it would alone.
        rope_key = jax.random.fold_in(key, ROPE_STREAM)

        new_students, metrics = {}, {}
        for name, student in students.items():
            old = state["students"][name]

            def loss_fn(params: Mapping, student: Student = student, buffers: Mapping = old["buffers"]) -> tuple:
                predictions = student.predict(params, buffers, images, resolutions.student, rope_key)
                return distillation_loss(predictions, targets, teachers, loss)

            (value, parts), gradients = jax.value_and_grad(loss_fn, has_aux=True)(old["params"])
            updates, optimizer = student.optimizer.update(gradients, old["optimizer"], old["params"])
            new_students[name] = {
                "params": optax.apply_updates(old["params"], updates),
                "buffers": old["buffers"],
                "optimizer": optimizer,
            }
            metrics[f"{name}/loss"] = value
            metrics[f"{name}/grad_norm"] = optax.tree.norm(gradients)
            metrics |= {f"{name}/{part}": v for part, v in parts.items()}
        return {"step": state["step"] + 1, "students": new_students}, metrics

    return step
