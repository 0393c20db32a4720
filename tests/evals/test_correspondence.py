"""Correspondence: the frame, the drawing of pairs and the matching against naive code; shifted pictures end to end."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eupe_jax.data.sources import Record
from eupe_jax.evals import correspondence
from eupe_jax.evals.correspondence import Frame, Place, Settings
from eupe_jax.evals.interface import DataError
from eupe_jax.evals.spair import Pair, read_pairs

torch = pytest.importorskip("torch")


class PatchPixels:
    """An encoder whose patch tokens are the patch's own pixels, averaged to 4x4, around their mean colour."""

    name, fingerprint, cls_dim, patch_dim, patch_size, resolution = "pixels", "pixels-1", None, 48, 8, 64

    def __init__(self):
        self.seen = 0

    def __call__(self, images, *, key=None):
        self.seen += len(images)
        b, h, w = (images.shape[0], images.shape[1] // 8, images.shape[2] // 8)
        x = np.asarray(images, np.float32).reshape(b, h, 4, 2, w, 4, 2, 3).mean((3, 6)) / 255 - 0.5
        return {"patches": x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h, w, 48) + 1e-3}


def texture(width, height, seed):
    """A smooth colourful picture, uint8."""
    small = np.random.default_rng(seed).integers(0, 255, (height // 6 + 2, width // 6 + 2, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def write_set(root: Path, categories=("cat", "dog"), pairs=3, separator=":", listed=True) -> Path:
    """Pairs cut from one large picture at two places, so that the true matches are known."""
    names = []
    for c, category in enumerate(categories):
        (root / "JPEGImages" / category).mkdir(parents=True, exist_ok=True)
        big = texture(200, 200, c)
        for n in range(pairs):
            rng = np.random.default_rng([c, n])
            size, fields = (64, 48), {"category": category, "pair_id": n, "mirror": 0}
            corners = rng.permuted([[40, 48], [56, 40]], axis=0)  # whole patches apart
            points = rng.integers(8, 30, (4 + n, 2)) + corners.max(0)
            for side, (x, y) in zip(("src", "trg"), corners, strict=True):
                image = Image.fromarray(big[y : y + size[1], x : x + size[0]])
                fields[f"{side}_imname"] = f"{side}{n}.png"
                image.save(root / "JPEGImages" / category / fields[f"{side}_imname"])
                fields |= {f"{side}_kps": (points - (x, y)).tolist(), f"{side}_imsize": [*size, 3]}
                fields[f"{side}_bndbox"] = [4, 4, 60, 40]
            name = f"{c * pairs + n:06d}-src{n}-trg{n}"
            path = root / "PairAnnotation" / "test" / f"{name}{separator}{category}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(fields))
            names.append(f"{name}:{category}")
    if listed:
        (root / "Layout" / "large").mkdir(parents=True)
        (root / "Layout" / "large" / "test.txt").write_text("\n".join(names) + "\n")
    return root


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (50, 50), (101, 37), (7, 400)])
def test_pad_keeps_the_picture_and_its_points_together(size):
    # A white picture with one black corner pixel: the frame's corner must be where the pixels change.
    frame = Frame.of(size, 64, "pad")
    picture = Place(64, "pad")(Record(np.full((size[1], size[0], 3), 255, np.uint8), "white"))
    rows, columns = np.flatnonzero(picture.any((1, 2))), np.flatnonzero(picture.any((0, 2)))
    assert (columns[0], rows[0]) == frame.offset
    assert (len(columns), len(rows)) == frame.inner and max(frame.inner) == 64
    corners = frame.place(np.array([[0, 0], size]))
    assert np.abs(corners - [frame.offset, np.add(frame.offset, frame.inner)]).max() <= 0.5
    assert Frame.of(size, 64, "squash").place(np.array([size], float)).tolist() == [[64, 64]]


def test_rounding_rules():
    points = np.array([[1.5, 2.5], [0.9, 0.6], [9.7, 9.8]])
    expected = {
        "round": [[2, 2], [1, 1], [9, 9]],
        "floor": [[1, 2], [0, 0], [9, 9]],
        "floor_x": [[1, 2], [0, 1], [9, 9]],
    }
    for rule, wanted in expected.items():
        assert correspondence.pixels(points, 10, rule).tolist() == wanted
    assert correspondence.pixels(np.array([[1.2, 1.7]]), 10, "floor_x").tolist() == [[1, 2]]


