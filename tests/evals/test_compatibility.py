"""Compatibility of teachers: closed forms, other implementations on the whole matrix, and what must not matter."""

import dataclasses

import jax
import numpy as np
import pytest

from eupe_jax.evals import compatibility, compatibility_report
from eupe_jax.evals.compatibility import Settings
from eupe_jax.evals.compatibility_measures import Moments, alignment, predictability, spread
from eupe_jax.evals.folders import Subset, read_folder
from eupe_jax.evals.interface import DataError
from eupe_jax.models.resize import resize
from tests.evals.image_sets import jpeg, picture

FOLDS = 4


def moments_of(tokens, folds=None, size=1000):
    """Moments of {teacher: [images, places, width]}, batch by batch."""
    count, places, _ = next(iter(tokens.values())).shape
    folds = np.arange(count) % FOLDS if folds is None else folds
    moments = Moments({name: x.shape[-1] for name, x in tokens.items()}, places, FOLDS)
    for i in range(0, count, size):
        moments.add({name: x[i : i + size] for name, x in tokens.items()}, folds[i : i + size])
    return moments


def related(seed=0, images=90, places=5, widths=(12, 9)):
    """Two teachers that share some directions, with scales, offsets and a position map of their own."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(images, places, 6))
    tokens = {}
    for name, width in zip("ab", widths, strict=True):
        x = shared @ rng.normal(size=(6, width)) + rng.normal(size=(images, places, width))
        tokens[name] = x * rng.uniform(0.1, 5, width) + 20 * rng.normal(size=(places, width))
    return tokens


def cka(tokens, normalized=True):
    return alignment(moments_of(tokens), normalized=normalized)["a", "b"].value


def test_the_same_up_to_rotation_and_scale_is_one():
    x = related()["a"]
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(12, 12)))[0]
    assert cka({"a": x, "b": -3.0 * x @ turn + 7.0}, normalized=False) == pytest.approx(1.0, abs=1e-9)
    stretched = x * np.linspace(0.1, 9, 12) + 1.0
    assert cka({"a": x, "b": stretched}) == pytest.approx(1.0, abs=1e-9)
    assert cka({"a": x, "b": stretched}, normalized=False) < 0.99


def biased_cka(x, y):
    x, y = (v - v.mean(0) for v in (x, y))
    return np.linalg.norm(x.T @ y) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)


def test_unrelated_tokens_are_zero_on_average_with_fewer_images_than_coordinates():
    rng = np.random.default_rng(2)
    found, biased = [], []
    for _ in range(12):
        one, other = rng.normal(size=(2, 60, 1, 80))
        # All places of an image say the same: patches are no independent samples.
        found.append(cka({"a": np.repeat(one, 3, 1), "b": np.repeat(other, 3, 1)}))
        biased.append(biased_cka(one[:, 0], other[:, 0]))
    assert min(biased) > 0.5
    assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(len(found)) and abs(np.mean(found)) < 0.05


def test_cka_is_that_of_an_independent_implementation_on_the_whole_matrix():
    tokens = related()
    folds = np.arange(90) % FOLDS
    scaled = {n: x / x.reshape(-1, x.shape[-1]).std(0) for n, x in tokens.items()}

    def covariances(one, other):  # a fold: covariance at every place, averaged
        found = []
        for fold in range(FOLDS):
            x, y = scaled[one][folds == fold], scaled[other][folds == fold]
            at = [np.cov(x[:, p].T, y[:, p].T)[: x.shape[-1], x.shape[-1] :] for p in range(x.shape[1])]
            found.append(np.mean(at, axis=0))
        return found

    def square(one, other):
        covs, total, weight = covariances(one, other), 0.0, 0
        for i in range(FOLDS):
            for j in range(FOLDS):
                pairs = (folds == i).sum() * (folds == j).sum() * (i != j)
                total, weight = total + pairs * np.sum(covs[i] * covs[j]), weight + pairs
        return total / weight

    expected = square("a", "b") / np.sqrt(square("a", "a") * square("b", "b"))
    assert cka(tokens) == pytest.approx(expected, abs=1e-9)


def hsic_of_pairs(x, y):
    """The unbiased estimator of Song et al. (2012), which needs independent samples and the matrix of their pairs."""
    n, k, m = len(x), x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    whole = np.sum(k * m) + k.sum() * m.sum() / (n - 1) / (n - 2) - 2 / (n - 2) * k.sum(0) @ m.sum(0)
    return whole / n / (n - 3)


def test_cka_agrees_with_the_estimator_over_pairs_of_images():
    tokens = related(3, images=400, places=1)
    estimate = alignment(moments_of(tokens), normalized=False)["a", "b"]
    x, y = tokens["a"][:, 0], tokens["b"][:, 0]
    expected = hsic_of_pairs(x, y) / np.sqrt(hsic_of_pairs(x, x) * hsic_of_pairs(y, y))
    assert estimate.value == pytest.approx(expected, abs=0.01)
    assert 0 < estimate.spread < 0.1


def parts(tokens, fit, tested):
    """Normalised tokens of images `fit` and `tested`, less the mean at every place of `fit`: {teacher: [tokens, D]}."""
    both = []
    for chosen in (fit, tested):
        x = {n: (v[chosen] - v[fit].mean(0)) / v.reshape(-1, v.shape[-1]).std(0) for n, v in tokens.items()}
        both.append({n: v.reshape(-1, v.shape[-1]) for n, v in x.items()})
    return both


@pytest.mark.parametrize("penalties", [(0.3,), (1e-3, 0.3, 30.0)])
def test_r2_is_that_of_another_ridge_regression(penalties):
    linear_model = pytest.importorskip("sklearn.linear_model")
    tokens = related(4, images=70)
    folds = np.arange(70) % FOLDS

    def score(fit, tested, penalty):
        train, test = parts(tokens, fit, tested)
        model = linear_model.Ridge(alpha=penalty * len(train["a"]), fit_intercept=False).fit(train["a"], train["b"])
        return np.array([np.sum((test["b"] - model.predict(test["a"])) ** 2), np.sum(test["b"] ** 2)])

    errors = []
    for fold in range(FOLDS):
        choice = (fold + 1) % FOLDS
        inner = (folds != fold) & (folds != choice)
        best = min(penalties, key=lambda p: score(inner, folds == choice, p)[0])  # noqa: B023
        errors.append(score(folds != fold, folds == fold, best))
    error, baseline = np.array(errors).T
    found = predictability(moments_of(tokens), [(("a",), "b")], penalties)[("a",), "b"]
    assert found.value == pytest.approx(1 - error.sum() / baseline.sum(), abs=1e-8)
    assert found.spread == pytest.approx(np.std(1 - error / baseline), abs=1e-8)


def test_r2_has_a_direction_and_several_sources():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(2, 200, 2, 8))
    tokens = {"whole": np.concatenate([x, y], -1), "part": x @ rng.normal(size=(8, 8)), "rest": y, "other": x[::-1]}
    questions = [(("whole",), "part"), (("part",), "whole"), (("other",), "part"), (("part", "rest"), "whole")]
    found = predictability(moments_of(tokens), questions, (1e-4, 1e-2, 1.0, 100.0))
    forward, backward, unrelated, together = (found[question].value for question in questions)
    assert forward > 0.999 and together > 0.99
    assert backward == pytest.approx(0.5, abs=0.05)
    assert unrelated == pytest.approx(0.0, abs=0.02)


def test_what_does_not_depend_on_the_image_is_no_agreement():
    rng = np.random.default_rng(6)
    places = 3 * rng.normal(size=(6, 10))
    tokens = {name: places + rng.normal(size=(300, 6, 10)) for name in "ab"}
    moments = moments_of(tokens)
    assert abs(alignment(moments)["a", "b"].value) < 0.05
    assert abs(predictability(moments, [(("a",), "b")], (0.1, 10.0))[("a",), "b"].value) < 0.02
    assert spread(moments, "a")["place_share"] > 0.8
    x = tokens["a"].reshape(-1, 10)
    assert spread(moments, "a")["place_share"] == pytest.approx(tokens["a"].mean(0).var(0).sum() / x.var(0).sum())


def test_order_of_images_and_size_of_batches_do_not_matter():
    tokens, folds = related(7), np.arange(90) % FOLDS
    order = np.random.default_rng(0).permutation(90)
    shuffled = moments_of({n: x[order] for n, x in tokens.items()}, folds[order], size=7)
    moments, question = moments_of(tokens, folds), (("a",), "b")
    assert alignment(shuffled)["a", "b"].value == pytest.approx(alignment(moments)["a", "b"].value, abs=1e-9)
    one, other = (predictability(m, [question], (0.01, 1.0))[question] for m in (moments, shuffled))
    assert dataclasses.astuple(one) == pytest.approx(dataclasses.astuple(other), abs=1e-9)
    assert spread(shuffled, "b") == pytest.approx(spread(moments, "b"), abs=1e-9)


def test_spread_of_known_variances():
    rng = np.random.default_rng(8)
    std = np.array([50.0, 1.0, 1.0, 1.0, 1e-4])
    x = rng.normal(size=(4000, 1, 5)) * std + 3.0
    found = spread(moments_of({"a": x}), "a")
    assert (found["width"], found["dead"]) == (5, 1)
    assert found["std_median"] == pytest.approx(1, abs=0.05) and found["std_ratio"] == pytest.approx(50, rel=0.05)
    assert found["participation_raw"] == pytest.approx(1.0, abs=0.01)
    # Four coordinates of variance 1, and one that the floor holds at .01.
    assert found["participation"] == pytest.approx(4.01**2 / 4.0001, rel=0.01)
    assert found["effective_rank"] == pytest.approx(4.07, abs=0.02)


def test_tokens_that_say_nothing_are_refused():
    tokens = related()
    moments_of(tokens).require_variation("patch tokens")
    rounded = tokens["b"][:1] * (1 + 1e-7 * np.random.default_rng(0).normal(size=tokens["b"].shape))
    with pytest.raises(ValueError, match="the patch tokens of teacher 'b' are the same for every image"):
        moments_of({**tokens, "b": rounded}).require_variation("patch tokens")
    # In every fold another coordinate varies: no fold confirms what another one shows.
    apart = np.eye(4)[[0, 1, 2, 3] * 2][:, None] * np.repeat([1.0, -1.0], 4)[:, None, None]
    with pytest.raises(ValueError, match="too few to tell how the tokens of teacher 'a' vary"):
        spread(moments_of({"a": apart}), "a")


class Pixels:
    """A teacher of `width` random functions of the pixels of each patch; counts the images it has seen."""

    cls_dim = None

    def __init__(self, name, width=6, patch_size=8, resolution=32, cls_dim=None, noise=0.0):
        self.name, self.patch_dim, self.patch_size, self.resolution = name, width, patch_size, resolution
        self.cls_dim, self.fingerprint, self.seen, self.stop_at = cls_dim, name, 0, None
        self._weights = np.random.default_rng(len(name)).normal(size=(patch_size * patch_size * 3, width))

    def __call__(self, images, *, key=None):
        if self.stop_at is not None and self.seen >= self.stop_at:
            raise KeyboardInterrupt
        self.seen += len(images)
        b, side, p = len(images), images.shape[1], self.patch_size
        x = images.reshape(b, side // p, p, side // p, p, 3).transpose(0, 1, 3, 2, 4, 5) / 255
        patches = np.float32(x.reshape(b, side // p, side // p, -1) @ self._weights)
        return {"patches": patches} | ({"cls": patches.max((1, 2))[:, : self.cls_dim]} if self.cls_dim else {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures")
    for i in range(70):
        (path / f"{i:02d}.jpg").write_bytes(jpeg(picture(i % 3, i)))
    return path


SETTINGS = Settings(images=70, batch_size=16, save_every=32)


def teachers():
    return {"fine": Pixels("fine", cls_dim=4), "coarse": Pixels("rough one", 5, 16), "third": Pixels("a third")}


def test_grids_are_brought_to_the_largest_as_training_does(folder):
    images, found = compatibility.load(folder, SETTINGS), teachers()
    moments = compatibility._accumulate(found, images, SETTINGS, None)
    assert set(moments["cls"].widths) == {"fine"} and moments["cls"].sums.shape == (4, 1, 4)
    assert moments["patches"].sums.shape == (4, 16, 17)
    squash = compatibility.Squash(32)
    pixels = np.stack([squash(images[i]) for i in range(70)])
    coarse = np.asarray(resize(found["coarse"](pixels)["patches"], (4, 4))).reshape(70, 16, 5)
    np.testing.assert_allclose(moments["patches"].sums.sum(0)[:, 6:11], coarse.sum(0), rtol=1e-5, atol=1e-4)
    assert moments["patches"].images.sum() == 70


def test_the_report(folder):
    result = compatibility.run(teachers(), compatibility.load(folder, SETTINGS), SETTINGS)
    assert [(row["tokens"], row["one"], row["other"]) for row in result.tables["pairs"]] == [
        ("patches", "fine", "coarse"), ("patches", "fine", "third"), ("patches", "coarse", "third")
    ]  # fmt: skip
    rows = {(row["tokens"], row["teacher"]): row for row in result.tables["teachers"]}
    assert len(rows) == 4 and rows["cls", "fine"]["r2_from_all_others"] is None
    assert result.metrics["patches_r2_fine_to_third"] > 0.6  # both see smooth patches through few functions
    assert result.metrics["patches_r2_others_to_third"] == rows["patches", "third"]["r2_from_all_others"]
    summary = "\n".join(result.details["summary"])
    assert (
        "third adds little that the others together do not hold" in summary
        and "fine is alone in having class tokens" in summary
    )
    picture = result.images["compatibility"]
    assert picture.dtype == np.uint8 and picture.shape[2] == 3 and (picture < 150).mean() > 0.01
    settings = dataclasses.replace(SETTINGS, patch_mean=True)
    both = compatibility.run(teachers(), compatibility.load(folder, settings), settings)
    assert {row["tokens"] for row in both.tables["pairs"]} == {"cls", "patches"}
    assert both.metrics["patches_cka_fine_coarse"] == result.metrics["patches_cka_fine_coarse"]


def test_the_order_of_a_folder_does_not_matter(folder):
    source = read_folder(folder)
    order = np.random.default_rng(0).permutation(70)
    one = compatibility.run(teachers(), Subset(source, range(70)), SETTINGS).metrics
    other = compatibility.run(teachers(), Subset(source, order), dataclasses.replace(SETTINGS, batch_size=8)).metrics
    assert one == pytest.approx(other, abs=1e-6, rel=1e-6)


def test_a_stopped_run_goes_on_and_finds_the_same(folder, tmp_path):
    images = compatibility.load(folder, SETTINGS)
    whole = compatibility._accumulate(teachers(), images, SETTINGS, None)

    def seen(changed="", stop_at=None):
        """How many images a run with these teachers looks at; its moments are those of a run that is not stopped."""
        found = teachers()
        found["third"].stop_at = stop_at
        found["fine"].fingerprint += changed
        moments = compatibility._accumulate(found, images, SETTINGS, tmp_path)
        for kind, own in whole.items():
            jax.tree.map(np.testing.assert_array_equal, moments[kind].arrays(), own.arrays())
        return found["fine"].seen

    with pytest.raises(KeyboardInterrupt):
        seen(stop_at=48)
    assert seen() == 48  # 32 of 70 were kept; the last batch is padded to 16
    assert seen() == 0
    assert seen(changed=" with other weights") == 80


def test_bad_input_is_refused(folder, tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(picture(0, 0)))
    with pytest.raises(DataError, match="holds 1 image.*at least 64"):
        compatibility.load(tmp_path, SETTINGS)
    images = compatibility.load(folder, SETTINGS)
    with pytest.raises(ValueError, match="two teachers or more"):
        compatibility.run({"fine": Pixels("fine")}, images, SETTINGS)
    with pytest.raises(DataError, match="copies of each other"):
        compatibility.run(teachers(), Subset(read_folder(folder), [0] * 70), SETTINGS)
    for wrong in ({"images": 3}, {"folds": 2}, {"penalties": ()}, {"penalties": (0.0,)}, {"resolution": -1}):
        with pytest.raises(ValueError, match="must|images"):
            Settings(**wrong)


def row(name, tokens="patches", **changes):
    usual = {"width": 100, "std_median": 1.0, "std_largest": 2.0, "std_ratio": 2.0, "dead": 0, "participation": 40.0}
    usual |= {"place_share": 0.1, "r2_from_all_others": 0.5}
    return {"tokens": tokens, "teacher": name, **usual, **changes}


def pair(one, other, forward, backward, cka, tokens="patches"):
    return {"tokens": tokens, "one": one, "other": other, "cka": cka, "r2_one_to_other": forward,
            "r2_other_to_one": backward}  # fmt: skip


def test_the_summary_says_what_the_tables_hold():
    pairs = [pair("a", "b", 0.9, 0.5, 0.7), pair("a", "c", 0.1, 0.2, 0.05), pair("b", "c", 0.15, 0.1, 0.1)]
    rows = [row("a", std_ratio=60.0), row("b", dead=3, place_share=0.4), row("c", std_median=30.0, participation=2.0)]
    lines = compatibility_report.summary(pairs, rows, 2000, 4)
    text = "\n".join(lines)
    for words in (
        "b adds little that a does not hold: a predicts 0.90 of the variance of its patch tokens",
        "patch tokens of a are partly in b (R2 0.50)",
        "patch tokens of c are hard to predict from any other teacher (best R2 0.15, from b)",
        "closest a and b (0.70), farthest apart a and c (0.05)",
        "One coordinate of the patch tokens of a varies 60 times",
        "3 of 100 coordinates of the patch tokens of b",
        "40% of the variance of the patch tokens of b is the place alone",
        "about 2 directions of 100",
        "patch tokens of c are 30 times the size of those of",
        "What this cannot tell",
    ):
        assert words in text
    assert "images to fit class tokens" not in text
    wide = [row(n, "cls", width=2000) for n in "ab"]
    assert any(
        "Only 1500 images" in x
        for x in compatibility_report.summary([pair("a", "b", 0.5, 0.5, 0.5, "cls")], wide, 2000, 4)
    )


def test_what_all_others_hold_together_is_said():
    pairs = [pair(a, b, 0.5, 0.5, 0.5) for a, b in ("ab", "ac", "bc")]
    rows = [row("a"), row("b", r2_from_all_others=0.85), row("c")]
    text = "\n".join(compatibility_report.summary(pairs, rows, 2000, 4))
    assert "b adds little that the others together do not hold: they predict 0.85" in text
