"""The work of one training step, counted from the config: what MFU divides by."""

from collections.abc import Mapping
from dataclasses import dataclass

from ml_collections import ConfigDict

from eupe_jax.distill.resolutions import Resolutions
from eupe_jax.distill.teachers import Teacher
from eupe_jax.models import zoo
from eupe_jax.models.flops import forward_flops, linear_flops
from eupe_jax.training.assemble import describe_teachers

BACKWARD = 3  # forward, and twice that for the gradients of inputs and weights


@dataclass(frozen=True)
class StepFlops:
    """FLOPs for one image (2 for every multiply-add; matrix products, convolutions and attention only).

    Attributes:
      teachers: forward pass of every teacher that runs on the device; 0 for those whose features arrive in the batch.
      students: forward pass of every student.
      adapters: forward pass of every student's adapters.
    """

    teachers: dict[str, int]
    students: dict[str, int]
    adapters: dict[str, int]

    @property
    def trained(self) -> int:
        """Forward pass of what gets gradients."""
        return sum(self.students.values()) + sum(self.adapters.values())

    @property
    def per_image(self) -> int:
        """The whole step: gradients cost twice the forward pass; recomputation is no work."""
        return sum(self.teachers.values()) + BACKWARD * self.trained


def step_flops(config: ConfigDict, chosen: Resolutions, teachers: Mapping[str, Teacher] | None = None) -> StepFlops:
    """FLOPs of one image of a step at these resolutions.

    teachers: as loaded; None: as the config describes them (host teachers are opened).

    Raises:
      ValueError: as `describe_teachers`, or an encoder nobody can count.
    """
    teachers = describe_teachers(config) if teachers is None else teachers
    sides = dict(chosen.teachers)
    students, adapters = {}, {}
    for name, entry in config.students.items():
        spec, module = zoo.spec(entry.model, **entry.overrides), zoo.build(entry.model, **entry.overrides)
        students[name] = forward_flops(module, chosen.student)
        inputs = {"cls": (1, spec.cls_dim), "patches": ((chosen.student // spec.patch_size) ** 2, spec.patch_dim)}
        adapters[name] = sum(
            linear_flops(*inputs[kind], config.adapter.hidden_dim, width)
            for teacher in teachers.values()
            for kind, width in teacher.out_dims.items()
        )
    return StepFlops(
        {n: 0 if t.is_host else forward_flops(t.module, sides[n]) for n, t in teachers.items()}, students, adapters
    )
