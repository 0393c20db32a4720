"""The authors' image transforms: what training, teachers and evaluations do by default is what the facts say.

A section is a list of operations; each is compared with the code that does it here. The photometric operations of
training are checked by value in tests/data/test_augment.py.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from eupe_jax.data.augment import AugmentConfig, augment, sample_keys
from eupe_jax.data.host import HostConfig, random_crop_box
from eupe_jax.evals import depth, knn, linear_probe, segmentation, zero_shot
from eupe_jax.evals.dense_transforms import IMAGENET_MEAN, DepthAugment, SegmentationAugment, short_side_size
from eupe_jax.models import zoo


def _operations(section: list[dict], *names: str) -> list[dict]:
    """The facts of each operation, which have to be these in this order."""
    assert [entry["op"] for entry in section] == list(names)
    return section


def _same(facts: dict, **ours) -> None:
    """Every fact but names and notes is one of ours, with the same value."""
    theirs = {k: v for k, v in facts.items() if k not in ("op", "note")}
    assert theirs.keys() == ours.keys(), f"{facts['op']}: facts {sorted(theirs)}, compared {sorted(ours)}"
    for key, value in ours.items():
        if isinstance(value, str | bool):
            assert value == theirs[key], f"{facts['op']}.{key}"
        else:
            np.testing.assert_allclose(value, theirs[key], rtol=1e-9, err_msg=f"{facts['op']}.{key}")


def check_normalisation(facts: dict) -> None:
    """Of every student, of DINOv3, and the colour that pads dense pictures."""
    for name in zoo.names():
        if name.startswith(("eupe_", "dinov3_")):
            assert (list(zoo.spec(name).mean), list(zoo.spec(name).std)) == (facts["mean"], facts["std"])
    assert list(IMAGENET_MEAN) == facts["mean"]


def check_perception_encoder(section: list[dict]) -> None:
    resize, _, _, normalise = _operations(section, "Resize", "ConvertRGB", "ToTensor", "Normalize")
    assert zero_shot.Settings().filter == resize["interpolation"] and "not kept" in resize["size"]
    for name in zoo.names():
        if name.startswith("pe_"):
            _same(normalise, mean=zoo.spec(name).mean, std=zoo.spec(name).std)


def check_knn(section: list[dict]) -> None:
    _, resize, crop, scale, normalise = _operations(section, "ToImage", "Resize", "CenterCrop", "ToFloat", "Normalize")
    for settings in (knn.Settings(), linear_probe.Settings()):
        _same(resize, short_side=settings.resize, interpolation="bicubic")
        _same(crop, size=settings.crop)
    check_normalisation(normalise)
    assert scale["scale"]


def check_inference(section: list[dict]) -> None:
    _, resize, _, normalise = _operations(section, "ToImage", "Resize", "ToFloat", "Normalize")
    for name in zoo.names():
        if name.startswith("eupe_"):
            side = zoo.spec(name).resolution
            _same(resize, size=(side, side), interpolation="bilinear", antialias=True)  # distill.teachers.view
    check_normalisation(normalise)


def check_classification_train(section: list[dict]) -> None:
    """No evaluation here trains on crops; the crop itself is the host's, at these settings."""
    crop, flip, _, normalise = _operations(section, "RandomResizedCrop", "RandomHorizontalFlip", "ToFloat", "Normalize")
    _check_crop(crop, HostConfig(size=crop["size"], scale=tuple(crop["scale"])))
    _same(flip, p=AugmentConfig().flip_p)
    check_normalisation(normalise)


