"""A host teacher that gives NaN, or infinities, for some images, always for the same."""

import numpy as np

from eupe_jax.distill.teacher_spec import TeacherSpec


class Cells:
    """Means of 3x3 cells and their squares. spoilt: of every so many images about one; 0: none. value: what it gets."""

    def __init__(self, resolution=48, spoilt=0, value="nan"):
        self.spec = TeacherSpec("cells", 6, 6, 16, resolution, (0.0,) * 3, (1.0,) * 3, "cells")
        self._spoilt, self._value = spoilt, float(value)

    def __call__(self, images):
        x = images.reshape(-1, 3, 16, 3, 16, 3).mean((2, 4), dtype=np.float32) / 255
        patches = np.concatenate([x, x**2], -1)
        tokens = {"cls": patches.mean((1, 2)), "patches": patches}
        if self._spoilt:
            tokens["patches"][images.sum((1, 2, 3), dtype=np.int64) % self._spoilt == 0, 2, 1, 3] = self._value
        return tokens
