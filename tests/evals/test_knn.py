"""Nearest neighbours: the same as independent implementations, however blocks are cut, and end to end on images."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from eupe_jax.evals import classification, knn
from eupe_jax.evals.interface import DataError, Result
from eupe_jax.sharding.mesh import batch_sharding, make_mesh, replicated
from tests.evals.image_sets import CLASSES, jpeg, picture, write_folders, write_shards, write_tar
from tests.evals.test_features import tiny_encoder

SMALL = knn.Settings(ks=(1, 3, 5), reported_k=3, resize=36, crop=32, batch_size=8)


def clusters(seed: int, train: int, test: int, width: int, classes: int):
    """Features of overlapping clusters, of very different lengths: (train, labels, test, labels)."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, width))

    def draw(count):
        labels = rng.integers(classes, size=count)
        x = (centres[labels] + rng.normal(size=(count, width))) * rng.uniform(0.2, 5, (count, 1))
        return x.astype(np.float32), labels.astype(np.int32)

    return (*draw(train), *draw(test))


def reference_votes(train, train_labels, test, classes, ks, temperature):
    """The released protocol in PyTorch and float64: {k: votes}."""
    unit = lambda x: torch.nn.functional.normalize(torch.from_numpy(x).double(), dim=1)  # noqa: E731
    similarity, index = (unit(test) @ unit(train).T).topk(max(ks), dim=1)
    weights = torch.softmax(similarity / temperature, dim=1)
    onehot = torch.nn.functional.one_hot(torch.from_numpy(train_labels).long()[index], classes)
    return {k: (weights[:, :k, None] * onehot[:, :k]).sum(1).numpy() for k in ks}


@pytest.mark.parametrize("blocks", [(500, 64), (37, 5), (1, 1000)])
def test_softmax_votes_equal_pytorch(blocks):
    train, train_labels, test, _ = clusters(0, 211, 23, 24, 9)
    settings = knn.Settings(ks=(3, 10, 50), train_block=blocks[0], query_block=blocks[1])
    similarity, index = knn.neighbours(train, test, settings)
    votes = knn.vote(similarity, train_labels[index], 9, settings)
    expected = reference_votes(train, train_labels, test, 9, (3, 10, 50), settings.temperature)
    assert votes.keys() == expected.keys()
    for k in expected:
        np.testing.assert_allclose(votes[k], expected[k], atol=2e-6)
    ranked, _, nearest = knn.classify(train, train_labels, test, 9, settings)
    np.testing.assert_array_equal(nearest, index)
    for k in expected:
        np.testing.assert_array_equal(ranked[k][:, 0], expected[k].argmax(1))


def test_devices_do_not_wait_for_one_another():
    """Hundreds of small blocks are in flight at once; a collective in each would be an opportunity to hang."""
    mesh = make_mesh()
    whole = functools.partial(jax.ShapeDtypeStruct, sharding=replicated(mesh))
    cut = functools.partial(jax.ShapeDtypeStruct, sharding=batch_sharding(mesh))
    best = cut((8, 50), np.float32), cut((8, 50), np.int32)
    count = whole((), np.int32)
    program = knn._merge.lower(mesh, best, cut((8, 24), np.float32), whole((7, 24), np.float32), count, count, False)
    text = program.compile().as_text()
    assert mesh.size == 8 and "TopK" in text
    assert not [name for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute") if name in text]


@pytest.mark.parametrize("normalize", [True, False])
def test_majority_votes_equal_sklearn(normalize):
    """The paper's text: a majority of the k nearest by L2 distance."""
    train, train_labels, test, _ = clusters(1, 150, 40, 12, 6)
    settings = knn.Settings(ks=(1, 10, 20), vote="majority", normalize=normalize, train_block=64)
    ranked, _, _ = knn.classify(train, train_labels, test, 6, settings)
    unit = (lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)) if normalize else (lambda x: x)
    for k in (1, 10, 20):
        reference = KNeighborsClassifier(k, algorithm="brute").fit(unit(train), train_labels)
        np.testing.assert_array_equal(ranked[k][:, 0], reference.predict(unit(test)))


