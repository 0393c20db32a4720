"""Fixtures of the depth evaluation: bins, errors and loss, and the whole linear path."""

from pathlib import Path

import jax
import numpy as np

from eupe_jax.evals import dense_training, depth, depth_metrics
from tests.golden_kinds.backbones import vit_overrides
from tests.golden_kinds.common import Fixture, to_nchw, to_nhwc
from tests.golden_kinds.dense import head_from, plain_encoder

OURS = {"a1": "d1", "a2": "d2", "a3": "d3", "log_10": "log10"}


def check_depth_parts(path: Path) -> None:
    """Bins, errors with and without the Eigen crop, the loss and its gradients; errors above 1 relative to them."""
    fixture = Fixture(path)
    logits = to_nhwc(fixture.inputs["bin_logits"])
    for name in (n for n in fixture.outputs if n.startswith("bins/")):
        spacing, weighting = name.removeprefix("bins/").split("_")
        centres = depth_metrics.bin_centres(logits.shape[-1], 1e-3, 10.0, spacing)
        fixture.check(name, depth_metrics.depth_from_bins(logits, centres, weighting)[:, None], 2e-5)
    for i in range(fixture.meta["n_maps"]):
        _check_map(fixture, i)
    _check_loss(fixture)
    box = depth_metrics.eigen_box(480, 640)
    fixture.check("eigen_box_480x640", np.array(box), 0.0)
    pixels = depth.Settings().measured(np.ones((480, 640), np.float32)).sum()
    fixture.check("eigen_pixels_480x640", pixels, 0.0)
    fixture.assert_all_checked()


def _check_map(fixture: Fixture, i: int) -> None:
    target, low = fixture.inputs[f"gt_{i}"][0, 0], fixture.inputs[f"pred_{i}"][:, 0]
    for crop, eigen in (("NYU_EIGEN", True), ("FULL", False)):
        settings = depth.Settings(eigen_crop=eigen)
        predicted = np.clip(np.asarray(depth.stretch(low, target.shape))[0], settings.min_depth, settings.max_depth)
        valid = settings.measured(target)
        whole = (0, target.shape[0], 0, target.shape[1])
        box = depth_metrics.eigen_box(*target.shape) if eigen else whole
        fixture.check(f"map{i}/{crop}/mask_box", np.array(box), 0.0)
        fixture.check(f"map{i}/{crop}/valid_pixels", valid.sum(), 0.0)
        errors = depth_metrics.errors(predicted, target, valid)
        for name in (n.rsplit("/", 1)[1] for n in fixture.outputs if n.startswith(f"map{i}/{crop}/")):
            if name not in ("mask_box", "valid_pixels"):
                expected = float(fixture.outputs[f"map{i}/{crop}/{name}"])
                tolerance = max(2e-5, 1e-5 * abs(expected))
                fixture.check(f"map{i}/{crop}/{name}", errors[OURS.get(name, name)], tolerance)


def _check_loss(fixture: Fixture) -> None:
    target, valid = fixture.inputs["sig_gt"], fixture.inputs["sig_mask"]
    for value_name, grad_name, with_variance in (("warmup", "warmup_grad", False),
                                                 ("after_100_calls", "after_grad", True)):  # fmt: skip
        value, grad = jax.value_and_grad(depth_metrics.scale_invariant_loss)(
            fixture.inputs["sig_pred"], target, valid, with_variance
        )
        fixture.check(f"sig/{value_name}", value, 2e-5)
        fixture.check(f"sig/{grad_name}", grad, 2e-5)


def check_depth_linear_e2e(path: Path) -> None:
    """Centre padding, backbone, head, bins and flip averaging; loss and gradient of a training batch."""
    fixture = Fixture(path)
    meta, colour = fixture.meta, (0.0, 0.0, 0.0)
    encoder = plain_encoder(fixture, "encoder.backbone.", vit_overrides(meta["constructor"]))
    head = head_from(fixture, "decoder.", "conv_depth")
    settings = depth.Settings(bins=meta["bins"], pad_colour=colour)
    centres = settings.centres()

    image = to_nhwc(fixture.inputs["image"])
    features, mirrored = (dense_training.encode(encoder, x, colour)[0] for x in (image, image[:, :, ::-1]))
    fixture.check("padded_feature_map", to_nchw(features), 2e-5)
    fixture.check("depth_low", depth.predict_low(head, features, None, centres)[:, None], 2e-5)
    low = depth.predict_low(head, features, mirrored, centres)
    fixture.check("depth_tta_low", low[:, None], 2e-5)
    full = np.clip(np.asarray(depth.stretch(low, tuple(meta["gt"]))), settings.min_depth, settings.max_depth)
    fixture.check("depth_tta", full[:, None], 2e-5)

    images, target = to_nhwc(fixture.inputs["train_images"]), fixture.inputs["train_depth"][:, 0]
    # the mask of the fixture is not a function of its depth: pixels it leaves out become unknown
    target = np.where(fixture.inputs["train_mask"][:, 0], target, 0.0)
    features, padded, offset = dense_training.encode(encoder, images, colour)
    loss = depth.make_loss(settings, padded, offset)
    for name, iteration in (("loss_call_1", 0), ("loss_call_101", 100)):

        def of(params, iteration=iteration):
            return loss({"params": params, "stats": head["stats"]}, features, target, jax.random.key(0), iteration)[0]

        value, grads = jax.value_and_grad(of)(head["params"])
        fixture.check(f"train/{name}", value, 2e-5)
    fixture.check("train/grad_conv_weight", np.asarray(grads["kernel"]).T[:, :, None, None], 2e-5)
    logits = depth.linear_head.apply_train(head, features)[0]
    predicted = depth.stretch(depth_metrics.depth_from_bins(logits, centres), target.shape[1:])
    fixture.check("train/pred", predicted[:, None], 2e-5)
    fixture.assert_all_checked()


KINDS = {"depth_parts": check_depth_parts, "depth_linear_e2e": check_depth_linear_e2e}
