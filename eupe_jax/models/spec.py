"""What the zoo knows about an encoder: `EncoderSpec` (one named model) and `Family` (one kind of module)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
class Tensor:
    """One row of a family's state_dict table: `path` in our variables <-> `name` in the authors' state_dict.

    `{i}` in `name` stands for the block index, the leading axis of our stacked leaf.
    `layout` is "copy", "linear" ([out, in] <-> [in, out]) or "conv" ([O, I, h, w] <-> [h, w, I, O]).
    """

    path: str
    name: str
    layout: str = "copy"


@dataclass(frozen=True)
class Family:
    """One kind of encoder: its module, its named specs, and how its weights are called elsewhere.

    Attributes:
      name: family name, as in `EncoderSpec.family`.
      module: flax module class; `module(**spec.kwargs)` is the encoder.
      specs: the named models.
      describe: module kwargs -> the EncoderSpec fields that follow from them (widths, patch size, storage tokens).
      table: state_dict rows; rows whose path a given model does not have are skipped.
      constants: module -> state_dict tensors that are fixed by the architecture (written on export, checked on import).
      aliases: state_dict name -> name of the tensor it repeats.
      prefixes: prefixes to strip when every tensor carries them.
      extras: prefixes of known state_dict tensors that are no part of the encoder; reported and left out.
      within: prefix of the encoder's tensors in the state_dict of a larger model; if any tensor carries it, those that
        do not are reported and left out.
      example_inputs: module -> abstract arguments of its `init`; None: a small image.
    """

    name: str
    module: type
    specs: tuple[EncoderSpec, ...] = ()
    describe: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda kwargs: {}
    table: tuple[Tensor, ...] = ()
    constants: Callable[[Any], dict[str, np.ndarray]] = lambda module: {}
    aliases: Mapping[str, str] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ("module.", "teacher.", "backbone.")
    extras: tuple[str, ...] = ("projectors.", "head.")
    within: str | None = None
    example_inputs: Callable[[Any], tuple[jax.ShapeDtypeStruct, ...]] | None = None
