"""The depth evaluation from files to figures: data, training views, runs, resuming, refusals."""

import jax
import numpy as np
import pytest
from PIL import Image

from eupe_jax.data.host import random_generator
from eupe_jax.evals.dense_transforms import DepthAugment
from eupe_jax.evals.depth import Settings, Test, load, run
from eupe_jax.evals.interface import DataError
from eupe_jax.evals.linear_head import init
from tests.evals.dense_sets import ColourEncoder, tiny_vit, write_nyu

SMALL = Settings(
    iterations=80, warmup=20, loss_warmup=10, batch_size=8, learning_rate=0.05, train_box=(4, 4, 60, 44),
    train_crop=(32, 48), colour_p=0.0, threads=2, eval_batch=2, save_every=7, pictures=2, bins=64, max_depth=6.0,
)  # fmt: skip


def changed(**fields):
    return Settings(**{**vars(SMALL), **fields})


@pytest.fixture(scope="module")
def nyu(tmp_path_factory):
    return write_nyu(tmp_path_factory.mktemp("nyu"))


@pytest.fixture(scope="module")
def whole(nyu):
    encoder = ColourEncoder()
    return encoder, run(encoder, load(nyu, SMALL), SMALL)


def test_learns_that_bright_is_far(whole):
    _, result = whole
    # depths spread by more than a metre; a constant guess leaves at least their deviation
    assert result.metrics["rmse"] < 0.4 and result.metrics["d1"] > 0.9
    rows = result.tables["per_image"]
    assert len(rows) == 3 and result.metrics["rmse"] == pytest.approx(np.mean([row["rmse"] for row in rows]))
    assert result.images["predictions"].dtype == np.uint8


def test_backbone_stays_in_training_mode_for_the_whole_training(whole):
    encoder, _ = whole
    training = encoder.keys[1:81]  # after a look at one test image and its mirror image
    assert None not in training and len(set(training)) == 80
    assert set(encoder.keys[:1] + encoder.keys[81:]) == {None}


def test_stopped_and_resumed_equals_never_stopped(whole, nyu, tmp_path):
    _, expected = whole
    for stop_after in (9, 30):
        with pytest.raises(KeyboardInterrupt):
            run(ColourEncoder(stop_after=stop_after), load(nyu, SMALL), SMALL, workdir=tmp_path)
    result = run(ColourEncoder(), load(nyu, SMALL), SMALL, workdir=tmp_path)
    assert result.metrics == expected.metrics and result.tables == expected.tables
    np.testing.assert_array_equal(result.images["predictions"], expected.images["predictions"])


def test_pixels_or_images_are_averaged(nyu):
    data, short = load(nyu, SMALL), {"iterations": 2, "pictures": 0}
    images = run(ColourEncoder(), data, changed(**short))
    pixels = run(ColourEncoder(), data, changed(**short, average="pixels"))
    squares = [row["rmse"] ** 2 for row in images.tables["per_image"]]
    assert images.tables["per_image"] == pixels.tables["per_image"]
    # images hold nearly the same number of valid pixels, and the root of a mean is above the mean of roots
    assert pixels.metrics["rmse"] == pytest.approx(np.sqrt(np.mean(squares)), rel=0.02)
    assert pixels.metrics["rmse"] > images.metrics["rmse"]


def test_mirroring_the_image_mirrors_the_prediction(nyu, tmp_path):
    data, head = load(nyu, SMALL), init(jax.random.key(0), 10, 64)
    for line in (nyu / "nyu_test.txt").read_text().splitlines():
        for name in line.split()[:2]:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            flipped = Image.open(nyu / name).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            flipped.save((tmp_path / name).with_suffix(".png"))
    text = (nyu / "nyu_test.txt").read_text().replace(".jpg", ".png")
    (tmp_path / "nyu_test.txt").write_text(text)
    (tmp_path / "nyu_train.txt").write_text(text)
    mirrored = load(tmp_path, SMALL)

    def predicted(data):
        return [p for _, _, p in Test(ColourEncoder(), data, SMALL).predictions(head, [0, 1, 2])]

    for a, b in zip(predicted(data), predicted(mirrored), strict=True):
        np.testing.assert_allclose(a, b[:, ::-1], atol=1e-5)


@pytest.mark.parametrize("stretch_padding", [True, False])
def test_other_patch_sizes_are_padded(nyu, stretch_padding):
    encoder = ColourEncoder(patch_size=10)  # 32x48 becomes 40x50
    result = run(encoder, load(nyu, SMALL), changed(stretch_padding=stretch_padding, pictures=0, iterations=40))
    assert result.metrics["rmse"] < 0.9


def test_encoder_for_squares_says_so(nyu):
    encoder = ColourEncoder(square=True)
    with pytest.raises(ValueError, match="squares only, got 48x64"):
        run(encoder, load(nyu, SMALL), SMALL)
    assert len(encoder.keys) == 1  # at once, not after the training


def test_flax_encoder_runs_through(nyu):
    result = run(tiny_vit(), load(nyu, SMALL), changed(iterations=1, batch_size=8, eval_batch=8, pictures=0))
    assert np.isfinite(result.metrics["rmse"])


# Training views


