"""What the study measures of an encoder: tasks that no expert was trained on, each at two resolutions."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.recipe.pictures import Folders
from eupe_jax.evals import registry, report
from eupe_jax.evals.interface import Encoder
from eupe_jax.training.checkpoints import versions

SIDES = (64, 128)  # the students' training resolution, and one they have not seen before stage 3


@dataclass(frozen=True)
class Task:
    """One evaluation at one resolution."""

    name: str
    eval: str
    data: Path
    settings: Mapping[str, Any]
    side: int

    @property
    def labelled(self) -> bool:
        """Whether it classifies images by their class tokens."""
        return self.eval in ("knn", "linear_probe")


# Task -> {figure of the table: name in the metrics that the evaluation gives}.
TAKEN = {
    "knn": {"knn": "mean_per_class"},
    "linear": {"linear": "mean_per_class"},
    "segmentation": {"miou": "mIoU"},
    "depth": {"rmse": "rmse"},
    "pairs": {"pck": "pck"},
}

# What the table calls a figure: how it is printed and which way is better.
FIGURES = {
    "knn": ("kNN", "%", 1),
    "linear": ("linear probe", "%", 1),
    "miou": ("mIoU", "%", 1),
    "rmse": ("depth RMSE", "m", -1),
    "pck": ("PCK@.1", "%", 1),
}


def tasks(folders: Folders, share: float = 1.0) -> list[Task]:
    """Every task but the similarity to experts. share: of the iterations that heads of dense tasks are trained for."""
    found = []
    iterations = lambda count: max(10, round(count * share))  # noqa: E731
    for side in SIDES:
        whole = {"resize": side, "crop": side}
        found += [
            Task("knn", "knn", folders.caltech, whole, side),
            Task(
                "linear", "linear_probe", folders.caltech,
                whole | {"penalties": (0.3, 0.1, 0.03, 0.01, 0.003)}, side,
            ),
            # windows of the network's size slide over pictures of 256 x 192
            Task(
                "segmentation", "segmentation", folders.camvid,
                {
                    "short_side": 192, "crop": side, "stride": side * 2 // 3, "iterations": iterations(300),
                    "warmup": iterations(15), "eval_interval": iterations(300), "backbone_train_mode": "never",
                    "report": "last", "scale_range": (0.75, 1.5), "pictures": 2,
                },
                side,
            ),
            Task(
                "depth", "depth", folders.depth[side],
                {
                    "train_box": (), "train_crop": (side, side * 3 // 2),
                    "iterations": iterations(300), "warmup": iterations(100), "eval_interval": iterations(300),
                    "max_depth": 5.0, "backbone_train_mode": "never", "report": "last", "pictures": 2,
                },
                side,
            ),
            Task(
                "pairs", "correspondence", folders.pairs,
                {"side": side, "pairs_per_category": None, "pictures": 2}, side,
            ),
        ]  # fmt: skip
    return found


def similarity_task(folders: Folders, images: int) -> Task:
    """Cosine with every expert that the encoder was distilled from, beside the position map."""
    settings = {"resolutions": SIDES, "images": images, "control_images": images, "batch_size": 64}
    return Task("similarity", "similarity", folders.heldout, settings, 0)


def run(task: Task, encoder: Encoder, out: Path, work: Path, teachers: Mapping[str, Encoder] | None = None) -> None:
    """Measures a task and writes its result, unless `out` holds this very one. work: what a stopped one left."""
    module = registry.evaluation(task.eval)
    settings = registry.settings(task.eval, task.settings)
    header = {
        "eval": task.eval,
        "encoder": encoder.name,
        "checkpoint": getattr(encoder, "checkpoint", ""),
        "fingerprint": encoder.fingerprint,
        "data": str(task.data.resolve()),
        "settings": dataclasses.asdict(settings),
        "teachers": {name: teacher.fingerprint for name, teacher in (teachers or {}).items()},
    }
    found = report.read(out)
    if found is not None and report.same(found, header):
        return
    data = module.load(task.data, settings)
    if teachers:
        data = dataclasses.replace(data, teachers=teachers)
    report.write(out, module.run(encoder, data, settings, workdir=work), header | {"versions": versions()})
