"""The segmentation evaluation from files to figures: data, training views, runs, resuming, refusals."""

import numpy as np
import pytest
from PIL import Image

from eupe_jax.data.host import random_generator
from eupe_jax.evals import segmentation
from eupe_jax.evals.dense_transforms import IMAGENET_MEAN, SegmentationAugment, centre_pad
from eupe_jax.evals.interface import DataError
from eupe_jax.evals.seg_metrics import IGNORE
from eupe_jax.evals.segmentation import Settings, load, run
from tests.evals.dense_sets import COLOURS, ColourEncoder, tiny_vit, write_ade

SMALL = Settings(
    iterations=60, warmup=4, eval_interval=20, batch_size=8, learning_rate=0.05, short_side=64, crop=64, stride=48,
    distort=False, dropout=0.0, threads=2, eval_batch=3, save_every=7, pictures=2,
)  # fmt: skip


def changed(**fields):
    return Settings(**{**vars(SMALL), **fields})


@pytest.fixture(scope="module")
def ade(tmp_path_factory):
    return write_ade(tmp_path_factory.mktemp("ade"))


@pytest.fixture(scope="module")
def whole(ade):
    encoder = ColourEncoder()
    return encoder, run(encoder, load(ade, SMALL), SMALL)


def test_learns_what_colours_say(whole):
    _, result = whole
    assert result.metrics["mIoU"] > 0.75 and result.metrics["aAcc"] > 0.85
    assert [row["class"] for row in result.tables["per_class"]] == ["red", "green, grass", "blue"]
    assert np.mean([row["iou"] for row in result.tables["per_class"]]) == pytest.approx(result.metrics["mIoU"])
    assert result.tables["training"][-1]["loss"] < 0.5 * result.tables["training"][0]["loss"]
    picture = result.images["predictions"]
    assert picture.dtype == np.uint8 and picture.ndim == 3 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 10


def test_reports_the_best_of_its_evaluations(whole):
    _, result = whole
    history = result.tables["evaluations"]
    assert [row["iteration"] for row in history] == [20, 40, 60]
    best = max(history, key=lambda row: row["mIoU"])
    assert result.metrics == {name: value for name, value in best.items() if name != "iteration"}
    assert result.details["reported_iteration"] == best["iteration"]


def test_backbone_is_in_training_mode_until_the_first_evaluation(whole, ade):
    encoder, _ = whole
    first = encoder.keys[1:21]  # after a look at one validation image
    assert None not in first and len(set(first)) == 20
    assert set(encoder.keys[21:]) == {None}
    for mode, expected in (("never", {False}), ("always", {True})):
        encoder = ColourEncoder()
        run(encoder, load(ade, SMALL), changed(backbone_train_mode=mode, iterations=2, eval_interval=99, pictures=0))
        assert {key is not None for key in encoder.keys[1:3]} == expected


def test_stopped_and_resumed_equals_never_stopped(whole, ade, tmp_path):
    _, expected = whole
    for stop_after in (10, 20, 25):
        with pytest.raises(KeyboardInterrupt):
            run(ColourEncoder(stop_after=stop_after), load(ade, SMALL), SMALL, workdir=tmp_path)
    resumed = ColourEncoder()
    result = run(resumed, load(ade, SMALL), SMALL, workdir=tmp_path)
    assert result.metrics == expected.metrics and result.tables == expected.tables
    np.testing.assert_array_equal(result.images["predictions"], expected.images["predictions"])
    done = ColourEncoder()
    again = run(done, load(ade, SMALL), SMALL, workdir=tmp_path)
    assert again.metrics == expected.metrics and len(done.keys) < len(resumed.keys)
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*"))
    run(ColourEncoder(), load(ade, SMALL), changed(seed=1, iterations=2), workdir=tmp_path)
    assert len(list(tmp_path.glob("head_*.safetensors"))) == 2  # another run does not touch what this one left


def test_other_patch_sizes_are_padded_and_cut_back(ade):
    encoder = ColourEncoder(patch_size=12)  # 64 is padded to 72
    result = run(encoder, load(ade, SMALL), changed(pictures=0, iterations=30))
    assert result.metrics["mIoU"] > 0.5


def test_encoder_for_squares_says_so(ade):
    data = load(ade, SMALL)
    encoder = ColourEncoder(square=True)
    with pytest.raises(ValueError, match="squares only, got 64x88"):  # short sides of 64 are below the window
        run(encoder, data, changed(crop=88, stride=80))
    assert len(encoder.keys) == 1  # at once, not when the first evaluation comes


