"""An exported program in the ExecuTorch runtime of this machine, fed by the contract that is written into it.

convert/to_executorch.py gives a program one method for every input size, `encode_256` or `encode_256x320`, and constant
methods that say how to feed it; docs/mobile.md lists them. Needs torch and executorch.
"""

import contextlib
import io
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

for _name in ("torchao", "torch.utils._pytree"):  # what they say on import concerns no program
    logging.getLogger(_name).setLevel(logging.ERROR)

from executorch.extension.pybindings import portable_lib  # noqa: E402
from executorch.runtime import Runtime  # noqa: E402

LISTS = ("methods", "resolution", "mean", "std", "outputs")  # constant methods of several outputs


with contextlib.redirect_stderr(io.StringIO()):  # the first question is answered with how processors were counted
    portable_lib._threadpool_get_thread_count()


def set_threads(count: int) -> None:
    """Threads of every program in this process."""
    with contextlib.redirect_stderr(io.StringIO()):  # the runtime announces it
        portable_lib._unsafe_reset_threadpool(count)


class PteProgram:
    """A program and the methods of it that were run so far.

    Attributes:
      contract: what the constant methods give: {"model": "eupe_vitt16", "mean": [0.485, ...], ...}.
      sizes: {method: (height, width)} in pixels, in the order of the export.
      outputs: names of what every method returns: some of cls, storage, patches.

    Raises:
      ValueError: not a program that the runtime can load, or one without a contract.
    """

    def __init__(self, pte: bytes, name: str = "the program") -> None:
        self._pte, self.name = pte, name  # the runtime reads weights from the bytes while it runs
        self._loaded: dict[str, Any] = {}
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # what the runtime prints, the error says
                self._program = Runtime.get().load_program(pte)
            names = sorted(self._program.method_names)
            constants = [n for n in names if not self._program.metadata(n).num_inputs()]
            found = {n: list(self._program.load_method(n).execute(())) for n in constants}
        except RuntimeError as error:
            raise ValueError(f"{name} is no program that the ExecuTorch runtime can load: {error}") from None
        try:
            self.contract = {n: values if n in LISTS else values[0] for n, values in found.items()}
            sides = [int(side) for side in self.contract["resolution"]]
            pairs = zip(sides[::2], sides[1::2], strict=True)
            self.sizes = dict(zip(self.contract["methods"], pairs, strict=True))
            self.outputs = list(self.contract["outputs"])
            self._mean, self._std = np.float32(self.contract["mean"]), np.float32(self.contract["std"])
            self._bytes_in = self.contract["input_dtype"] == "uint8"
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"{name} does not say how to feed it: export it again ({error!r})") from None

    def method(self, size: tuple[int, int]) -> str:
        """The method that takes images of this (height, width).

        Raises:
          ValueError: there is none; the message lists the sizes that there are.
        """
        for name, own in self.sizes.items():
            if own == tuple(size):
                return name
        known = ", ".join(f"{h}x{w}" for h, w in self.sizes.values())
        raise ValueError(f"{self.name} takes images of {known} pixels only, got {size[0]}x{size[1]}")

    def prepare(self, image_HxWx3: np.ndarray) -> torch.Tensor:
        """An RGB image, uint8 or float in [0, 1], as the tensor [1, 3, H, W] that a method takes."""
        image = np.asarray(image_HxWx3)
        if self._bytes_in:
            pixels = image if image.dtype == np.uint8 else np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
        else:
            pixels = image.astype(np.float32) / (255.0 if image.dtype == np.uint8 else 1.0)
            pixels = (pixels - self._mean) / self._std
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)[None]))

    def execute(self, method: str, image_1x3xHxW: torch.Tensor) -> Sequence[torch.Tensor]:
        """One run. Outputs are only good until the next: the runtime reuses their memory."""
        if method not in self._loaded:
            try:
                self._loaded[method] = self._program.load_method(method)
            except RuntimeError as error:
                raise ValueError(f"{self.name}: the runtime cannot load {method}: {error}") from None
        return self._loaded[method].execute((image_1x3xHxW,))

    def __call__(self, images_BxHxWx3: np.ndarray) -> dict[str, np.ndarray]:
        """Features of RGB images, uint8 or float in [0, 1], of a size that a method takes; one image at a time."""
        images = np.asarray(images_BxHxWx3)
        method = self.method(images.shape[1:3])
        rows = [[t.numpy().copy() for t in self.execute(method, self.prepare(image))] for image in images]
        return {n: np.concatenate(parts) for n, parts in zip(self.outputs, zip(*rows, strict=True), strict=True)}