def test_normalisation_matters_for_the_nearest():
    """The nearest by angle and the nearest by distance differ here: a switch that did nothing would show."""
    train = np.array([[10.0, 0.0], [0.6, 0.8]], np.float32)
    test = np.array([[0.9, 0.1]], np.float32)
    found = {
        normalize: knn.neighbours(
            train, test, knn.Settings(ks=(1,), reported_k=1, vote="majority", normalize=normalize)
        )
        for normalize in (True, False)
    }
    assert found[True][1].tolist() == [[0]] and found[False][1].tolist() == [[1]]


def test_equal_similarities_go_to_the_lower_row_in_any_blocks():
    train = np.repeat(np.eye(3, dtype=np.float32), 5, axis=0)
    for block in (15, 4, 1):
        settings = knn.Settings(ks=(4,), reported_k=4, train_block=block)
        assert knn.neighbours(train, train[5:6], settings)[1].tolist() == [[5, 6, 7, 8]]


def test_leaving_one_out_passes_over_the_nearest():
    train, train_labels, _, _ = clusters(2, 60, 1, 8, 4)
    settings = knn.Settings(ks=(7,), reported_k=7, leave_one_out=True, train_block=17)
    _, _, index = knn.classify(train, train_labels, train, 4, settings)
    assert index.shape == (60, 7) and not (index == np.arange(60)[:, None]).any()
    with_self, _ = knn.neighbours(
        train, train, dataclasses.replace(settings, leave_one_out=False, ks=(8,), reported_k=8)
    )
    without, _ = knn.neighbours(train, train, settings)
    np.testing.assert_array_equal(with_self[:, 1:], without)
    many = dataclasses.replace(settings, ks=(7, 100))
    assert list(knn.classify(train, train_labels, train, 4, many)[0]) == [7, 59]
    with pytest.raises(ValueError, match="too few"):
        knn.neighbours(train[:1], train[:1], settings)


def test_ks_above_the_training_images_become_their_number():
    train, train_labels, test, _ = clusters(3, 15, 4, 8, 3)
    ranked, _, index = knn.classify(train, train_labels, test, 3, knn.Settings())
    assert list(ranked) == [10, 15] and index.shape == (4, 15)


def test_accuracies_count_images_and_classes():
    """Three images of class 0 right, one of class 1 wrong but second; class 2 has no images."""
    ranked = np.array([[0, 1, 2, 3, 4, 5]] * 4)[:, :5]
    found = classification.accuracies(ranked, np.array([0, 0, 0, 1]))
    assert found == {"top1": 0.75, "top5": 1.0, "mean_per_class": 0.5}
    assert classification.accuracies(ranked, np.array([0, 0, 0, 5]))["top5"] == 0.75
    assert "top5" not in classification.accuracies(classification.rank(np.eye(5)), np.arange(5))
    rows = classification.class_table(np.array([0, 0, 2, 2]), np.array([0, 0, 0, 1]), ("a", "b", "c"))
    assert [r["images"] for r in rows] == [3, 1, 0] and [r["correct"] for r in rows] == [2, 0, 0]
    assert [r["most_taken_for"] for r in rows] == ["c", "c", ""] and np.isnan(rows[2]["accuracy"])


@pytest.fixture(scope="module")
def encoder():
    return tiny_encoder()