def test_kept_features_change_nothing(whole, ade):
    _, expected = whole
    encoder = ColourEncoder()
    result = run(encoder, load(ade, SMALL), changed(keep_features_mb=0))
    assert result.metrics == expected.metrics and len(encoder.keys) > len(whole[0].keys)


def test_flax_encoder_runs_through(ade):
    data = load(ade, SMALL)
    result = run(tiny_vit(), data, changed(iterations=1, batch_size=8, eval_batch=8, pictures=0))
    assert 0 <= result.metrics["mIoU"] <= 1 and np.isfinite(result.tables["training"][-1]["loss"])


# Training views


def coloured_label(height, width):
    blocks = np.random.default_rng(0).integers(0, 3, (height // 16 + 1, width // 16 + 1))
    label = np.kron(blocks, np.ones((16, 16), np.uint8)).astype(np.uint8)[:height, :width]
    return Image.fromarray(COLOURS[1:][label]), label


@pytest.mark.parametrize("seed", range(6))
def test_label_follows_the_image(seed):
    image, label = coloured_label(90, 130)
    augment = SegmentationAugment(short_side=90, crop=64, distort=False, scale_range=(0.5, 2.0))
    pixels, out = augment(image, label, random_generator(seed, 3, 1))
    assert pixels.shape == (64, 64, 3) and pixels.dtype == np.float32 and out.dtype == np.uint8
    padding = np.abs(pixels - np.float32(IMAGENET_MEAN)).max(-1) < 1e-6
    assert ((out == IGNORE) == padding).mean() > 0.99
    nearest = np.abs(pixels[..., None, :] * 255 - COLOURS[1:].astype(np.float32)).sum(-1).argmin(-1)
    assert (nearest == out)[out != IGNORE].mean() > 0.85  # they differ at edges, where colours are mixed


def test_views_are_a_function_of_the_generator():
    image, label = coloured_label(64, 96)
    augment = SegmentationAugment(short_side=64, crop=64)
    views = [augment(image, label, random_generator(0, step, 2)) for step in (5, 5, 6)]
    np.testing.assert_array_equal(views[0][0], views[1][0])
    assert not np.array_equal(views[0][0], views[2][0])
    assert all(0 <= pixels.min() and pixels.max() <= 1 for pixels, _ in views)


def test_crops_avoid_a_single_class():
    label = np.zeros((64, 256), np.uint8)
    label[:, 240:] = 1
    image = Image.fromarray(np.zeros((64, 256, 3), np.uint8))

    def share(tries, ratio):
        augment = SegmentationAugment(64, (1.0, 1.0), 64, ratio, tries, distort=False)
        crops = [augment(image, label, random_generator(0, i, 0))[1] for i in range(60)]
        return np.mean([(crop == 1).any() for crop in crops])

    assert share(200, 0.9) > 0.95 > 0.5 > share(0, 0.9)
    assert share(10, 1.0) == share(0, 0.9)  # switched off


def test_distortion_without_range_changes_nothing_and_hue_turns_colours():
    pixels = np.asarray(coloured_label(32, 32)[0])
    still = SegmentationAugment(brightness=0.0, contrast=(1.0, 1.0), saturation=(1.0, 1.0), hue=0.0)
    for seed in range(5):
        got = still._distorted(pixels, random_generator(seed, 0, 0))
        assert np.abs(got - pixels).max() <= 5  # the way to HSV and back rounds
    grey = SegmentationAugment(brightness=0.0, contrast=(1.0, 1.0), saturation=(0.0, 0.0), hue=0.0)
    spreads = [np.ptp(grey._distorted(pixels, random_generator(s, 0, 0)), axis=-1).max() for s in range(20)]
    assert 4 <= sum(spread <= 5 for spread in spreads) <= 16  # half of them


def test_centre_padding_puts_the_odd_pixel_right_and_below():
    images = np.ones((2, 5, 8, 3), np.float32)
    padded, offset = centre_pad(images, 4, (0.0, 0.5, 0.0))
    assert padded.shape == (2, 8, 8, 3) and offset == (1, 0)
    assert (padded[:, 1:6] == 1).all() and (padded[:, [0, 6, 7], :, 1] == 0.5).all()
    assert centre_pad(images, 1, (0.0,) * 3)[0] is images


# Broken data


def broken(tmp_path, breaks):
    root = write_ade(tmp_path, train=3, val=2)
    breaks(root)
    return root


def save_label(root, array, name="annotations/training/ADE_train_00000002.png"):
    Image.fromarray(array).save(root / name)


BREAKS = {
    "no list": (lambda r: (r / "ADE20K_object150_val.txt").unlink(), r"ADE20K_object150_val\.txt cannot be read"),
    "empty list": (lambda r: (r / "ADE20K_object150_train.txt").write_text("\n"), "names no image"),
    "list of bytes": (lambda r: (r / "ADE20K_object150_train.txt").write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "no image": (lambda r: (r / "images/training/ADE_train_00000002.jpg").unlink(),
                 r"ADE20K_object150_train\.txt:2: .*ADE_train_00000002\.jpg cannot be opened"),
    "no mask": (lambda r: (r / "annotations/validation/ADE_val_00000001.png").unlink(),
                r"ADE20K_object150_val\.txt:1: .*ADE_val_00000001\.png cannot be opened"),
    "truncated image": (lambda r: _truncate(r / "images/training/ADE_train_00000003.jpg"), "train.txt:3: .*decoded"),
    "truncated mask": (lambda r: _truncate(r / "annotations/training/ADE_train_00000003.png"), r"03\.png .*decoded"),
    "other size": (lambda r: save_label(r, np.ones((64, 64), np.uint8)), "80x64 pixels but .* has 64x64"),
    "colour mask": (lambda r: save_label(r, np.ones((80, 64, 3), np.uint8)), "mode RGB, expected one 8-bit channel"),
    "label too large": (lambda r: save_label(r, np.full((80, 64), 4, np.uint8)), "holds the label 4, but there are 3"),
    "no labels": (lambda r: [save_label(r, np.zeros_like(np.asarray(Image.open(p))), f"annotations/validation/{p.name}")
                             for p in (r / "annotations/validation").iterdir()], "no validation image has a labelled"),
    "class list": (lambda r: (r / "objectInfo3.txt").write_text("Idx\tName\n2\tred\n"), "3.txt:2: expected"),
    "two class lists": (lambda r: (r / "objectInfo4.txt").write_text("x"), "several class lists"),
}  # fmt: skip


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", BREAKS)
def test_broken_data_is_named_before_the_work_starts(tmp_path, name):
    breaks, message = BREAKS[name]
    with pytest.raises(DataError, match=message):
        load(broken(tmp_path, breaks), SMALL)


def test_large_sets_are_checked_as_they_are_read(tmp_path):
    root = broken(tmp_path, lambda r: save_label(r, np.full((80, 64), 9, np.uint8)))
    lazy = changed(scan_limit=0, iterations=3)
    with pytest.raises(DataError, match="train.txt:2: .*holds the label 9"):
        run(ColourEncoder(), load(root, lazy), lazy)


def test_classes_are_counted_where_nothing_names_them(tmp_path):
    write_ade(tmp_path, train=2, val=1, names=False)
    assert load(tmp_path, SMALL).classes == ("class 1", "class 2", "class 3")
    plain = changed(reduce_zero_label=False)
    assert load(tmp_path, plain).classes == ("class 0", "class 1", "class 2", "class 3")


@pytest.mark.parametrize(
    "fields",
    [{"backbone_train_mode": "sometimes"}, {"stride": 65}, {"batch_size": 0}, {"dropout": 1.0}, {"report": "worst"},
     {"schedule_scale": 0.0}, {"scale_range": (2.0, 0.5)}],
)  # fmt: skip
def test_settings_that_make_no_sense(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        changed(**fields)


def test_a_loss_that_is_not_finite_stops_the_run(ade):
    class Broken(ColourEncoder):
        def __call__(self, images, *, key=None):
            return {"patches": super().__call__(images, key=key)["patches"] * np.float32(np.nan)}

    with pytest.raises(ValueError, match="loss of iteration 0 is nan"):
        run(Broken(), load(ade, SMALL), SMALL)


def test_defaults_are_the_published_protocol():
    s = segmentation.Settings()
    assert (s.iterations, s.warmup, s.eval_interval, s.batch_size) == (40_000, 1_500, 5_000, 16)
    assert (s.learning_rate, s.weight_decay, s.b1, s.b2, s.dropout) == (1e-3, 1e-3, 0.9, 0.999, 0.1)
    assert (s.crop, s.stride, s.short_side, s.scale_range, s.cat_max_ratio) == (512, 341, 512, (0.5, 2.0), 0.75)
