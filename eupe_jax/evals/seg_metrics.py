"""Intersection over union and its relatives, from areas accumulated over a whole split."""

import numpy as np

IGNORE = 255


def reduce_zero(label: np.ndarray) -> np.ndarray:
    """ADE20k's labels [...] as classes: 0 ("other") becomes IGNORE, k becomes k - 1, IGNORE stays."""
    label = np.asarray(label)
    return np.where((label == 0) | (label == IGNORE), IGNORE, label.astype(np.int64) - 1).astype(label.dtype)


def areas(prediction: np.ndarray, label: np.ndarray, classes: int) -> np.ndarray:
    """Pixels of one image, int64 [4, classes]: intersection, union, prediction, label; IGNORE counts nowhere.

    Raises:
      ValueError: other shapes, or a class outside [0, classes).
    """
    prediction, label = np.asarray(prediction), np.asarray(label)
    if prediction.shape != label.shape:
        raise ValueError(f"a prediction of {prediction.shape} pixels for a label of {label.shape}")
    known = label != IGNORE
    p, t = prediction[known].astype(np.int64), label[known].astype(np.int64)
    for what, x in (("predicted", p), ("labelled", t)):
        if x.size and (x.min() < 0 or x.max() >= classes):
            raise ValueError(f"{what} classes {x.min()}..{x.max()} are not all among the {classes} classes")
    intersection = np.bincount(t[p == t], minlength=classes)
    predicted, labelled = np.bincount(p, minlength=classes), np.bincount(t, minlength=classes)
    return np.stack([intersection, predicted + labelled - intersection, predicted, labelled])


def per_class(total_areas: np.ndarray) -> dict[str, np.ndarray]:
    """Ratios by class, float64 [classes], from summed areas; NaN where the denominator is empty."""
    intersection, union, predicted, labelled = np.asarray(total_areas, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = intersection / predicted, intersection / labelled
        return {
            "iou": intersection / union,
            "accuracy": recall,
            "dice": 2 * intersection / (predicted + labelled),
            "fscore": 2 * precision * recall / (precision + recall),
            "precision": precision,
            "recall": recall,
        }


def summary(total_areas: np.ndarray) -> dict[str, float]:
    """mIoU, aAcc, mAcc, dice, fscore, precision, recall in [0, 1]: means over the classes that are there."""
    ratios = per_class(total_areas)
    # a mean over no class at all is NaN, and numpy need not warn of it
    mean = {name: float(np.nanmean(x)) if not np.isnan(x).all() else float("nan") for name, x in ratios.items()}
    intersection, _, _, labelled = np.asarray(total_areas, np.float64)
    overall = float(intersection.sum() / labelled.sum()) if labelled.sum() else float("nan")
    rest = {name: mean[name] for name in ("dice", "fscore", "precision", "recall")}
    return {"mIoU": mean["iou"], "aAcc": overall, "mAcc": mean["accuracy"], **rest}
