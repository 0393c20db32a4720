"""Feature extraction: the tokens of every image in order, whatever the batches; kept, resumed, and never mixed up."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from eupe_jax.data.sources import ArraySource, ImageFolder, Record
from eupe_jax.evals import features
from eupe_jax.evals.encoders import FlaxEncoder
from eupe_jax.evals.interface import DataError
from eupe_jax.evals.labelled import load_split
from eupe_jax.models import zoo
from eupe_jax.training.encoders import LoadedEncoder
from tests.evals.image_sets import jpeg, picture, write_shards


def tiny_encoder(seed: int = 0, **overrides) -> FlaxEncoder:
    """A ViT of two blocks with random weights whose blocks and class token matter."""
    overrides = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8, "layerscale_init": 0.5, **overrides}
    module = zoo.build("eupe_vitt16", **overrides)
    variables = jax.jit(module.init)(jax.random.key(seed), jnp.zeros((1, 32, 32, 3)))
    manifest = {"resolution": 32, "mean": [0.5] * 3, "std": [0.25] * 3}
    return FlaxEncoder(LoadedEncoder("eupe_vitt16", overrides, module, variables, manifest))


class Counting:
    """Passes images on to an encoder, counts them, and dies after `fatal` batches."""

    def __init__(self, encoder, fatal: int = 10**9):
        self._encoder, self._fatal = encoder, fatal
        self.name, self.fingerprint = encoder.name, encoder.fingerprint
        self.batches = 0

    def __call__(self, images):
        self.batches += 1
        if self.batches > self._fatal:
            raise KeyboardInterrupt
        return self._encoder(images)


@pytest.fixture(scope="module")
def encoder():
    return tiny_encoder()


@pytest.fixture(scope="module")
def images():
    return np.stack([np.asarray(picture(i % 3, i, (32, 32))) for i in range(21)])


@pytest.fixture(scope="module")
def wanted(encoder, images):
    """Tokens of all images in one batch, straight from the module."""
    loaded = encoder.loaded
    pixels = (images.astype(np.float32) / 255 - 0.5) / 0.25
    return jax.tree.map(np.asarray, loaded.module.apply(loaded.variables, pixels))


@pytest.mark.parametrize("batch_size", [4, 8, 21, 50])  # 8: cut over the eight devices
def test_features_are_those_of_the_module_whatever_the_batches(encoder, images, wanted, batch_size):
    got = features.extract(encoder, images, batch_size)
    assert got.keys() == {"cls", "patches"}
    for kind in got:
        assert got[kind].dtype == np.float32
        np.testing.assert_allclose(got[kind], wanted[kind], atol=2e-5)


def test_only_the_wanted_kinds(encoder, images, wanted):
    got = features.extract(encoder, images, 8, kinds=("cls", "patch_mean"))
    assert got.keys() == {"cls", "patch_mean"}
    np.testing.assert_allclose(got["patch_mean"], wanted["patches"].mean((1, 2)), atol=2e-5)


def test_sources_are_decoded_in_order(encoder, images, wanted):
    got = features.extract(encoder, ArraySource(images), 4, threads=3)
    np.testing.assert_allclose(got["cls"], wanted["cls"], atol=2e-5)


def test_centre_crop_is_torchvisions():
    """Sizes and offsets worked out by the rules of Resize and CenterCrop, on sizes that round."""
    for width, height, resize, crop in ((50, 37, 24, 21), (37, 50, 24, 16), (31, 31, 33, 32), (101, 33, 16, 9)):
        image = picture(0, width, (width, height))
        short = min(width, height)
        w, h = int(resize * width / short), int(resize * height / short)
        left, top = int(round((w - crop) / 2.0)), int(round((h - crop) / 2.0))
        expected = np.asarray(image.resize((w, h), Image.Resampling.BICUBIC))[top : top + crop, left : left + crop]
        got = features.CentreCrop(resize, crop)(Record(np.asarray(image), "x"))
        assert got.shape == (crop, crop, 3)
        np.testing.assert_array_equal(got, expected)


def test_crops_fit_the_patches():
    assert features.CentreCrop(256, 224).fitted(14).crop == 224
    assert features.CentreCrop(256, 224).fitted(48).crop == 240
    assert features.CentreCrop(256, 256).fitted(60).crop == 240  # 300 is larger than the short side
    with pytest.raises(ValueError, match="crop of 300 pixels does not fit into a short side of 256"):
        features.CentreCrop(256, 300)


def test_squash_shows_the_whole_picture(images):
    assert features.Squash(16)(Record(jpeg(picture(0, 0, (50, 20))), "x")).shape == (16, 16, 3)
    np.testing.assert_array_equal(features.Squash(32)(Record(images[0], "x")), images[0])


def test_kept_features_are_read_again_bit_for_bit(encoder, tmp_path):
    train = load_split(write_shards(tmp_path / "set", 13), "train")
    options = dict(prepare=features.CentreCrop(34, 32), kinds=("cls", "patches"), workdir=tmp_path / "work", chunk=4)
    plain = features.extract(encoder, train, 4, **{**options, "workdir": None})
    first, second = Counting(encoder), Counting(encoder)
    kept = features.extract(first, train, 4, **options)
    again = features.extract(second, train, 4, **options)
    assert (first.batches, second.batches) == (4, 0)
    for kind in plain:
        np.testing.assert_array_equal(kept[kind], plain[kind])
        np.testing.assert_array_equal(again[kind], plain[kind])


def test_a_killed_run_goes_on_where_it_was(encoder, images, tmp_path):
    plain = features.extract(encoder, images, 4)
    killed, resumed = Counting(encoder, fatal=4), Counting(encoder)
    with pytest.raises(KeyboardInterrupt):
        features.extract(killed, images, 4, workdir=tmp_path, chunk=8)
    got = features.extract(resumed, images, 4, workdir=tmp_path, chunk=8)
    assert resumed.batches == 4  # 21 images are 6 batches; the first piece, 2 batches, was finished
    np.testing.assert_array_equal(got["cls"], plain["cls"])


DAMAGE = {
    "truncated": lambda b: b[:-7],
    "emptied": lambda b: b"",
    "no header": lambda b: b"\xff" * 40,
    "a bit turned": lambda b: b[:-5] + bytes([b[-5] ^ 16]) + b[-4:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_piece_is_computed_again(encoder, images, tmp_path, caplog, damage):
    whole = features.extract(encoder, images, 7, kinds=("cls",), workdir=tmp_path, chunk=7)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 3
    files[1].write_bytes(DAMAGE[damage](files[1].read_bytes()))
    with caplog.at_level(logging.WARNING):
        counting = Counting(encoder)
        again = features.extract(counting, images, 7, kinds=("cls",), workdir=tmp_path, chunk=7)
    assert counting.batches == 1 and files[1].name in caplog.text
    np.testing.assert_array_equal(again["cls"], whole["cls"])
    assert sorted(p.name for p in files[1].parent.iterdir()) == [p.name for p in files]  # no temporary files


def test_nothing_is_mixed_up(encoder, tmp_path):
    """Another encoder, other images, another crop, other kinds: all computed."""
    train = load_split(write_shards(tmp_path / "a", 6), "train")
    other = load_split(write_shards(tmp_path / "b", 8), "train")
    options = dict(prepare=features.CentreCrop(34, 32), kinds=("cls",), workdir=tmp_path / "work")
    features.extract(encoder, train, 8, **options)
    changes = (
        (tiny_encoder(1), train, {}),
        (tiny_encoder(0, rope_base=50.0), train, {}),
        (encoder, other, {}),
        (encoder, train, {"prepare": features.CentreCrop(36, 32)}),
        (encoder, train, {"prepare": features.Squash(32)}),
        (encoder, train, {"kinds": ("patch_mean",)}),
    )
    for changed, source, more in changes:
        counting = Counting(changed)
        features.extract(counting, source, 8, **{**options, **more})
        assert counting.batches == 1
    assert len(list((tmp_path / "work" / "features").iterdir())) == 7


def test_files_of_another_fingerprint_are_not_used(tmp_path, caplog):
    features.save_arrays(tmp_path / "x.safetensors", {"a": np.arange(6.0), "b": np.zeros((0, 3))}, "mine")
    assert features.load_arrays(tmp_path / "missing", "mine") is None and not caplog.text
    got = features.load_arrays(tmp_path / "x.safetensors", "mine")
    np.testing.assert_array_equal(got["a"], np.arange(6.0))
    assert got["b"].shape == (0, 3)
    assert features.load_arrays(tmp_path / "x.safetensors", "yours") is None and "fingerprint" in caplog.text


def test_an_unwritable_place_is_an_error(tmp_path):
    (tmp_path / "features").write_text("a file")
    with pytest.raises(OSError, match="features"):
        features.save_arrays(tmp_path / "features" / "x", {"a": np.zeros(3)}, "mine")


def test_broken_images_are_named(encoder, tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(picture(0, i, (32, 32))))
    (tmp_path / "3.jpg").write_bytes(jpeg(picture(0, 3, (32, 32)))[:300])
    with pytest.raises(DataError, match=r"3\.jpg"):
        features.extract(encoder, ImageFolder(tmp_path), 2)
    source = ImageFolder(tmp_path)
    (tmp_path / "3.jpg").unlink()
    with pytest.raises(DataError, match=r"3.*(No such file|cannot be read)"):
        features.extract(encoder, source, 2)


def test_what_cannot_be_done_is_refused(encoder, images, tmp_path):
    with pytest.raises(ValueError, match="no images"):
        features.extract(encoder, images[:0])
    with pytest.raises(ValueError, match="unknown kinds .*'storage'"):
        features.extract(encoder, images, kinds=("storage",))
    with pytest.raises(ValueError, match="gives no 'cls' tokens, only .*patches"):
        features.extract(lambda x: {"patches": np.zeros((len(x), 2, 2, 3))}, images, kinds=("cls",))
    with pytest.raises(ValueError, match="images of several sizes"):
        features.extract(encoder, ArraySource([images[0], images[1][:16]]), 1)
    with pytest.raises(ValueError, match="'cls' features of images 20 to 20 are not all finite"):
        features.extract(lambda x: {"cls": np.where(x[:, 0, 0] == images[20, 0, 0], np.nan, 1.0)}, images, 20)
    with pytest.raises(ValueError, match="this encoder has none"):
        features.extract(lambda x: encoder(x), images, workdir=tmp_path)
    with pytest.raises(ValueError, match="`prepare` is for sources"):
        features.extract(encoder, images, prepare=features.Squash(32))
    with pytest.raises(ValueError, match="must be a dataclass"):
        features.extract(encoder, ArraySource(images), workdir=tmp_path, prepare=lambda record: record.data)
    assert dataclasses.is_dataclass(features.CentreCrop)