def test_whole_evaluation_on_shards(encoder, tmp_path):
    data = knn.load(write_shards(tmp_path / "set", 30, 12), SMALL)
    result = knn.run(encoder, data, SMALL, workdir=tmp_path / "work")
    assert isinstance(result, Result)
    assert result.metrics["top1"] > 0.6  # pictures of three simple kinds: a random ViT tells them apart; chance is 1/3
    assert result.metrics["top1"] == result.metrics["top1_k3"] == result.tables["by_k"][1]["top1"]
    assert [row["k"] for row in result.tables["by_k"]] == [1, 3, 5]
    assert [row["class"] for row in result.tables["by_class"]] == list(CLASSES)
    assert sum(row["correct"] for row in result.tables["by_class"]) == round(12 * result.metrics["top1"])
    picture_ = result.images["neighbours"]
    assert picture_.dtype == np.uint8 and picture_.shape[2] == 3
    assert result.details["train_images"] == 30 and result.details["crop"] == 32

    again = knn.run(encoder, data, SMALL, workdir=tmp_path / "work")
    assert again.metrics == result.metrics and again.tables == result.tables
    np.testing.assert_array_equal(again.images["neighbours"], picture_)


def test_features_that_hardly_differ_are_reported(tmp_path):
    """A fresh LayerScale of 1e-5 lets next to nothing of the image into the class token."""
    data = knn.load(write_shards(tmp_path), SMALL)
    result = knn.run(tiny_encoder(layerscale_init=1e-5), data, SMALL)
    assert result.details["median_similarity_range"] < 1e-6 and "rounding" in result.details["range_note"]


def test_shuffled_labels_are_at_chance(encoder, tmp_path):
    """The control: with labels that have nothing to do with the pictures the accuracy falls."""
    data = knn.load(write_shards(tmp_path, 30, 12), SMALL)
    rng = np.random.default_rng(0)
    data.train.labels[:] = rng.permutation(data.train.labels)
    assert knn.run(encoder, data, SMALL).metrics["top1"] < 0.6


def test_leave_one_out_needs_no_test_split(encoder, tmp_path):
    settings = dataclasses.replace(SMALL, leave_one_out=True)
    write_shards(tmp_path, 18)
    (tmp_path / "test-000000.tar").unlink()
    result = knn.run(encoder, knn.load(tmp_path, settings), settings)
    assert result.details["test_images"] == 18 and result.metrics["top1"] < 1.0 + 1e-9
    with pytest.raises(DataError, match="expected a split called"):
        knn.load(tmp_path, SMALL)


class NoClassToken:
    """An encoder of one patch token per 12 pixels: mean colours."""

    name, fingerprint, cls_dim, patch_dim, patch_size, resolution = "colours", "00", None, 3, 12, 36

    def __call__(self, images, *, key=None):
        b, h, w, _ = images.shape
        return {"patches": images.reshape(b, h // 12, 12, w // 12, 12, 3).mean((2, 4)).astype(np.float32) / 255}


def test_encoders_without_class_token_and_with_other_patches(tmp_path):
    data = knn.load(write_folders(tmp_path), SMALL)
    with pytest.raises(ValueError, match="colours has no class token: set token='patch_mean'"):
        knn.run(NoClassToken(), data, SMALL)
    result = knn.run(NoClassToken(), data, dataclasses.replace(SMALL, token="patch_mean"))
    assert "range_note" not in result.details
    assert result.details["crop"] == 36 and "32 is no multiple of the patch size 12" in result.details["crop_note"]


def test_undecodable_image_is_named(encoder, tmp_path):
    data_folder = write_shards(tmp_path, 6, 6)
    write_tar(data_folder / "test-000000.tar", [("broken.jpg", jpeg(picture(0, 0))[:200]), ("broken.cls", b"disc")])
    with pytest.raises(DataError, match=r"test-000000.tar:broken.jpg"):
        knn.run(encoder, knn.load(data_folder, SMALL), SMALL)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ks": ()}, "ks must be positive"),
        ({"ks": (0, 10)}, "ks must be positive"),
        ({"reported_k": 7}, "hold reported_k=7"),
        ({"vote": "mean"}, "vote must be"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"normalize": False}, "set normalize=True or vote='majority'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        knn.Settings(**changes)