def test_pairs_are_drawn_as_the_legacy_generator_draws_them():
    by_category = {name: [f"{name}{i}" for i in range(size)] for name, size in (("cow", 7), ("ant", 40))}
    np.random.seed(5)
    stream = {name: np.random.choice(len(by_category[name]), 9) for name in ("ant", "cow")}
    np.random.seed(5)
    alone = np.random.choice(7, 9)
    settings = Settings(pairs_per_category=9, seed=5)
    drawn = correspondence.draw(by_category, settings)
    assert list(drawn) == ["ant", "cow"]
    for name, chosen in stream.items():
        assert drawn[name] == [f"{name}{i}" for i in chosen]
    again = correspondence.draw(by_category, dataclasses.replace(settings, reseed=True))
    assert again["cow"] == [f"cow{i}" for i in alone]
    assert correspondence.draw(by_category, correspondence.STANDARD)["ant"] == by_category["ant"]
    with pytest.raises(ValueError, match="'cow' has 7"):
        correspondence.draw(by_category, dataclasses.replace(settings, replacement=False))


def naive_match(source, target, points, side, settings, inner):
    """Everything at full size, in PyTorch and float64."""

    def upsampled(patches):
        x = torch.from_numpy(patches).double().permute(2, 0, 1)[None]
        if settings.normalize:
            x = torch.nn.functional.normalize(x, dim=1)
        return torch.nn.functional.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)[0]

    source, target = upsampled(source), upsampled(target)
    found = []
    for x, y in points:
        query = source[:, y, x][:, None, None]
        if settings.similarity == "cosine":
            score = torch.nn.functional.cosine_similarity(query, target, dim=0)
        else:
            score = (query * target).sum(0)
        if settings.mask_padding:
            masked = torch.full_like(score, -torch.inf)
            masked[inner] = score[inner]
            score = masked
        found.append(score)
    return torch.stack(found)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("mask", [False, True])
def test_matching_is_that_of_whole_upsampled_maps(normalize, similarity, mask):
    rng = np.random.default_rng(0)
    settings = Settings(normalize=normalize, similarity=similarity, mask_padding=mask)
    side, (h, w) = 40, (5, 4)  # ratios 8 and 10, a grid that is not square
    source, target = rng.normal(size=(2, h, w, 6)).astype(np.float32) * rng.lognormal(0, 1, (2, h, w, 1)).astype("f4")
    points = rng.integers(0, side, (30, 2)).astype(np.int32)
    how = {"side": side, "normalize": normalize, "similarity": similarity}
    box = np.asarray((0, 6, 40, 33) if mask else (0, 0, side, side), np.int32)
    ready = correspondence.prepare(source, **how)[0], *correspondence.prepare(target, **how)
    found = np.asarray(correspondence.match(*ready, points, box))
    scores = naive_match(source, target, points, side, settings, np.s_[6:33, 0:40]).numpy()
    flat = scores.reshape(len(points), -1)
    chosen = scores[np.arange(len(points)), found[:, 1], found[:, 0]]
    np.testing.assert_allclose(chosen, flat.max(1), rtol=1e-5)
    # Beyond the outermost patch centres maps are flat; elsewhere there is one best pixel, and it must be found.
    alone = (flat > flat.max(1, keepdims=True) * (1 - 1e-5)).sum(1) == 1
    assert ((found[:, 1] * side + found[:, 0]) == flat.argmax(1))[alone].all()
    assert alone.sum() > 3 and len(np.unique(flat.argmax(1))) > 5


def test_the_settings_of_the_naive_test_matter():
    rng = np.random.default_rng(1)
    maps = rng.normal(size=(2, 5, 5, 6)).astype(np.float32) * rng.lognormal(0, 1, (2, 5, 5, 1)).astype(np.float32)
    points, box = rng.integers(0, 40, (60, 2)).astype(np.int32), np.asarray((0, 0, 40, 40), np.int32)
    results = []
    for how in ((True, "cosine"), (True, "dot"), (False, "cosine"), (False, "dot")):
        ready = [correspondence.prepare(m, side=40, normalize=how[0], similarity=how[1]) for m in maps]
        results.append(np.asarray(correspondence.match(ready[0][0], *ready[1], points, box)))
    assert all((a != b).any(1).mean() > 0.1 for i, a in enumerate(results) for b in results[:i])