@pytest.mark.parametrize("seed", range(6))
def test_depth_follows_the_image(seed):
    y, x = np.mgrid[:60, :80]
    far = (1 + 0.02 * x + 0.03 * y).astype(np.float32)
    image = Image.fromarray(np.repeat((far * 60).round()[..., None], 3, axis=-1).astype(np.uint8))
    augment = DepthAugment(box=(2, 3, 78, 58), crop=(48, 64), rotation=5.0, rotation_p=1.0, colour_p=0.0)
    pixels, depth = augment(image, far, random_generator(seed, 1, 0))
    assert pixels.shape == (48, 64, 3) and pixels.dtype == depth.dtype == np.float32
    inside = (depth > 0) & (pixels[..., 0] > 0.2)
    assert inside.mean() > 0.9
    np.testing.assert_allclose((pixels[..., 0] * 255 / 60)[inside], depth[inside], atol=0.08)


def test_colours_change_within_their_ranges():
    image = Image.fromarray(np.full((50, 70, 3), 100, np.uint8))
    depth = np.ones((50, 70), np.float32)
    calm = DepthAugment((), 0.0, 0.0, 0.0, (48, 64), 1.0, gamma=(1.0, 1.0))
    means = [calm(image, depth, random_generator(i, 0, 0))[0].mean() * 255 for i in range(30)]
    assert 65 < min(means) < 85 < 115 < max(means) < 140
    quirk = DepthAugment((), 0.0, 0.0, 0.0, (48, 64), 1.0, gamma=(0.9, 0.9), brightness=(1, 1), channel=(1, 1))
    assert quirk(image, depth, random_generator(0, 0, 0))[0].mean() * 255 == pytest.approx(100**0.9, rel=1e-4)
    plain = DepthAugment((), 0.0, 0.0, 0.0, (48, 64), 1.0, (0.9, 0.9), (1, 1), (1, 1), gamma_on_255=False)
    expected = (100 / 255) ** 0.9 * 255
    assert plain(image, depth, random_generator(0, 0, 0))[0].mean() * 255 == pytest.approx(expected, rel=1e-4)


# Broken data


def save_depth(root, array, name="scene_test/sync_depth_00001.png"):
    Image.fromarray(array).save(root / name)


def _line(root, name, number, text):
    lines = (root / name).read_text().splitlines()
    lines[number - 1] = text
    (root / name).write_text("\n".join(lines))


BREAKS = {
    "no list": (lambda r: (r / "nyu_train.txt").unlink(), r"nyu_train\.txt cannot be read"),
    "empty list": (lambda r: (r / "nyu_test.txt").write_text(""), r"nyu_test\.txt names no image"),
    "short line": (lambda r: _line(r, "nyu_test.txt", 2, "scene_test/rgb_00001.jpg"), r"test\.txt:2: expected 'rgb"),
    "focal": (lambda r: _line(r, "nyu_test.txt", 2, "a b c"), r"nyu_test\.txt:2: expected 'rgb"),
    "no depth": (lambda r: (r / "scene_train/sync_depth_00002.png").unlink(),
                 r"nyu_train\.txt:3: .*sync_depth_00002\.png cannot be opened"),
    "no image": (lambda r: (r / "scene_test/rgb_00000.jpg").write_bytes(b"<html>"), r"nyu_test\.txt:1: .*opened"),
    "truncated depth": (lambda r: _truncate(r / "scene_test/sync_depth_00002.png"), r"nyu_test\.txt:3: .*decoded"),
    "8-bit depth": (lambda r: save_depth(r, np.ones((48, 64), np.uint8)), "mode L, expected 16-bit grey"),
    "other size": (lambda r: save_depth(r, np.ones((48, 60), np.uint16)), "48x64 pixels but .* has 48x60"),
    "nothing known": (lambda r: save_depth(r, np.zeros((48, 64), np.uint16)), r"nyu_test\.txt:2: .*no valid depth"),
}  # fmt: skip


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", BREAKS)
def test_broken_data_is_named_before_the_work_starts(tmp_path, name):
    breaks, message = BREAKS[name]
    breaks(write_nyu(tmp_path, train=3, test=3))
    with pytest.raises(DataError, match=message):
        load(tmp_path, SMALL)


def test_training_pictures_must_hold_the_crop(nyu):
    with pytest.raises(DataError, match=r"nyu_train\.txt:1: .*48x64 pixels, training crops need at least 472x608"):
        load(nyu, Settings())


def test_large_sets_are_checked_as_they_are_read(tmp_path):
    root = write_nyu(tmp_path, train=3, test=3)
    save_depth(root, np.zeros((48, 64), np.uint16))
    lazy = changed(scan_limit=0, iterations=1)
    with pytest.raises(DataError, match=r"nyu_test\.txt:2: .*no valid depth"):
        run(ColourEncoder(), load(root, lazy), lazy)
    with pytest.raises(DataError, match=r"nyu_train\.txt:.*training crops need"):
        run(ColourEncoder(), load(root, lazy), changed(scan_limit=0, train_box=(), train_crop=(64, 64)))


@pytest.mark.parametrize(
    "fields",
    [{"bin_spacing": "cubic"}, {"train_box": (1, 2)}, {"min_depth": 20.0}, {"average": "median"}, {"bins": 0}],
)
def test_settings_that_make_no_sense(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        changed(**fields)
    with pytest.raises(ValueError, match="does not fit into the box"):
        Settings(train_crop=(480, 640))


def test_defaults_are_the_published_protocol():
    s = Settings()
    assert (s.iterations, s.warmup, s.batch_size, s.learning_rate) == (38_400, 12_800, 16, 3e-4)
    assert (s.weight_decay, s.b2, s.clip_norm, s.bins, s.max_depth) == (1e-3, 0.99, 35.0, 256, 10.0)
    assert (s.train_box, s.train_crop, s.rotation) == ((43, 45, 608, 472), (416, 544), 2.5)
