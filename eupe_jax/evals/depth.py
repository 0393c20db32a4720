"""Linear depth estimation on frozen patch tokens, as on NYUv2 (EUPE App. C.4): batch norm, a 1x1 convolution, bins.

The defaults are the authors' protocol with the quirks of their code; each quirk is a setting. `schedule_scale` fits
it to a small set, and only then: figures of scaled runs are figures of their own. Layout: depth_data.py.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from eupe_jax.data.host import random_generator
from eupe_jax.evals import dense_data, dense_pictures, dense_training, depth_data, depth_metrics, linear_head
from eupe_jax.evals.dense_transforms import IMAGENET_MEAN, DepthAugment, centre_pad, to_float
from eupe_jax.evals.depth_data import Data
from eupe_jax.evals.interface import Encoder, Result
from eupe_jax.evals.linear_head import AdamW, Head
from eupe_jax.evals.schedules import DepthSchedule, scaled
from eupe_jax.models.resize import resize


@dataclass(frozen=True)
class Settings:
    """The protocol. Durations are in iterations before `schedule_scale`.

    Attributes:
      schedule_scale: one factor for iterations, warm-up, eval_interval and loss_warmup.
      iterations, warmup: length of the training and of its warm-up.
      eval_interval: between evaluations; the default is longer than the training, so that the end is evaluated only.
      batch_size: images an iteration.
      learning_rate, weight_decay, b2: of AdamW; every parameter of the head is decayed.
      warmup_b1: quirk: Adam's beta1 while warming up, 0 in the authors' code.
      b1_low, b1_high: beta1 after the warm-up goes from the one to the other.
      clip_norm: largest gradient norm; 0: none.
      dropout: of whole channels while training; the authors have none here.
      loss_warmup: iterations without the variance term of the loss.
      backbone_train_mode: quirk: "always": the backbone stays in training mode (random RoPE rescale) throughout the
        training, because nothing evaluates in between; "until_first_eval", "never".
      report: "best" of the evaluations by rmse, as the authors; "last".
      bins, min_depth, max_depth: depth bins, in metres. Targets outside (min_depth, max_depth) are unknown.
      bin_spacing: "linear", "log". bin_weighting: "linear" (relu + 0.1), "softmax", "sigmoid".
      train_box: (x1, y1, x2, y2) cut from training images first; () for none.
      rotation, rotation_p, flip: degrees and probabilities in training.
      train_crop: (height, width) of the training crop.
      colour_p: probability of the colour change. gamma_on_255: quirk: its power is taken of values in 0..255.
      flip_test: average over the image and its mirror image.
      eigen_crop: measure in the Eigen crop only.
      stretch_padding: quirk: where sides are no multiples of the patch size, the depth of the padded image is
        stretched over the image; False: its padding is cut off.
      average: "images": every error per image, then the mean, as the authors; "pixels": over all pixels together.
      depth_divisor: units of the depth files in a metre.
      train_list, test_list: files below the folder that name the images of each split.
      pad_colour: RGB in [0, 1] of padding; the authors pad after normalisation, with zeros, which is the mean colour.
      seed: of head, order, augmentation and RoPE (42 in the authors' config).
      threads: of decoding and augmentation.
      eval_batch: images encoded at a time (twice as many with flip_test).
      save_every: iterations between saves besides those at evaluations; not scaled.
      scan_limit: splits of at most so many images are decoded as a whole before the work starts; larger ones are
        checked by their headers then and by their pixels as they come.
      pictures: test images to draw.
    """

    schedule_scale: float = 1.0
    iterations: int = 38_400
    warmup: int = 12_800
    eval_interval: int = 100_000
    batch_size: int = 16
    learning_rate: float = 3e-4
    weight_decay: float = 1e-3
    b2: float = 0.99
    warmup_b1: float = 0.0
    b1_low: float = 0.85
    b1_high: float = 0.95
    clip_norm: float = 35.0
    dropout: float = 0.0
    loss_warmup: int = 100
    backbone_train_mode: dense_training.TrainMode = "always"
    report: str = "best"
    bins: int = 256
    min_depth: float = 1e-3
    max_depth: float = 10.0
    bin_spacing: str = "linear"
    bin_weighting: str = "linear"
    train_box: tuple[int, ...] = (43, 45, 608, 472)
    rotation: float = 2.5
    rotation_p: float = 0.5
    flip: float = 0.5
    train_crop: tuple[int, int] = (416, 544)
    colour_p: float = 0.5
    gamma_on_255: bool = True
    flip_test: bool = True
    eigen_crop: bool = True
    stretch_padding: bool = True
    average: str = "images"
    depth_divisor: float = 1000.0
    train_list: str = "nyu_train.txt"
    test_list: str = "nyu_test.txt"
    pad_colour: tuple[float, float, float] = IMAGENET_MEAN
    seed: int = 42
    threads: int = 8
    eval_batch: int = 8
    save_every: int = 1_000
    scan_limit: int = 4_000
    pictures: int = 4

    def __post_init__(self):
        choices = {
            "backbone_train_mode": dense_training.TRAIN_MODES,
            "report": ("best", "last"),
            "bin_spacing": ("linear", "log"),
            "bin_weighting": ("linear", "softmax", "sigmoid"),
            "average": ("images", "pixels"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: use one of {', '.join(allowed)}")
        for name in ("schedule_scale", "iterations", "eval_interval", "batch_size", "learning_rate", "bins",
                     "depth_divisor", "threads", "eval_batch", "save_every"):  # fmt: skip
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if len(self.train_box) not in (0, 4):
            raise ValueError(f"train_box must be (x1, y1, x2, y2) or (), got {self.train_box}")
        if not 0 < self.min_depth < self.max_depth:
            raise ValueError(f"depths must be 0 < min_depth < max_depth, got {self.min_depth} and {self.max_depth}")
        self.augment()  # whether the crop fits into the box

    def schedule(self) -> DepthSchedule:
        """Learning rate and momentum over the scaled iterations."""
        total, warmup = scaled(self.iterations, self.schedule_scale), scaled(self.warmup, self.schedule_scale, 0)
        return DepthSchedule(
            self.learning_rate, total, warmup, warmup_b1=self.warmup_b1, b1_low=self.b1_low, b1_high=self.b1_high
        )

    def plan(self) -> dense_training.Plan:
        """How long to train, and when to evaluate and save, in scaled iterations."""
        interval = scaled(self.eval_interval, self.schedule_scale)
        return dense_training.Plan(
            self.schedule().total, interval, self.save_every, self.seed, self.backbone_train_mode
        )

    def augment(self) -> DepthAugment:
        """What is done to training images."""
        return DepthAugment(
            self.train_box, self.rotation, self.rotation_p, self.flip, self.train_crop, self.colour_p,
            gamma_on_255=self.gamma_on_255,
        )  # fmt: skip

    def optimizer(self) -> AdamW:
        """The optimiser of the head."""
        return AdamW(self.weight_decay, self.b2, clip_norm=self.clip_norm)

    def centres(self) -> np.ndarray:
        """float32 [bins]: the depth in metres that each bin stands for."""
        return depth_metrics.bin_centres(self.bins, self.min_depth, self.max_depth, self.bin_spacing)

    def measured(self, depth: np.ndarray) -> np.ndarray:
        """The pixels of a depth map that count: valid, and inside the Eigen crop where that is wanted."""
        valid = (depth > self.min_depth) & (depth < self.max_depth)
        if self.eigen_crop:
            y1, y2, x1, x2 = depth_metrics.eigen_box(*depth.shape)
            inside = np.zeros_like(valid)
            inside[y1:y2, x1:x2] = True
            valid &= inside
        return valid


def load(folder: Path, settings: Settings) -> Data:
    """Both splits of a folder in the BTS layout, checked.

    Raises:
      DataError: naming the file and the line of its list.
    """
    return depth_data.load(
        folder, settings.train_list, settings.test_list, settings.depth_divisor, settings.augment().smallest(),
        lambda depth: bool(settings.measured(depth).any()), settings.scan_limit, settings.threads,
    )  # fmt: skip


def stretch(
    depth_Bxhxw: jax.Array, out_size: tuple[int, int], encoded_size: tuple[int, int] = (0, 0),
    offset: tuple[int, int] = (0, 0),
) -> jax.Array:  # fmt: skip
    """Patch-resolution depth at `out_size`, bilinear: [B, H, W].

    With `encoded_size` and `offset`, those of the padded image, it is first stretched over that and then cut.
    """
    maps = depth_Bxhxw[..., None]
    if encoded_size == (0, 0):
        return resize(maps, out_size, "bilinear")[..., 0]
    (top, left), (height, width) = offset, out_size
    return resize(maps, encoded_size, "bilinear")[:, top : top + height, left : left + width, 0]


def _stretching(settings: Settings, encoded_size: tuple[int, int], offset: tuple[int, int]) -> dict:
    return {} if settings.stretch_padding else {"encoded_size": encoded_size, "offset": offset}


def make_loss(settings: Settings, encoded_size: tuple[int, int], offset: tuple[int, int]) -> linear_head.Loss:
    """The training loss of a padded crop: features -> bins -> depth, stretched over the target."""
    centres, warmup = settings.centres(), scaled(settings.loss_warmup, settings.schedule_scale, 0)

    def loss(head, features, depth, key, iteration):
        features = linear_head.drop_channels(key, features, settings.dropout)
        logits, stats = linear_head.apply_train(head, features)
        low = depth_metrics.depth_from_bins(logits, centres, settings.bin_weighting)
        predicted = stretch(low, depth.shape[1:], **_stretching(settings, encoded_size, offset))
        valid = (depth > settings.min_depth) & (depth < settings.max_depth)
        return depth_metrics.scale_invariant_loss(predicted, depth, valid, iteration >= warmup), stats

    return loss


def predict_low(
    head: Head, features: jax.Array, mirrored: jax.Array | None, centres: np.ndarray, weighting: str = "linear"
) -> jax.Array:
    """Depth [B, h, w] at patch resolution; with features of the mirror images, the mean of both."""
    depth = depth_metrics.depth_from_bins(linear_head.apply(head, features), centres, weighting)
    if mirrored is None:
        return depth
    other = depth_metrics.depth_from_bins(linear_head.apply(head, mirrored), centres, weighting)
    return (depth + other[:, :, ::-1]) / 2


def run(encoder: Encoder, data: Data, settings: Settings, *, workdir: Path | None = None) -> Result:
    """Trains the head on the training split and measures rmse and its relatives on the other.

    Raises:
      ValueError: the encoder does not take the crop's or the test images' size, or the loss is not finite.
      DataError: a picture that only now turned out to be damaged.
    """
    plan, schedule, augment = settings.plan(), settings.schedule(), settings.augment()
    test = Test(encoder, data, settings)
    untrained = linear_head.init(jax.random.key(0), encoder.patch_dim, settings.bins)
    next(test.predictions(untrained, [0]))  # an encoder that does not take the test images says so before the training

    def sample(record: int, iteration: int, position: int) -> tuple[np.ndarray, np.ndarray]:
        pair = data.train[record]
        image, rng = dense_data.read_rgb(pair), random_generator(settings.seed, iteration, position)
        depth_data.require_smallest(pair, image.size, augment.smallest())
        return augment(image, data.read_depth(pair), rng)

    def batches(start: int, stop: int):
        return dense_data.training_batches(
            sample, len(data.train), settings.batch_size, settings.seed, start, stop, settings.threads
        )

    blank = np.zeros((1, *settings.train_crop, 3), np.float32)
    padded, offset = centre_pad(blank, encoder.patch_size, settings.pad_colour)
    state = dense_training.train(
        encoder, make_loss(settings, padded.shape[1:3], offset), settings.optimizer(), schedule, plan,
        outputs=settings.bins, batches=batches, colour=settings.pad_colour, evaluate=test.measure,
        better=lambda new, old: settings.report == "last" or new["rmse"] < old["rmse"],
        workdir=workdir, fingerprint=_fingerprint(encoder, data, settings), progress=f"depth {encoder.name}",
    )  # fmt: skip
    record = state.best_record
    per_image = [{"image": str(pair.image.name), **row} for pair, row in zip(data.test, record["details"], strict=True)]
    return Result(
        metrics=record["metrics"],
        tables={
            "per_image": per_image,
            "evaluations": state.history,
            "training": dense_training.loss_table(state, schedule),
        },
        images=_pictures(test, jax.device_get(state.best)),
        details={
            "train_images": len(data.train),
            "test_images": len(data.test),
            "iterations": state.iteration,
            "reported_iteration": record["iteration"],
        },
    )


class Test:
    """The test split through an encoder."""

    __test__ = False  # pytest: no test class

    def __init__(self, encoder: Encoder, data: Data, settings: Settings) -> None:
        self.encoder, self.data, self.settings = encoder, data, settings

    def measure(self, head: Head) -> tuple[dict[str, float], list[dict[str, float]]]:
        """Mean errors, and those of every image."""
        settings, count = self.settings, len(self.data.test)
        rows, predicted_all, target_all = [], [], []
        for pair, (_, depth, predicted) in zip(
            self.data.test,
            tqdm(self.predictions(head, list(range(count))), total=count, desc="test", leave=False),
            strict=True,
        ):
            valid = settings.measured(depth)
            try:
                rows.append(depth_metrics.errors(predicted, depth, valid))
            except ValueError as e:
                raise dense_data.DataError(f"{pair.where}: {pair.target}: {e}") from None
            if settings.average == "pixels":
                predicted_all.append(predicted[valid])
                target_all.append(depth[valid])
        if settings.average == "pixels":
            p, t = np.concatenate(predicted_all), np.concatenate(target_all)
            return depth_metrics.errors(p, t, np.ones_like(t, bool)), rows
        return depth_metrics.mean_errors(rows), rows

    def predictions(self, head: Head, members: list[int]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(uint8 image, true depth, predicted depth) of some images; maps are float32 [H, W] in metres."""
        settings = self.settings

        def read(place: int) -> tuple[np.ndarray, np.ndarray]:
            pair = self.data.test[members[place]]
            return np.asarray(dense_data.read_rgb(pair)), self.data.read_depth(pair)

        centres = settings.centres()
        found = dense_data.read_ahead(read, len(members), settings.threads)
        for start in range(0, len(members), settings.eval_batch):
            group = [next(found) for _ in members[start : start + settings.eval_batch]]
            images = [to_float(image) for image, _ in group]
            mirrors = [image[:, ::-1] for image in images] if settings.flip_test else []
            tokens = dense_training.encode_in_batches(
                self.encoder, images + mirrors, settings.eval_batch, settings.pad_colour
            )
            for i, (image, depth) in enumerate(group):
                blank = np.zeros((1, *image.shape), np.float32)
                padded, offset = centre_pad(blank, self.encoder.patch_size, settings.pad_colour)
                stretching = _stretching(settings, padded.shape[1:3], offset)
                mirrored = tokens[len(group) + i][None] if settings.flip_test else None
                low = predict_low(head, tokens[i][None], mirrored, centres, settings.bin_weighting)
                predicted = _stretched(low, out_size=depth.shape, **stretching)[0]
                yield image, depth, np.clip(np.asarray(predicted), settings.min_depth, settings.max_depth)


_stretched = functools.partial(jax.jit, static_argnames=("out_size", "encoded_size", "offset"))(stretch)


def _fingerprint(encoder: Encoder, data: Data, settings: Settings) -> str:
    """Of all that decides the numbers; machinery such as threads does not."""
    facts = dataclasses.asdict(settings)
    for machinery in ("threads", "save_every", "scan_limit", "pictures"):
        del facts[machinery]
    text = repr(("depth", encoder.fingerprint, data.digest, sorted(facts.items())))
    return hashlib.sha256(text.encode()).hexdigest()


def _pictures(test: Test, head: Head) -> dict[str, np.ndarray]:
    """Image, truth and prediction on one colour scale, and the error; black where the truth is unknown."""
    count = len(test.data.test)
    members = np.linspace(0, count - 1, min(test.settings.pictures, count)).round().astype(int).tolist()
    shown = [(image, truth, predicted, test.settings.measured(truth)) for image, truth, predicted in
             test.predictions(head, members)]  # fmt: skip
    if not shown:
        return {}
    known = [truth > test.settings.min_depth for _, truth, _, _ in shown]
    inside = np.concatenate([truth[mask] for (_, truth, _, _), mask in zip(shown, known, strict=True)])
    low, high = np.percentile(inside, [1, 99])
    errors = np.concatenate([np.abs(truth - predicted)[valid] for _, truth, predicted, valid in shown])
    worst = float(np.percentile(errors, 98)) if errors.size else 1.0
    rows = [
        [
            image,
            dense_pictures.map_picture(truth, low, high, mask),
            dense_pictures.map_picture(predicted, low, high),
            dense_pictures.map_picture(np.abs(truth - predicted), 0.0, worst, valid),
        ]
        for (image, truth, predicted, valid), mask in zip(shown, known, strict=True)
    ]
    picture = dense_pictures.grid(rows, ("image", "truth (black: unknown)", "prediction", "error where measured"))
    return {"predictions": dense_pictures.with_scale(picture, [("depth, m", low, high), ("error, m", 0.0, worst)])}
