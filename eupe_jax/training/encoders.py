"""Encoders out of checkpoints: with their weights, how to feed them, and what belongs to them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, SingleDeviceSharding

from eupe_jax.distill.normalization import Statistics
from eupe_jax.distill.teachers import view
from eupe_jax.models import text_tower, zoo
from eupe_jax.models.text_tower import ImageTextModel
from eupe_jax.sharding.rules import shardings
from eupe_jax.training.checkpoints import TEXT, read_manifest, restore_item, step_directory


@dataclasses.dataclass(frozen=True)
class LoadedEncoder:
    """An encoder with its weights and with how to feed it.

    `encoder(images)` takes uint8, or float in [0, 1], images [B, H, W, 3] and gives
    {"cls": [B, Dc], "storage": [B, R, D], "patches": [B, h, w, Dp]}.
    """

    name: str
    overrides: dict
    module: nn.Module
    variables: dict
    manifest: dict
    student: str = ""

    @property
    def resolution(self) -> int:
        """Side in pixels that images are resized to; the largest of those trained at."""
        return int(self.manifest["resolution"])

    @property
    def mean(self) -> tuple[float, ...]:
        """Pixel mean of RGB scaled to [0, 1]."""
        return tuple(self.manifest["mean"])

    @property
    def std(self) -> tuple[float, ...]:
        """Pixel standard deviation of RGB scaled to [0, 1]."""
        return tuple(self.manifest["std"])

    def preprocess(self, images_BxHxWx3: np.ndarray, resolution: int | None = None) -> jax.Array:
        """Squashes to `resolution` (default: the one trained at) and normalises: [B, S, S, 3] float32.

        Raises:
          ValueError: images of another shape.
        """
        images = jnp.asarray(images_BxHxWx3)
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images must be [B, H, W, 3], got {list(images.shape)}")
        scale = 255.0 if images.dtype == jnp.uint8 else 1.0
        return view(images.astype(jnp.float32) / scale, resolution or self.resolution, self.mean, self.std)

    def __call__(self, images_BxHxWx3: np.ndarray, resolution: int | None = None) -> dict[str, jax.Array]:
        return _apply(self.module, self.variables, self.preprocess(images_BxHxWx3, resolution))


_apply = jax.jit(lambda module, variables, x: module.apply(variables, x), static_argnums=0)


def hashable(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments as read from JSON, which has no tuples: modules must be hashable."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()}


def pick_student(manifest: Mapping, student: str | None, path: epath.PathLike) -> str:
    """The student to load: the only one, or the one named.

    Raises:
      ValueError: no such student, or several and none named; the message lists them.
    """
    names = sorted(manifest["students"])
    if student is None and len(names) == 1:
        return names[0]
    if student not in names:
        raise ValueError(f"{path} holds students {names}: name one" + (f", not {student!r}" if student else ""))
    return student


def load_encoder(
    path: epath.PathLike, student: str | None = None, dtype: jnp.dtype = jnp.float32, mesh: Mesh | None = None
) -> LoadedEncoder:
    """Loads one student's backbone from a training workdir, its `checkpoints` folder or a step directory.

    Args:
      student: which one, where the run trained several.
      dtype: compute type; parameters keep the types they are stored in.
      mesh: reads every parameter straight into its shards there; None: whole, on this host's first device.

    Raises:
      FileNotFoundError: nothing there. ValueError: not ours, ambiguous, or damaged.
    """
    step = step_directory(path)
    manifest = read_manifest(step)
    name = pick_student(manifest, student, path)
    entry = manifest["students"][name]
    overrides = hashable(entry["overrides"])
    module = zoo.build(entry["model"], dtype=dtype, **overrides)
    side = int(entry["resolution"])
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    target = _placed({"params": shapes["params"], "buffers": shapes.get("buffers", {})}, mesh)
    variables = restore_item(step, f"{name}.backbone", target, as_it_is=True)
    described = {**entry, "step": manifest["step"], "format": manifest["format"], "path": str(step)}
    return LoadedEncoder(entry["model"], overrides, module, variables, described, name)


def _placed(target: Any, mesh: Mesh | None) -> Any:
    """Shapes with shardings: Orbax would otherwise ask for the devices that the checkpoint was written on."""
    if mesh is None:
        one = SingleDeviceSharding(jax.local_devices()[0])
        where = jax.tree.map(lambda _: one, target)
    else:
        where = shardings(target, mesh)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), target, where)


def load_image_text(path: epath.PathLike, dtype: jnp.dtype = jnp.float32) -> tuple[ImageTextModel, dict, dict]:
    """Both towers of a Perception Encoder core model, as convert/teachers_to_orbax.py keeps them.

    Args:
      dtype: compute type; parameters keep the types they are stored in.

    Returns:
      The model that scores images against texts, its variables, and the encoder's manifest entry (how to feed it).

    Raises:
      FileNotFoundError: nothing there. ValueError: not ours, damaged, or without a text tower.
    """
    encoder = load_encoder(path, dtype=dtype)
    if TEXT not in encoder.manifest:
        raise ValueError(f"{path} holds no text tower: convert a pe_core file that has one")
    module = text_tower.build(encoder.name, dtype)
    module = module.clone(visual=encoder.module, text=module.text.clone(**encoder.manifest[TEXT]["overrides"]))
    shapes = jax.eval_shape(module.init, jax.random.key(0), *text_tower.FAMILY.example_inputs(module))
    target = _placed({"params": {k: v for k, v in shapes["params"].items() if k != "visual"}}, None)
    step = step_directory(path)
    text = restore_item(step, TEXT, target, as_it_is=True)
    return module, {"params": {"visual": encoder.variables["params"], **text["params"]}}, encoder.manifest


def load_adapters(path: epath.PathLike, student: str | None = None) -> dict:
    """The adapter parameters of one student: {"TEACHER_KIND": {"fc1", "norm", "fc2"}}, numpy."""
    step = step_directory(path)
    return restore_item(step, f"{pick_student(read_manifest(step), student, path)}.adapters")


def load_statistics(path: epath.PathLike) -> dict[str, Statistics]:
    """The statistics that a checkpoint's targets were normalised with: {teacher: Statistics}."""
    step = step_directory(path)
    headers = read_manifest(step)["statistics"]
    arrays = restore_item(step, "statistics")
    return {name: Statistics.from_parts(arrays[name], header) for name, header in headers.items()}