def _check_crop(facts: dict, config: HostConfig) -> None:
    _same(facts, size=config.size, scale=config.scale, ratio=config.ratio, interpolation="bicubic")
    assert config.mode == "crop"
    generator = np.random.default_rng(0)
    boxes = np.array([random_crop_box(2000, 1600, config.scale, config.ratio, generator) for _ in range(2000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    share, ratio = width * height / (2000 * 1600), width / height
    for drawn, (low, high) in ((share, facts["scale"]), (ratio, facts["ratio"])):
        assert low - 0.01 < drawn.min() < low + 0.03 and high - 0.07 < drawn.max() < high + 0.01


def check_ade20k_train(section: list[dict]) -> None:
    resize, labels, crop, flip, colour, normalise, pad = _operations(
        section, "ResizeShortSide", "ReduceZeroLabel", "RandomCrop", "HorizontalFlip", "PhotoMetricDistortion",
        "Normalize", "Pad",
    )  # fmt: skip
    ours, settings = SegmentationAugment(), segmentation.Settings()
    for name in ("short_side", "scale_range", "crop", "cat_max_ratio", "crop_tries", "flip", "distort", "pad_colour"):
        assert getattr(ours, name) == getattr(settings, name), name
    assert (ours.short_side, list(ours.scale_range)) == (resize["size"], resize["random_ratio"])
    assert short_side_size(333, 200, 256) == (int(256 * 333 / 200 + 0.5), 256)
    assert settings.reduce_zero_label and labels["ignore"] == pad["label_value"]
    _same(crop, size=(ours.crop, ours.crop), max_single_class_ratio=ours.cat_max_ratio, tries=ours.crop_tries)
    _same(flip, p=ours.flip)
    ranges = {"brightness_delta": ours.brightness, "contrast": ours.contrast, "saturation": ours.saturation}
    named = {k: v for k, v in colour.items() if k not in ("each_p", "order")}
    _same(named, hue=(-ours.hue, ours.hue), **ranges)
    assert colour["each_p"] == 0.5 and ours.distort
    check_normalisation({k: [v / 255 for v in normalise[k]] for k in ("mean", "std")})
    assert pad["image_value"] == 0 and ours.pad_colour == IMAGENET_MEAN


def check_ade20k_eval(section: list[dict]) -> None:
    resize, _, window = _operations(section, "ResizeShortSide", "Normalize", "SlidingWindow")
    settings = segmentation.Settings()
    assert settings.short_side == resize["size"]
    _same(window, crop=settings.crop, stride=settings.stride, average=settings.average)


def check_nyuv2_train(section: list[dict]) -> None:
    box, tensor, rotation, flip, crop, colour, normalise = _operations(
        section,
        "FixedCrop",
        "ToTensor",
        "RandomRotation",
        "RandomHorizontalFlip",
        "RandomCrop",
        "ColorAug",
        "Normalize",
    )
    ours, settings = DepthAugment(), depth.Settings()
    assert list(ours.box) == list(settings.train_box) == box["x1y1x2y2"]
    _same(tensor, depth_divisor=settings.depth_divisor)
    assert (ours.rotation, ours.rotation_p) == (rotation["degrees"], rotation["p"])
    assert (settings.rotation, settings.rotation_p) == (rotation["degrees"], rotation["p"])
    _same(flip, p=ours.flip)
    _same(flip, p=settings.flip)
    _same(crop, size=ours.crop)
    _same(crop, size=settings.train_crop)
    _same(colour, p=ours.colour_p, gamma=ours.gamma, brightness=ours.brightness, per_channel=ours.channel)
    assert ours.gamma_on_255 and settings.gamma_on_255
    check_normalisation(normalise)


def check_nyuv2_eval(section: list[dict]) -> None:
    tensor, normalise, _ = _operations(section, "ToTensor", "Normalize", "FlipTTA")
    _same(tensor, depth_divisor=depth.Settings().depth_divisor)
    assert depth.Settings().flip_test
    check_normalisation(normalise)


def check_dinov3_global_crop(facts: dict) -> None:
    """The defaults are the second global crop as written; presets give both crops, as written and as they fire."""
    crop, flip = _operations(facts["geometric"], "RandomResizedCrop", "RandomHorizontalFlip")
    _check_crop(crop, HostConfig())
    ours = AugmentConfig()
    assert ours == AugmentConfig.preset("global_2")
    _same(flip, p=ours.flip_p)
    colour, grey = _operations(facts["colour"], "RandomApply", "RandomGrayscale")
    names = ("brightness", "contrast", "saturation", "hue")
    _same(colour["inner"], **{name: getattr(ours, name) for name in names})
    assert colour["p"] == ours.jitter_p
    _same(grey, p=ours.grayscale_p)
    for name in ("global_1", "global_2"):
        extra = {entry["op"]: entry for entry in facts[f"{name}_extra"]}
        written, fired = AugmentConfig.preset(name), AugmentConfig.preset(name, as_fired=True)
        blur = extra.pop("GaussianBlur")
        _same(
            blur, kernel=written.blur_kernel, sigma=written.blur_sigma, nominal_p=written.blur_chance,
            effective_p=fired.blur_chance,
        )  # fmt: skip
        assert dataclasses.replace(fired, blur_inverted=False) == written
        solarize = extra.pop("RandomSolarize", {"op": "RandomSolarize", "threshold": 128, "p": 0.0})
        _same(solarize, threshold=written.solarize_threshold * 255, p=written.solarize_p)
        assert not extra
        _check_blur_fires(written, blur["nominal_p"])
        _check_blur_fires(fired, blur["effective_p"])


def _check_blur_fires(config: AugmentConfig, share: float) -> None:
    """On noise, with everything else off, as often as that: 3.5 sigma of 400 images."""
    config = dataclasses.replace(AugmentConfig.off(), **{
        name: getattr(config, name) for name in ("blur_p", "blur_kernel", "blur_inverted")
    }, blur_sigma=(1.0, 2.0))  # fmt: skip
    noise = np.random.default_rng(0).uniform(size=(400, 6, 6, 3)).astype(np.float32)
    keys = sample_keys(jax.random.key(3), 0, np.arange(400))
    changed = np.any(np.asarray(augment(keys, noise, config)) != noise, axis=(1, 2, 3))
    assert abs(changed.mean() - share) <= 3.5 * np.sqrt(share * (1 - share) / 400)


SECTIONS: dict[str, Callable] = {
    "normalisation": check_normalisation,
    "perception_encoder_eval": check_perception_encoder,
    "knn_eval": check_knn,
    "readme_inference": check_inference,
    "classification_train": check_classification_train,
    "ade20k_train": check_ade20k_train,
    "ade20k_eval": check_ade20k_eval,
    "nyuv2_train": check_nyuv2_train,
    "nyuv2_eval": check_nyuv2_eval,
    "dinov3_global_crop": check_dinov3_global_crop,
}


def check_augmentation_facts(path: Path) -> None:
    """Every section of the file against this project's defaults; a section without a check fails."""
    facts = json.loads(path.read_text())
    assert not (unknown := sorted(set(facts) - set(SECTIONS))), f"{path.name}: no check for {unknown}"
    for name, section in facts.items():
        SECTIONS[name](section)


KINDS = {"augmentation_facts": check_augmentation_facts}
