"""Reading fixtures, rebuilding weights from the recipe, and comparing."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

TOKEN_NAMES = ("cls_token", "storage_tokens", "mask_token", "class_embedding", "positional_embedding", "probe")


class Fixture:
    """One .npz fixture: `meta`, and the arrays below "w/", "in/" and "out/"."""

    def __init__(self, path: Path):
        self.path = path
        with np.load(path, allow_pickle=False) as z:
            arrays = {name: z[name] for name in z.files if name != "meta"}
            self.meta: dict[str, Any] = json.loads(str(z["meta"]))
        self.weights = {n.removeprefix("w/"): a for n, a in arrays.items() if n.startswith("w/")}
        self.inputs = {n.removeprefix("in/"): a for n, a in arrays.items() if n.startswith("in/")}
        self.outputs = {n.removeprefix("out/"): a for n, a in arrays.items() if n.startswith("out/")}
        self._compared: set[str] = set()

    def check(self, name: str, actual: Any, tolerance: float) -> None:
        """Asserts that `actual` is output `name`: same shape, no difference above `tolerance`."""
        expected, actual = self.outputs[name], np.asarray(actual)
        self._compared.add(name)
        assert actual.shape == expected.shape, f"{self.path.name} {name}: shape {actual.shape}, not {expected.shape}"
        difference = np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max(initial=0.0)
        assert difference <= tolerance, f"{self.path.name} {name}: off by {difference:.2e}, allowed {tolerance:.0e}"

    def assert_all_checked(self) -> None:
        """Asserts that no output of the file was left out."""
        left = sorted(set(self.outputs) - self._compared)
        assert self.outputs and not left, f"{self.path.name}: outputs never compared: {left}"


def recipe_array(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The array that the weight recipe gives state_dict key `name`."""
    last = name.split(".")[-1]
    if last in TOKEN_NAMES or name.endswith("token_embedding.weight"):
        mean, scale = 0.0, 1.0
    elif last == "gamma":
        mean, scale = 0.0, 0.5
    elif last == "logit_scale":
        mean, scale = 2.3, 0.1
    elif last in ("proj", "text_projection") and len(shape) == 2:
        mean, scale = 0.0, shape[0] ** -0.5
    elif last == "weight" and len(shape) == 1:
        mean, scale = 1.0, 0.2
    elif last in ("bias", "in_proj_bias"):
        mean, scale = 0.0, 0.3
    else:
        mean, scale = 0.0, float(np.prod(shape[1:])) ** -0.5
    normal = np.random.default_rng([seed, zlib.crc32(name.encode("utf-8"))]).standard_normal(shape)
    return np.float32(mean + scale * normal)


def check_probes(state_dict: dict[str, np.ndarray], probes: dict[str, dict]) -> None:
    """Asserts that rebuilt weights agree with the probes a fixture records."""
    assert probes
    for name, probe in probes.items():
        array = state_dict[name]
        assert list(array.shape) == probe["shape"], name
        flat = array.reshape(-1).astype(np.float64)
        found = [flat[0], flat[-1], flat.sum()]
        np.testing.assert_allclose(found, [probe["first"], probe["last"], probe["sum"]], rtol=1e-6, atol=1e-5)


def to_nhwc(images_BxCxHxW: np.ndarray) -> np.ndarray:
    """Channels last."""
    return np.ascontiguousarray(np.moveaxis(images_BxCxHxW, 1, -1))


def to_nchw(maps_BxHxWxC: Any) -> np.ndarray:
    """Channels second."""
    return np.moveaxis(np.asarray(maps_BxHxWxC), -1, 1)
