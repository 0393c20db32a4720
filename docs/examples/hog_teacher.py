"""A host teacher in one file: histograms of oriented gradients, the dense descriptor that came before learnt ones.

It stands for any encoder that is not written in JAX: a `spec` that says what it gives, and a `__call__` from uint8
images to tokens. A config names it by import path, `common.host_teacher("hog_teacher:HogTeacher", 64)`, and Python must
find the module: PYTHONPATH=FOLDER, or an installed package of yours.
"""

import numpy as np

from eupe_jax.distill.host_teachers import resize_images
from eupe_jax.distill.teacher_spec import TeacherSpec, fingerprint


class HogTeacher:
    """Orientation histograms of grey gradients.

    Patch tokens [b, h, w, bins]: one histogram for each cell of `stride` pixels, of unit length.
    Class token [b, bins]: the histogram of the whole image.
    resolution: side of its input, a multiple of `stride`. bins: directions of a half turn.
    """

    def __init__(self, resolution: int = 224, *, stride: int = 16, bins: int = 9, name: str = "hog"):
        if resolution % stride:
            raise ValueError(f"{name}: resolution {resolution} is not a multiple of the stride {stride}")
        self._bins = bins
        # Nothing is learnt, so what decides the features is the method itself. Of a network: sha256_file(weights).
        digest = fingerprint("hog 1", {"bins": bins, "stride": stride}, (0.0,) * 3, (1.0,) * 3)
        self.spec = TeacherSpec(
            name, cls_dim=bins, patch_dim=bins, stride=stride, resolution=resolution,
            mean=(0.0,) * 3, std=(1.0,) * 3, fingerprint=digest,
        )  # fmt: skip

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 RGB [b, H, H, 3] -> {"cls": f32 [b, bins], "patches": f32 [b, h, w, bins]}."""
        grey_bxHxH = resize_images(images, self.spec.resolution).astype(np.float32).mean(axis=3) / 255
        dy, dx = np.gradient(grey_bxHxH, axis=(1, 2))
        direction = np.floor(np.arctan2(dy, dx) % np.pi / np.pi * self._bins).astype(int).clip(max=self._bins - 1)
        votes = np.hypot(dx, dy)[..., None] * (direction[..., None] == np.arange(self._bins))
        grid, stride = self.spec.grid, self.spec.stride
        cells = votes.reshape(len(images), grid, stride, grid, stride, self._bins).sum(axis=(2, 4))
        return {"cls": _unit(cells.mean(axis=(1, 2))), "patches": _unit(cells)}


def _unit(x: np.ndarray) -> np.ndarray:
    return (x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-3)).astype(np.float32)
