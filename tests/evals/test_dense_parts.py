"""Schedules, head, optimiser, windows, metrics and losses against PyTorch, scikit-learn and plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, jaccard_score

from eupe_jax.evals import depth, depth_metrics, linear_head, seg_metrics, segmentation
from eupe_jax.evals.schedules import DepthSchedule, SegmentationSchedule, scaled
from eupe_jax.evals.sliding import average_windows, merge, window_boxes

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def one_cycle(peak, total, **kwargs):
    """Learning rate and beta1 of PyTorch's OneCycleLR at every step."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=peak)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=total, pct_start=0.0, **kwargs)
    rows = []
    for _ in range(total):
        rows.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"][0]))
        optimizer.step()
        scheduler.step() if len(rows) < total else None
    return np.array(rows)


def test_segmentation_schedule_is_one_cycle_after_its_warmup_one_iteration_late():
    ours = SegmentationSchedule(peak=2e-3, total=60, warmup=7)
    theirs = one_cycle(2e-3, 60, final_div_factor=float("inf"), cycle_momentum=False)
    rates = [ours.learning_rate(i) for i in range(60)]
    np.testing.assert_allclose(rates[8:], theirs[7:-1, 0], rtol=1e-9, atol=1e-15)
    assert rates[0] == rates[1] < rates[2] and max(rates) == rates[8]
    in_step = SegmentationSchedule(peak=2e-3, total=60, warmup=7, skip_first=False)
    np.testing.assert_allclose([in_step.learning_rate(i) for i in range(59)], rates[1:], rtol=1e-12)


def test_depth_schedule_is_one_cycle_after_its_warmup_but_for_beta1_which_starts_late():
    ours = DepthSchedule(peak=3e-4, total=60, warmup=20)
    theirs = one_cycle(3e-4, 60, div_factor=25, final_div_factor=1000)
    np.testing.assert_allclose([ours.learning_rate(i) for i in range(20, 60)], theirs[20:, 0], rtol=1e-9)
    beta1 = [ours.beta1(i) for i in range(60)]
    assert beta1[:20] == [0.0] * 20 and beta1[20] == 0.85
    assert all(a < b for a, b in zip(beta1[20:], beta1[21:], strict=False)) and beta1[-1] < 0.95


def test_one_scale_shortens_everything_together():
    short = segmentation.Settings(schedule_scale=0.01)
    plan, schedule = short.plan(), short.schedule()
    assert (plan.iterations, schedule.total, schedule.warmup, plan.eval_interval) == (400, 400, 15, 50)
    schedule = depth.Settings(schedule_scale=0.01).schedule()
    assert (schedule.total, schedule.warmup) == (384, 128)
    assert scaled(5000, 1e-9) == 1 and scaled(1500, 1e-9, 0) == 0
    SegmentationSchedule(total=1, warmup=0).learning_rate(0), DepthSchedule(total=1, warmup=0).beta1(0)


