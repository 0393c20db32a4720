"""What the evaluations on labelled images share: whole-image features, accuracies, and pictures with captions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from eupe_jax.evals import features
from eupe_jax.evals.features import CentreCrop
from eupe_jax.evals.interface import Encoder
from eupe_jax.evals.labelled import LabelledImages

TokenChoice = Literal["cls", "patch_mean", "cls+patch_mean"]

GREEN, RED, GREY = (40, 160, 60), (200, 50, 40), (120, 120, 120)
_LINE = 13  # pixels of a line below a picture


def image_features(
    encoder: Encoder,
    images: LabelledImages,
    token: TokenChoice,
    crop: CentreCrop,
    *,
    batch_size: int,
    threads: int,
    workdir: Path | None,
) -> np.ndarray:
    """One vector an image, float32 [N, D]: class token, mean patch token, or both side by side.

    Raises:
      ValueError: an encoder without class token where `token` asks for one, and all that `features.extract` raises.
    """
    kinds = token.split("+")
    if "cls" in kinds and encoder.cls_dim is None:
        raise ValueError(f"{encoder.name} has no class token: set token='patch_mean'")
    extracted = features.extract(
        encoder, images, batch_size, kinds=kinds, prepare=crop, workdir=workdir, threads=threads,
        progress=f"{encoder.name}: {images.split}",
    )  # fmt: skip
    return np.concatenate([extracted[kind] for kind in kinds], axis=1)


def fit_crop(resize: int, crop: int, encoder: Encoder) -> tuple[CentreCrop, dict[str, Any]]:
    """The centre crop, at the nearest multiple of the encoder's patches if need be, and what to report about it."""
    fitted = CentreCrop(resize, crop).fitted(encoder.patch_size)
    details: dict[str, Any] = {"resize": resize, "crop": fitted.crop}
    if fitted.crop != crop:
        details["crop_note"] = f"{crop} is no multiple of the patch size {encoder.patch_size} of {encoder.name}"
    return fitted, details


def rank(scores_MxC: np.ndarray | jax.Array) -> np.ndarray:
    """Labels by falling score, int32 [M, 5], or [M, 1] for up to five classes: those have no top-5 to speak of.

    Equal scores go to the lower label.
    """
    return np.asarray(jax.lax.top_k(jnp.asarray(scores_MxC), 5 if scores_MxC.shape[1] > 5 else 1)[1])


def accuracies(ranked_MxR: np.ndarray, labels_M: np.ndarray) -> dict[str, float]:
    """Of predicted labels, best first: "top1" and, for R >= 5, "top5" over images, and "mean_per_class".

    "mean_per_class" is the mean of every class's top-1 accuracy, over the classes that have test images.
    """
    hits = ranked_MxR == labels_M[:, None]
    counts = np.bincount(labels_M)
    correct = np.bincount(labels_M, weights=hits[:, 0])
    found = {"top1": float(hits[:, 0].mean())}
    if ranked_MxR.shape[1] >= 5:
        found["top5"] = float(hits[:, :5].any(axis=1).mean())
    found["mean_per_class"] = float((correct[counts > 0] / counts[counts > 0]).mean())
    return found


def class_table(predicted_M: np.ndarray, labels_M: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """A row a class: test images, how many were right, accuracy, and the class it is most often taken for."""
    rows = []
    for label, name in enumerate(classes):
        given = predicted_M[labels_M == label]
        wrong = np.bincount(given[given != label], minlength=1)
        rows.append(
            {
                "class": name,
                "images": len(given),
                "correct": int((given == label).sum()),
                "accuracy": float((given == label).mean()) if len(given) else float("nan"),
                "most_taken_for": classes[wrong.argmax()] if wrong.any() else "",
            }
        )
    return rows


def captioned_grid(
    rows: Sequence[Sequence[tuple[np.ndarray, str, tuple[int, int, int]]]], side: int = 112
) -> np.ndarray:
    """Pictures in rows, each squashed to `side` pixels with a frame of its colour and a caption of some lines below."""
    lines = max(caption.count("\n") + 1 for row in rows for _, caption, _ in row)
    cell, step = side + 8, side + 10 + lines * _LINE
    canvas = Image.new("RGB", (cell * max(map(len, rows)), step * len(rows)), "white")
    draw = ImageDraw.Draw(canvas)
    for r, row in enumerate(rows):
        for c, (image, caption, colour) in enumerate(row):
            x, y = c * cell, r * step
            draw.rectangle((x + 1, y + 1, x + cell - 2, y + cell - 2), fill=colour)
            canvas.paste(Image.fromarray(image).resize((side, side)), (x + 4, y + 4))
            for n, line in enumerate(caption.split("\n")):
                while draw.textlength(line) > cell - 4:
                    line = line[:-1]
                draw.text((x + 3, y + cell + n * _LINE), line, fill="black")
    return np.asarray(canvas)
