"""What evaluations measure: Flax encoders, teachers on the host, exported programs; each an `interface.Encoder`."""

import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from eupe_jax.distill.host_teachers import HostTeacher
from eupe_jax.distill.teacher_spec import fingerprint as with_tokens
from eupe_jax.evals.interface import Tokens
from eupe_jax.hashing import sha256_file
from eupe_jax.models import zoo
from eupe_jax.sharding.mesh import batch_sharding, make_mesh, replicated
from eupe_jax.training.encoders import LoadedEncoder
from eupe_jax.training.fingerprint import fingerprint


class FlaxEncoder:
    """A student, proxy or teacher in Flax. Batches are cut over this host's devices where they divide evenly.

    Attributes:
      loaded: the encoder with its variables.
      checkpoint, student: where it came from, for evaluations that need its adapters; "" where it has none.
    """

    def __init__(self, loaded: LoadedEncoder, *, name: str = "", checkpoint: str = "", student: str = "") -> None:
        spec = zoo.spec(loaded.name, **loaded.overrides)
        self.loaded, self.checkpoint, self.student = loaded, checkpoint, student
        self.name = name or loaded.name
        self.cls_dim, self.patch_dim, self.patch_size = spec.cls_dim, spec.patch_dim, spec.patch_size
        self.resolution = loaded.resolution
        tokens = {"model": loaded.name, **{k: str(v) for k, v in loaded.overrides.items()}}
        tokens["compute"] = jnp.dtype(loaded.module.dtype).name
        self.fingerprint = with_tokens(fingerprint(loaded.variables), tokens, loaded.mean, loaded.std)
        self._mesh = make_mesh(devices=jax.local_devices())
        self._variables = jax.device_put(loaded.variables, replicated(self._mesh))
        self._apply = jax.jit(self._forward)

    def _forward(self, variables, images: jax.Array, key: jax.Array | None) -> dict[str, jax.Array]:
        mean, std = jnp.asarray(self.loaded.mean, jnp.float32), jnp.asarray(self.loaded.std, jnp.float32)
        scale = 255.0 if images.dtype == jnp.uint8 else 1.0
        pixels = (images.astype(jnp.float32) / scale - mean) / std
        training = {} if key is None else {"train": True, "rngs": {"rope": key}}
        # float32 is meant as such: accelerators would otherwise round matrix products
        precision = "highest" if self.loaded.module.dtype == jnp.float32 else None
        with jax.default_matmul_precision(precision):
            tokens = self.loaded.module.apply(variables, pixels, **training)
        return {kind: tokens[kind] for kind in ("cls", "patches") if kind in tokens}

    def __call__(self, images_BxHxWx3: np.ndarray, *, key: jax.Array | None = None) -> Tokens:
        whole = len(images_BxHxWx3) % self._mesh.size
        images = jax.device_put(images_BxHxWx3, (replicated if whole else batch_sharding)(self._mesh))
        return self._apply(self._variables, images, key)


class HostEncoder:
    """A teacher on the host: any Python callable or ONNX file (distill/host_teachers.py).

    One with a method `at_size` takes any size it likes; others take squares of their own resolution only.
    """

    def __init__(self, teacher: HostTeacher) -> None:
        spec = teacher.spec
        self._teacher = teacher
        self.name, self.fingerprint, self.resolution = spec.name, spec.fingerprint, spec.resolution
        self.cls_dim, self.patch_dim, self.patch_size = spec.cls_dim, spec.patch_dim, spec.stride

    def __call__(self, images_BxHxWx3: np.ndarray, *, key: jax.Array | None = None) -> Tokens:
        del key
        images = _as_uint8(images_BxHxWx3)
        if hasattr(self._teacher, "at_size"):
            return self._teacher.at_size(images)
        _require_size(self.name, images, (self.resolution, self.resolution))
        return self._teacher(images)


class PteEncoder:
    """An exported ExecuTorch program with the JSON file beside it: fixed sizes, one image at a time.

    Raises:
      ValueError: no JSON file beside it, not one of ours, or one of another program. ImportError: ExecuTorch is not
        installed.
    """

    def __init__(self, path: Path) -> None:
        from eupe_jax.evals.pte import PteProgram  # a training pod has neither torch nor executorch

        sidecar = path.with_suffix(".json")
        if not path.is_file() or not sidecar.is_file():
            missing = sidecar if path.is_file() else path
            raise ValueError(f"{missing} is not there: a program needs NAME.pte and NAME.json")
        try:
            report = json.loads(sidecar.read_text())
            weights, precision = report["weights_sha256"], report["precision"]
            self.cls_dim, self.patch_dim = report["cls_dim"], report["patch_dim"]
            self.patch_size, self.resolution = report["patch_size"], max(report["resolution"])
            self.name = f"{report['model']} (.pte)"
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{sidecar} does not describe an exported program: {error!r}") from None
        self.fingerprint = hashlib.sha256((sha256_file(path) + sha256_file(sidecar)).encode()).hexdigest()
        self._program = PteProgram(path.read_bytes(), str(path))
        inside = self._program.contract
        if (inside["weights_sha256"], inside["precision"]) != (weights, precision):
            raise ValueError(f"{sidecar} is of another program than {path}: export both together")

    def __call__(self, images_BxHxWx3: np.ndarray, *, key: jax.Array | None = None) -> Tokens:
        del key
        tokens = self._program(images_BxHxWx3)
        return {kind: tokens[kind] for kind in ("cls", "patches") if kind in tokens}


def _as_uint8(images: np.ndarray) -> np.ndarray:
    images = np.asarray(images)
    return images if images.dtype == np.uint8 else np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)


def _require_size(name: str, images: np.ndarray, size: tuple[int, int]) -> None:
    height, width = images.shape[1:3]
    if (height, width) != size:
        raise ValueError(f"{name} takes images of {size[0]}x{size[1]} pixels only, got {height}x{width}")