def test_batch_norm_and_convolution_are_pytorchs():
    head = linear_head.init(jax.random.key(0), 6, 4)
    assert 0.005 < float(head["params"]["kernel"].std()) < 0.015
    head["params"] = {name: jnp.asarray(normal(*x.shape)) for name, x in head["params"].items()}
    norm, conv = torch.nn.BatchNorm2d(6), torch.nn.Conv2d(6, 4, 1)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(np.array(head["params"]["scale"])))
        norm.bias.copy_(torch.tensor(np.array(head["params"]["shift"])))
        conv.weight.copy_(torch.tensor(np.array(head["params"]["kernel"])).T[:, :, None, None])
        conv.bias.copy_(torch.tensor(np.array(head["params"]["bias"])))
    for _ in range(3):
        x = 3 + 2 * normal(2, 3, 5, 6)
        logits, head["stats"] = linear_head.apply_train(head, jnp.asarray(x))
        expected = conv(norm(torch.tensor(x).permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        np.testing.assert_allclose(logits, expected.detach(), atol=2e-5)
    np.testing.assert_allclose(head["stats"]["var"], norm.running_var, rtol=1e-5)
    norm.eval()
    expected = conv(norm(torch.tensor(x).permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    np.testing.assert_allclose(linear_head.apply(head, x), expected.detach(), atol=2e-5)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_adamw_is_pytorchs_while_rate_and_beta1_change(clip):
    ours, adamw = {"a": jnp.asarray(normal(4, 3))}, linear_head.AdamW(0.1, b2=0.99, clip_norm=clip)
    theirs = torch.nn.Parameter(torch.tensor(np.array(ours["a"])))
    optimizer = torch.optim.AdamW([theirs], weight_decay=0.1)
    state = adamw.init(ours)
    for lr, b1 in ((1e-2, 0.0), (2e-2, 0.0), (3e-2, 0.85), (1e-2, 0.9), (1e-3, 0.95)):
        grad = normal(4, 3)
        ours, state = adamw.update({"a": jnp.asarray(grad)}, state, ours, jnp.float32(lr), jnp.float32(b1))
        theirs.grad = torch.tensor(grad)
        if clip:
            torch.nn.utils.clip_grad_norm_([theirs], clip)
        optimizer.param_groups[0].update(lr=lr, betas=(b1, 0.99))
        optimizer.step()
        np.testing.assert_allclose(ours["a"], theirs.detach(), atol=2e-6)


def test_dropout_takes_whole_channels_and_keeps_the_mean():
    x = jnp.ones((8, 4, 5, 500))
    dropped = np.asarray(linear_head.drop_channels(jax.random.key(0), x, 0.1))
    assert (dropped == dropped[:, :1, :1]).all()
    assert abs(dropped.mean() - 1.0) < 0.02 and abs((dropped == 0).mean() - 0.1) < 0.02
    assert linear_head.drop_channels(jax.random.key(0), x, 0.0) is x


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(1, 40))
def test_windows_cover_every_pixel_and_stay_inside(height, width, crop, stride):
    boxes = window_boxes(height, width, crop, min(stride, crop))
    covered = np.zeros((height, width), int)
    sizes = set()
    for y1, y2, x1, x2 in boxes:
        assert 0 <= y1 < y2 <= height and 0 <= x1 < x2 <= width
        sizes.add((y2 - y1, x2 - x1))
        covered[y1:y2, x1:x2] += 1
    assert len(sizes) == 1 and max(sizes.pop()) <= crop
    # a picture below the crop on both sides is cut into squares, which a long stride may part
    if max(height, width) >= crop or stride <= min(height, width):
        assert covered.min() >= 1


def test_windows_that_leave_pixels_out_are_refused():
    boxes = window_boxes(10, 50, 51, 40)
    with pytest.raises(ValueError, match="cover every pixel of 10x50"):
        average_windows(np.zeros((len(boxes), 10, 10, 1)), boxes, (10, 50))


def test_average_of_windows_of_a_map_is_the_map():
    scores = normal(40, 70, 3)
    boxes = window_boxes(40, 70, 32, 20)
    windows = np.stack([scores[y1:y2, x1:x2] for y1, y2, x1, x2 in boxes])
    np.testing.assert_allclose(average_windows(windows, boxes, (40, 70)), scores, atol=1e-6)


@pytest.mark.parametrize("average", ["logits", "probabilities"])
@pytest.mark.parametrize("padded,offset", [((32, 32), (0, 0)), ((36, 36), (2, 2))])
def test_merging_windows_is_interpolation_cutting_averaging_and_interpolation(average, padded, offset):
    boxes = window_boxes(32, 52, 32, 20)
    logits = normal(len(boxes), 4, 4, 5)
    total, count = torch.zeros(1, 5, 32, 52), torch.zeros(1, 1, 32, 52)
    for window, (y1, y2, x1, x2) in zip(torch.tensor(logits).permute(0, 3, 1, 2), boxes, strict=True):
        up = torch.nn.functional.interpolate(window[None], padded, mode="bilinear")
        up = up[:, :, offset[0] : offset[0] + 32, offset[1] : offset[1] + 32]
        total[:, :, y1:y2, x1:x2] += up.softmax(1) if average == "probabilities" else up
        count[:, :, y1:y2, x1:x2] += 1
    expected = torch.nn.functional.interpolate(total / count, (45, 80), mode="bilinear")[0].permute(1, 2, 0)
    got = merge(logits, padded=padded, offset=offset, boxes=boxes, size=(32, 52), out_size=(45, 80), average=average)
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_areas_and_ratios_are_those_of_a_confusion_matrix():
    label, predicted = RNG.integers(0, 5, (20, 30)), RNG.integers(0, 5, (20, 30))
    label[RNG.random(label.shape) < 0.2] = seg_metrics.IGNORE
    known = label != seg_metrics.IGNORE
    found = seg_metrics.areas(predicted, label, 6)  # class 5 is nowhere
    matrix = confusion_matrix(label[known], predicted[known], labels=range(6))
    np.testing.assert_array_equal(found[0], np.diag(matrix))
    np.testing.assert_array_equal(found[3], matrix.sum(1))
    summary = seg_metrics.summary(found)
    expected = jaccard_score(label[known], predicted[known], average="macro", labels=range(5))
    assert summary["mIoU"] == pytest.approx(expected)
    assert summary["aAcc"] == pytest.approx(np.mean(label[known] == predicted[known]))
    assert np.isnan(seg_metrics.per_class(found)["iou"][5])
    with pytest.raises(ValueError, match="predicted classes 0..4 are not all among the 3"):
        seg_metrics.areas(predicted, np.zeros_like(label), 3)


def test_reduce_zero_keeps_ignored_pixels_ignored():
    assert seg_metrics.reduce_zero(np.array([0, 1, 150, 255], np.uint8)).tolist() == [255, 0, 149, 255]


def test_cross_entropy_is_pytorchs_mean_over_all_pixels_or_over_known_ones():
    logits, labels = normal(2, 6, 7, 4), RNG.integers(0, 4, (2, 6, 7))
    labels[0, :3] = seg_metrics.IGNORE
    as_torch = torch.tensor(logits).permute(0, 3, 1, 2), torch.tensor(labels)
    every = torch.nn.functional.cross_entropy(*as_torch, ignore_index=255, reduction="none").mean()
    known = torch.nn.functional.cross_entropy(*as_torch, ignore_index=255)
    assert float(segmentation.cross_entropy(logits, labels)) == pytest.approx(float(every), rel=1e-5)
    assert float(segmentation.cross_entropy(logits, labels, False)) == pytest.approx(float(known), rel=1e-5)
    nothing = np.full_like(labels, seg_metrics.IGNORE)
    assert float(segmentation.cross_entropy(logits, nothing, False)) == 0.0


def test_scale_invariant_loss_is_pytorchs_and_harmless_without_a_valid_pixel():
    predicted, target = np.exp(normal(2, 5, 6)), np.exp(normal(2, 5, 6))
    valid = RNG.random((2, 5, 6)) < 0.7
    for with_variance in (False, True):
        x = torch.tensor(predicted, requires_grad=True)
        mask = torch.tensor(valid)
        g = (x[mask] + 1e-3).log() - (torch.tensor(target)[mask] + 1e-3).log()
        expected = (0.15 * g.mean() ** 2 + (g.var() if with_variance else 0.0)).sqrt()
        expected.backward()
        value, grad = jax.value_and_grad(depth_metrics.scale_invariant_loss)(predicted, target, valid, with_variance)
        assert float(value) == pytest.approx(expected.item(), rel=1e-5)
        np.testing.assert_allclose(grad, x.grad, atol=1e-6)
        for mask in (np.zeros_like(valid), valid):
            same = jax.value_and_grad(depth_metrics.scale_invariant_loss)(target, target, mask, with_variance)
            assert np.isfinite(same[0]) and np.isfinite(same[1]).all()


def test_errors_are_their_definitions():
    p, t = np.array([[1.0, 2.0, 5.0]]), np.array([[1.0, 4.0, 4.0]])
    found = depth_metrics.errors(p, t, np.array([[True, True, False]]))
    assert found["rmse"] == pytest.approx(np.sqrt(2.0)) and found["abs_rel"] == pytest.approx(0.25)
    assert found["sq_rel"] == pytest.approx(0.5) and found["mae"] == pytest.approx(1.0)
    assert found["log10"] == pytest.approx(np.log10(2) / 2) and found["silog"] == pytest.approx(100 * np.log(2) / 2)
    assert (found["d1"], found["d3"]) == (0.5, 0.5)
    with pytest.raises(ValueError, match="no valid depth"):
        depth_metrics.errors(p, t, np.zeros((1, 3), bool))


def test_padding_is_stretched_or_cut():
    low = jnp.asarray(normal(1, 3, 3))
    cut = depth.stretch(low, (20, 20), (24, 24), (2, 2))
    whole = depth.stretch(low, (24, 24))
    np.testing.assert_allclose(cut, whole[:, 2:22, 2:22], atol=1e-6)
    assert np.abs(np.asarray(depth.stretch(low, (20, 20)) - cut)).max() > 0.01
