"""Fixtures of the segmentation evaluation: metrics, sliding windows, and the whole linear path."""

from pathlib import Path

import jax
import numpy as np

from eupe_jax.evals import dense_training, linear_head, seg_metrics, segmentation
from eupe_jax.evals.sliding import average_windows, merge, window_boxes
from tests.golden_kinds.backbones import vit_overrides
from tests.golden_kinds.common import Fixture, to_nchw, to_nhwc
from tests.golden_kinds.dense import head_from, plain_encoder


def check_seg_metrics(path: Path) -> None:
    """Areas exact, ratios to 1e-6, with and without the zero label."""
    fixture = Fixture(path)
    classes, count = fixture.meta["classes"], fixture.meta["n_images"]
    for mode in ("reduce_zero", "plain"):
        rows = []
        for i in range(count):
            prediction, label = fixture.inputs[f"pred_{i}"], fixture.inputs[f"label_{i}"]
            label = seg_metrics.reduce_zero(label) if mode == "reduce_zero" else label
            rows.append(seg_metrics.areas(prediction, label, classes))
        fixture.check(f"{mode}/areas", np.stack(rows), 0.0)
        total = np.sum(rows, axis=0)
        summary = seg_metrics.summary(total)
        for theirs, ours in {"acc": "mAcc"}.items() | {(n, n) for n in summary if n != "mAcc"}:
            fixture.check(f"{mode}/{theirs}", summary[ours], 1e-6)
        expected, iou = fixture.outputs[f"{mode}/iou_per_class"], seg_metrics.per_class(total)["iou"]
        np.testing.assert_array_equal(np.isnan(iou), np.isnan(expected))
        fixture.outputs[f"{mode}/iou_per_class"] = np.nan_to_num(expected)
        fixture.check(f"{mode}/iou_per_class", np.nan_to_num(iou), 1e-6)
    fixture.assert_all_checked()


def check_slide_windows(path: Path) -> None:
    """Boxes exact and in order; averages of the window numbers to 1e-6."""
    fixture = Fixture(path)
    for height, width in fixture.meta["sizes"]:
        boxes = window_boxes(height, width, fixture.meta["crop"], fixture.meta["stride"])
        fixture.check(f"{height}x{width}/boxes_y1y2x1x2", np.array(boxes), 0.0)
        y1, y2, x1, x2 = boxes[0]
        numbers = np.arange(1, len(boxes) + 1, dtype=np.float32)[:, None, None, None]
        windows = np.broadcast_to(numbers, (len(boxes), y2 - y1, x2 - x1, 1))
        mean = np.asarray(average_windows(windows, boxes, (height, width)))[::16, ::16, 0]
        fixture.check(f"{height}x{width}/mean_window_number_sub16", mean, 1e-6)
    fixture.assert_all_checked()


def check_seg_linear_e2e(path: Path) -> None:
    """Backbone, head and sliding window to 2e-5; batch statistics, loss and gradients of a training batch."""
    fixture = Fixture(path)
    meta, colour = fixture.meta, (0.0, 0.0, 0.0)
    encoder = plain_encoder(fixture, "segmentation_model.0.feature_model.", vit_overrides(meta["constructor"]))
    head = head_from(fixture, "segmentation_model.1.", "conv")
    settings = segmentation.Settings(crop=meta["crop"], stride=meta["stride"], dropout=0.0, pad_colour=colour)

    def scores(image, out_size):
        boxes = window_boxes(*image.shape[:2], settings.crop, settings.stride)
        windows = np.stack([image[y1:y2, x1:x2] for y1, y2, x1, x2 in boxes])
        features, padded, offset = dense_training.encode(encoder, windows, colour)
        logits = linear_head.apply(head, features)
        return merge(logits, padded=padded, offset=offset, boxes=boxes, size=image.shape[:2], out_size=out_size)

    image = to_nhwc(fixture.inputs["image"])[0]
    crop = image[: settings.crop, : settings.crop]
    fixture.check("predict_crop", to_nchw(scores(crop, crop.shape[:2])[None]), 2e-5)
    slid = scores(image, tuple(meta["gt"]))
    fixture.check("slide_softmax", to_nchw(jax.nn.softmax(slid, axis=-1)[None]), 2e-5)
    predicted, expected = np.asarray(slid.argmax(-1))[None], fixture.outputs["slide_argmax"]
    ties_only = np.mean(predicted == expected) >= 0.999
    fixture.check("slide_argmax", expected if ties_only else predicted, 0.0)

    images, labels = to_nhwc(fixture.inputs["train_images"]), fixture.inputs["train_labels"]
    features, padded, offset = dense_training.encode(encoder, images, colour)
    fixture.check("train/features", to_nchw(features), 2e-5)
    fixture.check("train/logits", to_nchw(linear_head.apply_train(head, features)[0]), 2e-5)
    loss = segmentation.make_loss(settings, padded, offset)

    def of(params):
        return loss({"params": params, "stats": head["stats"]}, features, labels, jax.random.key(0), 0)

    (value, stats), grads = jax.value_and_grad(of, has_aux=True)(head["params"])
    fixture.check("train/loss", value, 2e-5)
    fixture.check("train/grad_conv_weight", np.asarray(grads["kernel"]).T[:, :, None, None], 2e-5)
    fixture.check("train/grad_conv_bias", grads["bias"], 2e-5)
    fixture.check("train/grad_bn_weight", grads["scale"], 2e-5)
    fixture.check("train/bn_running_mean_after", stats["mean"], 2e-5)
    fixture.check("train/bn_running_var_after", stats["var"], 2e-5)
    fixture.assert_all_checked()


KINDS = {
    "seg_metrics": check_seg_metrics,
    "slide_windows": check_slide_windows,
    "seg_linear_e2e": check_seg_linear_e2e,
}