def test_distances_threshold_and_strictness():
    pair = Pair("p", "cat", Path("a"), Path("b"), (64, 32), (64, 32), np.zeros((3, 2)), np.array([[10.0, 8]] * 3), 40.0)
    # pad to 128: scale 2, rows shifted by 32; the threshold is 0.1 * 40 * 2 = 8 pixels
    predicted = np.array([[20 + 8, 48], [20, 48 + 7], [20 - 6, 48 + 6]])
    assert correspondence.correct(pair, predicted, 128, Settings()).tolist() == [False, True, False]
    assert correspondence.correct(pair, predicted, 128, Settings(strict=False)).tolist() == [True, True, False]
    # squashed to 128: columns by 2, rows by 4; 15 rows are 3.75 pixels of the picture, 17 are 4.25
    squashed = np.array([[20, 32 + 15], [20, 32 + 17], [20 + 7, 32]])
    assert correspondence.correct(pair, squashed, 128, Settings(resize="squash")).tolist() == [True, False, True]


@pytest.mark.parametrize("separator", [":", "_"])
def test_shifted_pictures_are_matched(tmp_path, separator):
    root = write_set(tmp_path, separator=separator)
    settings = Settings(pairs_per_category=None, side=64, pictures=3, batch_size=4)
    data = correspondence.load(root, settings)
    assert {k: len(v) for k, v in data.pairs.items()} == {"cat": 3, "dog": 3}
    result = correspondence.run(PatchPixels(), data, settings)
    assert result.metrics["pck"] > 0.9
    assert max(result.metrics["floor_same_pixel"], result.metrics["floor_mean_point"]) < 0.5
    rows = result.tables["categories"]
    assert [row["category"] for row in rows] == ["cat", "dog"] and [row["points"] for row in rows] == [15, 15]
    assert result.metrics["pck"] == pytest.approx(np.mean([row["pck_per_point"] for row in rows]))
    assert sorted(result.images) == ["00_cat", "01_dog", "02_cat"]
    picture = result.images["00_cat"]
    assert picture.shape == (64, 136, 3) and picture.dtype == np.uint8
    assert (picture == (40, 220, 60)).all(-1).any()  # something green: a right match


def test_averages_over_points_and_over_images_differ_as_defined(tmp_path):
    settings = Settings(pairs_per_category=None, side=64, pictures=0)
    data = correspondence.load(write_set(tmp_path, ("cat",)), settings)
    pairs = data.pairs["cat"]
    # right for all points of the first pair, none of the others
    truth = Frame.of(pairs[0].target_size, 64, "pad").place(pairs[0].target_points)
    predicted = {p.name: np.full((len(p.source_points), 2), -1000) for p in pairs} | {pairs[0].name: truth}
    row = correspondence._score("cat", pairs, predicted, 64, settings)
    assert row["pck_per_point"] == pytest.approx(4 / 15) and row["pck_per_image"] == pytest.approx(1 / 3)


def test_a_stopped_run_goes_on_and_gives_the_same(tmp_path):
    settings = Settings(pairs_per_category=5, side=64, pictures=1)
    data = correspondence.load(write_set(tmp_path / "set"), settings)
    encoder, work = PatchPixels(), tmp_path / "work"
    whole = correspondence.run(encoder, data, settings)

    class Stops(PatchPixels):
        def __call__(self, images, *, key=None):
            if self.seen:
                raise KeyboardInterrupt
            return super().__call__(images, key=key)

    with pytest.raises(KeyboardInterrupt):
        correspondence.run(Stops(), data, settings, workdir=work)
    assert len(list((work / "correspondence").iterdir())) == 1
    resumed, first = PatchPixels(), next((work / "correspondence").iterdir())
    result = correspondence.run(resumed, data, settings, workdir=work)
    assert resumed.seen < encoder.seen
    assert result.metrics == whole.metrics and result.tables == whole.tables
    # A damaged file is made again; other settings do not use it.
    first.write_bytes(first.read_bytes()[:-40])
    assert correspondence.run(PatchPixels(), data, settings, workdir=work).metrics == whole.metrics
    other = PatchPixels()
    correspondence.run(other, data, dataclasses.replace(settings, normalize=False), workdir=work)
    assert other.seen == encoder.seen


def test_sides_and_settings_that_cannot_be(tmp_path):
    data = correspondence.load(write_set(tmp_path, ("cat",), 1), Settings())
    with pytest.raises(ValueError, match="side=60 is no multiple of the 8-pixel patches"):
        correspondence.run(PatchPixels(), data, Settings(side=60))
    wrong = {"rounding": "up", "similarity": "l2", "average": "all", "resize": "crop", "alpha": 0.0}
    for field, value in wrong.items():
        with pytest.raises(ValueError, match=field):
            Settings(**{field: value})


def edit(**changes):
    """A defect: fields of the first annotation changed, or removed where None."""

    def apply(root: Path):
        path = sorted((root / "PairAnnotation" / "test").iterdir())[0]
        fields = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))

    return apply


def first_annotation(root: Path) -> Path:
    return sorted((root / "PairAnnotation" / "test").iterdir())[0]


