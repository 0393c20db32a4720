"""Linear semantic segmentation on frozen patch tokens, as on ADE20k (EUPE App. C.3): batch norm and a 1x1 convolution.

The defaults are the authors' protocol with the quirks of their code; each quirk is a setting. `schedule_scale` fits
it to a small set, and only then: figures of scaled runs are figures of their own. Layout: segmentation_data.py.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from eupe_jax.data.host import random_generator
from eupe_jax.evals import dense_data, dense_pictures, dense_training, linear_head, seg_metrics, segmentation_data
from eupe_jax.evals.dense_transforms import IMAGENET_MEAN, SegmentationAugment, centre_pad, short_side_size, to_float
from eupe_jax.evals.interface import Encoder, Result
from eupe_jax.evals.linear_head import AdamW, Head
from eupe_jax.evals.schedules import SegmentationSchedule, scaled
from eupe_jax.evals.seg_metrics import IGNORE
from eupe_jax.evals.segmentation_data import Data
from eupe_jax.evals.sliding import merge, window_boxes
from eupe_jax.models.resize import resize


@dataclass(frozen=True)
class Settings:
    """The protocol. Durations are in iterations before `schedule_scale`.

    Attributes:
      schedule_scale: one factor for iterations, warm-up and eval_interval.
      iterations, warmup, eval_interval: length of the training, of its warm-up, and between evaluations.
      batch_size: images an iteration.
      learning_rate, weight_decay, b1, b2: of AdamW; every parameter of the head is decayed.
      clip_norm: largest gradient norm; 0: none, as the authors (theirs is infinite).
      dropout: of whole channels, before the batch norm, while training.
      ignored_in_mean: quirk: ignored pixels count, as zeros, in the mean of the cross-entropy. False: mean over the
        labelled pixels.
      skip_first_scheduler_step: quirk: the scheduler is not stepped after the first iteration.
      backbone_train_mode: quirk: "until_first_eval": the backbone stays in training mode (random RoPE rescale) until
        the first evaluation puts it into evaluation mode, in which it stays; "never", "always".
      report: "best" of the evaluations by mIoU, as the authors; "last".
      short_side: of images at evaluation, and before the random scale in training.
      scale_range, crop, cat_max_ratio, crop_tries, flip: of the training view; crop is also the sliding window's side.
      distort: photometric distortion in training.
      stride: of the sliding window.
      average: what overlapping windows average: "logits", or "probabilities".
      reduce_zero_label: label 0 means "other" and is ignored, k is class k - 1 (ADE20k). False: labels are classes.
      train_list, val_list: files below the folder that name the images of each split.
      pad_colour: RGB in [0, 1] of padding; the authors pad after normalisation, with zeros, which is the mean colour.
      seed: of head, order, augmentation, drop-out and RoPE.
      threads: of decoding and augmentation.
      eval_batch: windows encoded at a time.
      keep_features_mb: validation features are kept in memory between evaluations up to this size.
      save_every: iterations between saves besides those at evaluations; not scaled.
      scan_limit: splits of at most so many images are decoded as a whole before the work starts; larger ones are
        checked by their headers then and by their pixels as they come.
      pictures: validation images to draw.
    """

    schedule_scale: float = 1.0
    iterations: int = 40_000
    warmup: int = 1_500
    eval_interval: int = 5_000
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 1e-3
    b1: float = 0.9
    b2: float = 0.999
    clip_norm: float = 0.0
    dropout: float = 0.1
    ignored_in_mean: bool = True
    skip_first_scheduler_step: bool = True
    backbone_train_mode: dense_training.TrainMode = "until_first_eval"
    report: str = "best"
    short_side: int = 512
    scale_range: tuple[float, float] = (0.5, 2.0)
    crop: int = 512
    cat_max_ratio: float = 0.75
    crop_tries: int = 10
    flip: float = 0.5
    distort: bool = True
    stride: int = 341
    average: str = "logits"
    reduce_zero_label: bool = True
    train_list: str = "ADE20K_object150_train.txt"
    val_list: str = "ADE20K_object150_val.txt"
    pad_colour: tuple[float, float, float] = IMAGENET_MEAN
    seed: int = 0
    threads: int = 8
    eval_batch: int = 8
    keep_features_mb: int = 2_048
    save_every: int = 1_000
    scan_limit: int = 4_000
    pictures: int = 4

    def __post_init__(self):
        choices = {
            "backbone_train_mode": dense_training.TRAIN_MODES,
            "average": ("logits", "probabilities"),
            "report": ("best", "last"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: use one of {', '.join(allowed)}")
        for name in ("schedule_scale", "iterations", "eval_interval", "batch_size", "learning_rate", "short_side",
                     "crop", "stride", "threads", "eval_batch", "save_every"):  # fmt: skip
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.stride > self.crop:
            raise ValueError(f"stride {self.stride} is above the window of {self.crop}: pixels would be left out")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if not 0 < self.scale_range[0] <= self.scale_range[1]:
            raise ValueError(f"scale_range must be 0 < low <= high, got {self.scale_range}")

    def schedule(self) -> SegmentationSchedule:
        """Learning rate over the scaled iterations."""
        total, warmup = scaled(self.iterations, self.schedule_scale), scaled(self.warmup, self.schedule_scale, 0)
        return SegmentationSchedule(
            self.learning_rate, total, warmup, skip_first=self.skip_first_scheduler_step, b1=self.b1
        )

    def plan(self) -> dense_training.Plan:
        """How long to train, and when to evaluate and save, in scaled iterations."""
        interval = scaled(self.eval_interval, self.schedule_scale)
        return dense_training.Plan(
            self.schedule().total, interval, self.save_every, self.seed, self.backbone_train_mode
        )

    def augment(self) -> SegmentationAugment:
        """What is done to training images."""
        return SegmentationAugment(
            self.short_side, self.scale_range, self.crop, self.cat_max_ratio, self.crop_tries, self.flip, self.distort,
            pad_colour=self.pad_colour,
        )  # fmt: skip

    def optimizer(self) -> AdamW:
        """The optimiser of the head."""
        return AdamW(self.weight_decay, self.b2, clip_norm=self.clip_norm)


def load(folder: Path, settings: Settings) -> Data:
    """Both splits of a folder in ADE20k's layout, checked.

    Raises:
      DataError: naming the file and the line of its list.
    """
    return segmentation_data.load(
        folder, settings.train_list, settings.val_list, settings.reduce_zero_label, settings.scan_limit,
        settings.threads,
    )  # fmt: skip


def cross_entropy(logits_BxHxWxC: jax.Array, labels_BxHxW: jax.Array, ignored_in_mean: bool = True) -> jax.Array:
    """Mean cross-entropy; pixels labelled IGNORE add nothing, but count in the mean unless told otherwise."""
    known = labels_BxHxW != IGNORE
    log_p = jax.nn.log_softmax(logits_BxHxWxC, axis=-1)
    picked = jnp.take_along_axis(log_p, jnp.where(known, labels_BxHxW, 0).astype(jnp.int32)[..., None], axis=-1)
    total = -jnp.where(known, picked[..., 0], 0.0).sum()
    return total / (known.size if ignored_in_mean else jnp.maximum(known.sum(), 1))


def make_loss(settings: Settings, encoded_size: tuple[int, int], offset: tuple[int, int]) -> linear_head.Loss:
    """The training loss: logits stretched over the encoded crop, cut back to the labels."""

    def loss(head, features, labels, key, iteration):
        del iteration
        features = linear_head.drop_channels(key, features, settings.dropout)
        logits, stats = linear_head.apply_train(head, features)
        (top, left), (height, width) = offset, labels.shape[1:]
        logits = resize(logits, encoded_size, "bilinear")[:, top : top + height, left : left + width]
        return cross_entropy(logits, labels, settings.ignored_in_mean), stats

    return loss


def run(encoder: Encoder, data: Data, settings: Settings, *, workdir: Path | None = None) -> Result:
    """Trains the head on the training split and measures mIoU, aAcc and mAcc on the other.

    Raises:
      ValueError: the encoder does not take the crop's size, or the loss is not finite.
      DataError: a picture that only now turned out to be damaged.
    """
    plan, schedule, augment = settings.plan(), settings.schedule(), settings.augment()
    validation = Validation(encoder, data, settings)
    next(validation._features([0]))  # an encoder that does not take the windows says so now, not after the training

    def sample(record: int, iteration: int, position: int) -> tuple[np.ndarray, np.ndarray]:
        pair = data.train[record]
        rng = random_generator(settings.seed, iteration, position)
        return augment(dense_data.read_rgb(pair), data.read_label(pair), rng)

    def batches(start: int, stop: int):
        return dense_data.training_batches(
            sample, len(data.train), settings.batch_size, settings.seed, start, stop, settings.threads
        )

    blank = np.zeros((1, settings.crop, settings.crop, 3), np.float32)
    padded, offset = centre_pad(blank, encoder.patch_size, settings.pad_colour)
    state = dense_training.train(
        encoder, make_loss(settings, padded.shape[1:3], offset), settings.optimizer(), schedule, plan,
        outputs=len(data.classes), batches=batches, colour=settings.pad_colour, evaluate=validation.measure,
        better=lambda new, old: settings.report == "last" or new["mIoU"] > old["mIoU"],
        workdir=workdir, fingerprint=_fingerprint(encoder, data, settings),
        progress=f"segmentation {encoder.name}",
    )  # fmt: skip
    return _result(validation, state, schedule)


class Validation:
    """The validation split through an encoder; features are kept between evaluations where memory allows."""

    def __init__(self, encoder: Encoder, data: Data, settings: Settings) -> None:
        self.encoder, self.data, self.settings = encoder, data, settings
        self._kept: dict[int, list[np.ndarray]] = {}
        self._room = settings.keep_features_mb * 2**20

    def measure(self, head: Head) -> tuple[dict[str, float], list[list[int]]]:
        """Metrics over the split, and its summed areas."""
        count = len(self.data.val)
        total = np.zeros((4, len(self.data.classes)), np.int64)
        labels = dense_data.read_ahead(lambda i: self.data.read_label(self.data.val[i]), count, self.settings.threads)
        for (image_size, features), label in tqdm(
            zip(self._features(range(count)), labels, strict=True), total=count, desc="validation", leave=False
        ):
            total += seg_metrics.areas(self._predict(head, features, image_size, label.shape), label, total.shape[1])
        return seg_metrics.summary(total), total.tolist()

    def predictions(self, head: Head, members: list[int]) -> list[np.ndarray]:
        """Predicted classes [H, W] of some images, at the size of their labels."""
        labels = [self.data.read_label(self.data.val[i]) for i in members]
        found = zip(self._features(members), labels, strict=True)
        return [self._predict(head, features, size, label.shape) for (size, features), label in found]

    def _predict(self, head: Head, features: list[np.ndarray], size, out_size) -> np.ndarray:
        """Classes at `out_size` from the features of the windows of an image of `size`."""
        boxes = window_boxes(*size, self.settings.crop, self.settings.stride)
        blank = np.zeros((1, boxes[0][1] - boxes[0][0], boxes[0][3] - boxes[0][2], 3), np.float32)
        padded, offset = centre_pad(blank, self.encoder.patch_size, self.settings.pad_colour)
        scores = merge(
            linear_head.apply(head, np.stack(features)), padded=padded.shape[1:3], offset=offset, boxes=boxes,
            size=size, out_size=tuple(out_size), average=self.settings.average,
        )  # fmt: skip
        return np.asarray(jnp.argmax(scores, axis=-1))

    def _features(self, members: Sequence[int]) -> Iterator[tuple[tuple[int, int], list[np.ndarray]]]:
        """((height, width) as resized, features of each window) of every image, several images encoded together."""
        group = self.settings.eval_batch
        starts = range(0, len(members), group)
        images = dense_data.read_ahead(lambda i: self._resized(members[i]), len(members), self.settings.threads)
        for start in starts:
            chunk = members[start : start + group]
            pixels = [next(images) for _ in chunk]
            windows, owners = [], []
            for index, image in zip(chunk, pixels, strict=True):
                if index not in self._kept:
                    boxes = window_boxes(*image.shape[:2], self.settings.crop, self.settings.stride)
                    windows += [to_float(image[y1:y2, x1:x2]) for y1, y2, x1, x2 in boxes]
                    owners += [index] * len(boxes)
            encoded = dense_training.encode_in_batches(
                self.encoder, windows, self.settings.eval_batch, self.settings.pad_colour
            )
            fresh: dict[int, list[np.ndarray]] = {}
            for index, features in zip(owners, encoded, strict=True):
                fresh.setdefault(index, []).append(features)
            for index, image in zip(chunk, pixels, strict=True):
                yield image.shape[:2], self._kept[index] if index in self._kept else self._keep(index, fresh[index])

    def _keep(self, index: int, features: list[np.ndarray]) -> list[np.ndarray]:
        size = sum(x.nbytes for x in features)
        if size <= self._room:
            self._room -= size
            self._kept[index] = [x.copy() for x in features]  # not views that hold their whole batch
        return features

    def _resized(self, index: int) -> np.ndarray:
        image = dense_data.read_rgb(self.data.val[index])
        size = short_side_size(*image.size, self.settings.short_side)
        return np.asarray(image.resize(size, Image.Resampling.BILINEAR))


def _fingerprint(encoder: Encoder, data: Data, settings: Settings) -> str:
    """Of all that decides the numbers; machinery such as threads does not."""
    facts = dataclasses.asdict(settings)
    for machinery in ("threads", "keep_features_mb", "save_every", "scan_limit", "pictures"):
        del facts[machinery]
    text = repr(("segmentation", encoder.fingerprint, data.digest, sorted(facts.items())))
    return hashlib.sha256(text.encode()).hexdigest()


def _result(validation: Validation, state: dense_training.Progress, schedule: SegmentationSchedule) -> Result:
    data, settings = validation.data, validation.settings
    head, record = jax.device_get(state.best), state.best_record
    ratios = seg_metrics.per_class(np.asarray(record["details"]))
    table = [
        {"class": name, **{kind: float(x[i]) for kind, x in ratios.items()}, "pixels": record["details"][3][i]}
        for i, name in enumerate(data.classes)
    ]
    members = np.linspace(0, len(data.val) - 1, min(settings.pictures, len(data.val))).round().astype(int).tolist()
    colours = dense_pictures.palette(len(data.classes))
    rows = []
    for index, predicted in zip(members, validation.predictions(head, members), strict=True):
        truth = data.read_label(data.val[index])
        shown = [np.asarray(dense_data.read_rgb(data.val[index]))]
        rows.append(shown + [dense_pictures.label_picture(x, colours) for x in (truth, predicted)])
    images = {}
    if rows:
        picture = dense_pictures.grid(rows, ("image", "truth (black: ignored)", "prediction"))
        images["predictions"] = dense_pictures.with_legend(picture, data.classes, colours)
    return Result(
        metrics=record["metrics"],
        tables={
            "per_class": table,
            "evaluations": state.history,
            "training": dense_training.loss_table(state, schedule),
        },
        images=images,
        details={
            "classes": len(data.classes),
            "train_images": len(data.train),
            "val_images": len(data.val),
            "iterations": state.iteration,
            "reported_iteration": record["iteration"],
        },
    )
