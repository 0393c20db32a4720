"""Frozen teachers, as the distillation step sees them.

Two kinds, one interface. *In graph*: a Flax encoder that runs inside the jitted step. *Host*: any Python callable or
ONNX file run beside the input pipeline, whose features arrive in the batch (see host_teachers.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from eupe_jax.distill.teacher_spec import TeacherSpec
from eupe_jax.models.resize import resize

CLASS_TOKENS = ("native", "patch_mean", "none")


@dataclass(frozen=True)
class Teacher:
    """One frozen expert or proxy.

    Attributes:
      spec: widths, pixel statistics, fingerprint.
      class_token: what stands for the image as a whole. "native": the teacher's own; "patch_mean": the mean of its
        patch tokens; "none": no class loss (EUPE does not say what it used for PElang, which has no class token).
      module: the Flax encoder, or None for a host teacher.
      class_weight, patch_weight: loss weights, 1 in EUPE (Eq. 7 varies the patch weight of one teacher).
    """

    spec: TeacherSpec
    class_token: str = "native"
    module: nn.Module | None = None
    class_weight: float = 1.0
    patch_weight: float = 1.0

    def __post_init__(self) -> None:
        name = self.spec.name
        if self.class_token not in CLASS_TOKENS:
            raise ValueError(f"teachers.{name}.class_token is {self.class_token!r}: use one of {CLASS_TOKENS}")
        if self.class_token == "native" and self.spec.cls_dim is None:
            raise ValueError(
                f"teachers.{name}.class_token is 'native', but this teacher has no class token: use 'none' "
                "(no class loss) or 'patch_mean'"
            )

    @property
    def is_host(self) -> bool:
        """Whether it runs beside the input pipeline, its features coming with the batch."""
        return self.module is None

    @property
    def out_dims(self) -> dict[str, int]:
        """Widths of the tokens that a student has to match: {"cls": Dc, "patches": Dp}."""
        cls = {"native": self.spec.cls_dim, "patch_mean": self.spec.patch_dim, "none": None}[self.class_token]
        return ({} if cls is None else {"cls": cls}) | {"patches": self.spec.patch_dim}

    def targets(self, tokens: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """What is distilled, from the raw tokens: {"cls": [B, Dc], "patches": [B, h, w, Dp]}, float32, no gradient."""
        tokens = {k: jax.lax.stop_gradient(v).astype(jnp.float32) for k, v in tokens.items() if k in ("cls", "patches")}
        if self.class_token == "patch_mean":
            tokens["cls"] = jnp.mean(tokens["patches"], axis=(1, 2))
        return {kind: tokens[kind] for kind in self.out_dims}

    def __call__(self, variables: Mapping, images_BxSxSx3: jax.Array, resolution: int) -> dict[str, jax.Array]:
        """Runs an in-graph teacher on images in [0, 1]: its targets, as `targets` gives them."""
        x = view(images_BxSxSx3, resolution, self.spec.mean, self.spec.std)
        return self.targets(self.module.apply(variables, x))


def view(images_BxSxSx3: jax.Array, resolution: int, mean: tuple, std: tuple) -> jax.Array:
    """One model's view of the canonical images: antialiased resize and that model's own pixel normalisation.

    Args:
      images_BxSxSx3: float images in [0, 1] at the canonical size.
      resolution: side in pixels, at most the canonical size for a faithful view.
      mean, std: the model's pixel statistics on the [0, 1] scale.
    """
    x = resize(images_BxSxSx3, (resolution, resolution), "bilinear", antialias=True)
    return (x - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)