def turned(root: Path):
    """A defect: an image that viewers turn by a quarter."""
    path = root / "JPEGImages/cat/src0.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path, exif=exif)


BROKEN = {
    "turned image": (turned, r"src0\.png is to be turned"),
    "image missing": (lambda r: (r / "JPEGImages/cat/src0.png").unlink(), r"src0\.png"),
    "image is no image": (lambda r: (r / "JPEGImages/cat/trg0.png").write_bytes(b"<html>"), r"trg0\.png"),
    "annotation missing": (lambda r: first_annotation(r).unlink(), r"test\.txt, line 1"),
    "not JSON": (lambda r: first_annotation(r).write_text('{"src'), "is not JSON"),
    "a list": (lambda r: first_annotation(r).write_text("[]"), "one JSON object"),
    "no points": (edit(src_kps=None), "src_kps"),
    "empty points": (edit(src_kps=[]), "src_kps"),
    "points of one side": (edit(src_kps=[[1, 2]]), "1 points in src_kps, 4 in trg_kps"),
    "text as points": (edit(trg_kps=[["a", 1]]), "trg_kps must be numbers"),
    "NaN": (edit(trg_kps=[[float("nan"), 1]] * 4), "finite"),
    "point outside": (edit(trg_kps=[[70, 1]] * 4), r"\[70\.0, 1\.0\] of trg_kps lies outside the 64x48"),
    "wrong size": (edit(trg_imsize=[48, 64, 3]), "trg_imsize"),
    "empty box": (edit(trg_bndbox=[5, 5, 5, 9]), "trg_bndbox"),
    "path": (edit(src_imname="../../secret.png"), "plain name"),
    "category": (edit(category="dog"), "how its name ends"),
    "no pairs": (lambda r: (r / "Layout/large/test.txt").write_text("\n"), "names no pairs"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_sets_are_refused_by_name(tmp_path, name):
    defect, message = BROKEN[name]
    root = write_set(tmp_path, ("cat",), 2)
    defect(root)
    with pytest.raises(DataError, match=message):
        correspondence.load(root, Settings())


def test_no_such_split(tmp_path):
    with pytest.raises(DataError, match="PairAnnotation/val"):
        read_pairs(write_set(tmp_path, ("cat",), 1), "val")


def test_an_image_that_breaks_when_decoded_is_named(tmp_path):
    root = write_set(tmp_path, ("cat",), 1)
    path = root / "JPEGImages/cat/src0.png"
    path.write_bytes(path.read_bytes()[:200])  # the header reads
    settings = Settings(pairs_per_category=None, side=64)
    with pytest.raises(DataError, match="src0.png"):
        correspondence.run(PatchPixels(), correspondence.load(root, settings), settings)


def test_without_a_list_every_annotation_counts(tmp_path):
    listed, digest = read_pairs(write_set(tmp_path / "a", listed=True))
    unlisted, same = read_pairs(write_set(tmp_path / "b", separator="_", listed=False))
    assert [p.name.replace(":", "_") for p in listed] == [p.name for p in unlisted] and digest == same
    cut = tmp_path / "a" / "Layout" / "large" / "test.txt"
    cut.write_text(cut.read_text().splitlines()[1])
    assert len(read_pairs(tmp_path / "a")[0]) == 1


def test_matching_is_one_compiled_program(tmp_path):
    settings = Settings(pairs_per_category=None, side=64, pictures=0)
    data = correspondence.load(write_set(tmp_path, ("cat",)), settings)  # pairs of 4, 5 and 6 points
    before = correspondence.match._cache_size()
    correspondence.run(PatchPixels(), data, settings)
    assert correspondence.match._cache_size() - before <= 1


def test_floors_of_real_pairs():
    """What needs no features is known for a small published-style set: 3.9% and 6.8%, averaged over images."""
    root = Path(os.environ.get("EUPE_DATA_DIR", Path(__file__).parents[3] / "shared" / "data")) / "pairs_like_spair"
    if not root.is_dir():
        pytest.skip(f"no keypoint pairs in {root}; set EUPE_DATA_DIR")
    settings = dataclasses.replace(correspondence.STANDARD, side=512)
    (pairs,) = correspondence.load(root, settings).pairs.values()
    assert len(pairs) == 60 and sum(len(p.source_points) for p in pairs) == 960
    unused = {p.name: np.zeros((len(p.source_points), 2)) for p in pairs}
    row = correspondence._score("scene", pairs, unused, 512, settings)
    assert (round(row["same_pixel"], 3), round(row["mean_point"], 3)) == (0.039, 0.068)
