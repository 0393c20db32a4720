"""What the zoo knows about an encoder: `EncoderSpec` (one named model) and `Family` (one kind of module)."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# What the checkpoints of EUPE and DINOv3 may wrap an encoder's names in, and what else they may hold.
EUPE_PREFIXES = ("module.", "teacher.", "backbone.")
EUPE_EXTRAS = ("projectors.", "head.")


@dataclass(frozen=True)
class EncoderSpec:
    """One named encoder and how to feed it.

    Attributes:
      name: zoo name.
      family: name of the `Family` that builds it.
      kwargs: constructor arguments of the family's module.
      cls_dim: width of the class token, None for an encoder without one.
      patch_dim: width of the patch tokens.
      patch_size: pixels per patch token along one side (the output stride).
      num_storage_tokens: storage (register) tokens the encoder returns.
      resolution: native side of the square input, in pixels.
      mean, std: pixel normalisation of images scaled to [0, 1], RGB.
      licence: licence of the published weights.
      hub_repo, hub_file: where the published weights live, None where none were published.
    """

    name: str
    family: str
    kwargs: Mapping[str, Any]
    cls_dim: int | None
    patch_dim: int
    patch_size: int
    num_storage_tokens: int
    resolution: int = 256
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    licence: str = ""
    hub_repo: str | None = None
    hub_file: str | None = None


@dataclass(frozen=True)
class Transform:
    """Their array is ours with its axes in the order `axes` (None: as is), then in the shape that `shape` gives."""

    axes: tuple[int, ...] | None = None
    shape: Callable[[tuple[int, ...]], tuple[int, ...]] = tuple


TRANSFORMS: Mapping[str, Transform] = {
    "copy": Transform(),
    "linear": Transform((1, 0)),  # [in, out] -> [out, in]
    "conv": Transform((3, 2, 0, 1)),  # [h, w, I, O] -> [O, I, h, w]
    "patches": Transform((3, 2, 0, 1), lambda s: (s[0], s[1] * s[2] * s[3])),  # [h, w, I, O] -> [O, I * h * w]
    "batched": Transform(None, lambda s: (1, *s)),  # a leading axis of one
}


@dataclass(frozen=True)
class Tensor:
    """One row of a layout's table: `path` in our variables <-> `name` in a state_dict.

    `{i}` in `name` stands for the block index, the leading axis of our stacked leaf. Several names share the leaf in
    equal parts along its last axis, in their order (queries, keys and values of a joint projection).
    `transform` is a key of `TRANSFORMS`; it maps a block's part of the leaf to the tensor called `name`.
    """

    path: str
    name: str | tuple[str, ...]
    transform: str = "copy"

    @property
    def names(self) -> tuple[str, ...]:
        """The names that share the leaf, one or several."""
        return (self.name,) if isinstance(self.name, str) else self.name

    @property
    def stacked(self) -> bool:
        """Whether the leaf has a leading axis of blocks."""
        return "{i}" in self.names[0]


def _nothing(module: Any) -> dict[str, np.ndarray]:
    return {}


@dataclass(frozen=True)
class Layout:
    """How some code base calls the weights of a family.

    Attributes:
      table: rows; those whose path a given model does not have are skipped.
      constants: module -> tensors that are fixed by the architecture (written on export, checked on import).
      aliases: name -> name of the tensor it repeats.
      absent: module -> names in the table that such a model's state_dict does not have, because its computation has
        zeros there. Zeros on import, left out on export.
      implied: module -> path -> value of variables that are not stored, because that code computes them. An export of
        other values is refused.
      unread: paths in `implied` that encoding never reads: other values are left out of an export with a warning.
      renames: prefix -> prefix that names have elsewhere under this layout, replaced on import.
      prefixes: prefixes to strip when every tensor carries them.
      extras: prefixes of known tensors that are no part of the encoder (adapters, heads): reported and left out.
      within: prefix of the encoder's tensors in the state_dict of a larger model.
      beside: prefixes of that larger model's other tensors: reported and left out where `within` is in use.
    """

    table: tuple[Tensor, ...]
    constants: Callable[[Any], dict[str, np.ndarray]] = _nothing
    aliases: Mapping[str, str] = field(default_factory=dict)
    absent: Callable[[Any], Collection[str]] = _nothing
    implied: Callable[[Any], dict[str, np.ndarray]] = _nothing
    unread: tuple[str, ...] = ()
    renames: Mapping[str, str] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ("module.",)
    extras: tuple[str, ...] = ()
    within: str | None = None
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One kind of encoder: its module, its named specs, and how its weights are called elsewhere.

    Attributes:
      name: family name, as in `EncoderSpec.family`.
      module: flax module class; `module(**spec.kwargs)` is the encoder.
      specs: the named models.
      describe: module kwargs -> the EncoderSpec fields that follow from them (widths, patch size, storage tokens).
      layouts: name -> layout: "official" for the authors' names, "transformers" for Hugging Face's. The first is the
        default of exports; imports tell layouts apart by their names.
      example_inputs: module -> abstract arguments of its `init`; None: a small image.
    """

    name: str
    module: type
    specs: tuple[EncoderSpec, ...] = ()
    describe: Callable[[Mapping[str, Any]], dict[str, Any]] = _nothing
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    example_inputs: Callable[[Any], tuple[jax.ShapeDtypeStruct, ...]] | None = None
