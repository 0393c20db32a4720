"""What the replication trains: its sizes, its rows, and the config of every run.

Everything is the paper's recipe at a quarter of its resolution: 64 pixels where it has 256, a last stage over
{64, 96, 128} where it has {256, 384, 512}. A *run* is one call of `train`; a *row* is what the table shows of one.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ml_collections import ConfigDict

from configs import common

HOSTS = "eupe_jax.distill.host_teachers:"
EXPERT_SIDE = 128
SIDE, SCALES = 64, (64, 96, 128)

MODEL = "eupe_convnext_tiny"  # the family; overrides make it small
SHARED = {"depthwise": "matmul", "layerscale_init": 1.0}
STUDENT = {"depths": (1, 1, 4), "dims": (32, 64, 128), **SHARED}
WIDE = {"depths": (1, 1, 4), "dims": (64, 128, 256), **SHARED}
PROXY = {"depths": (1, 2, 8), "dims": (48, 96, 192), **SHARED}


def experts() -> dict[str, ConfigDict]:
    """The experts by name, as a config has them; all see 128 pixels, so that their grids are 8 x 8."""
    return {
        "efficientnet": common.host_teacher(f"{HOSTS}EfficientNetLite0", EXPERT_SIDE, threads=1),
        "ppocr": common.host_teacher(f"{HOSTS}PPOCRv4Detector", EXPERT_SIDE, class_token="none", threads=1),
        "xfeat": common.host_teacher("benchmarks.recipe.xfeat:XFeat", EXPERT_SIDE, class_token="none", threads=1),
    }


EXPERTS = tuple(experts())


@dataclass(frozen=True)
class Size:
    """How long everything takes: 1.0 is the study, less is for trying it out.

    Attributes:
      steps: of the student, in every row but those that say otherwise.
      proxy_steps: of stage 1.
      finetune: share of the student's steps that stage 3 takes, in the row that has all three.
      batch: images a step.
      views: augmented views of every image that experts see.
      statistics_steps: batches that the statistics of teachers are measured over.
    """

    steps: int = 1200
    proxy_steps: int = 3000
    finetune: float = 0.25
    batch: int = 32
    views: int = 4
    statistics_steps: int = 200

    def scaled(self, share: float) -> "Size":
        at_least = lambda count, least: max(least, round(count * share))  # noqa: E731
        return dataclasses.replace(
            self,
            steps=at_least(self.steps, 8),
            proxy_steps=at_least(self.proxy_steps, 8),
            statistics_steps=at_least(self.statistics_steps, 2),
            views=at_least(self.views, 1),
        )


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
      teachers: names of experts, or ("proxy",).
      overrides: of the student's constructor.
      steps: "student", "proxy", "head" and "tail" (the two parts of a student's steps before and in stage 3), or
        "compute": as many as cost what stages 1 and 2 cost together.
      scales: sides that are drawn from, for student and proxy apart.
      normalized: whether targets are normalised by the teachers' statistics.
      shuffled: whether every image gets its neighbour's targets.
      init_from: the run it goes on from.
    """

    teachers: tuple[str, ...] = EXPERTS
    overrides: Mapping = field(default_factory=lambda: STUDENT)
    steps: str = "student"
    scales: tuple[int, ...] = (SIDE,)
    normalized: bool = True
    shuffled: bool = False
    init_from: str = ""

    @property
    def parents(self) -> set[str]:
        """The runs whose networks it starts from or learns from."""
        return ({"proxy"} if self.teachers == ("proxy",) else set()) | ({self.init_from} if self.init_from else set())

    @property
    def needs(self) -> set[str]:
        """The runs that have to be there first."""
        return self.parents | ({"stage12"} if self.steps == "compute" else set())


def chain(name: str) -> set[str]:
    """A run and all that it goes back to: what its network has cost."""
    return {name}.union(*(chain(parent) for parent in runs()[name].parents))


def pairs() -> list[tuple[str, str]]:
    """Every two experts."""
    return [(a, b) for i, a in enumerate(EXPERTS) for b in EXPERTS[i + 1 :]]


def runs() -> dict[str, Run]:
    """Every run, in an order in which those that others start from come first."""
    found = {
        "direct": Run(),
        "proxy": Run(overrides=PROXY, steps="proxy"),
        "stage12": Run(("proxy",)),
        "stage12_head": Run(("proxy",), steps="head"),
        "stage123": Run(("proxy",), steps="tail", scales=SCALES, init_from="stage12_head"),
        "stage13": Run(("proxy",), scales=SCALES),
        "shuffled": Run(shuffled=True),
        "direct_raw": Run(normalized=False),
        "direct_compute": Run(steps="compute"),
        "direct_wide": Run(overrides=WIDE),
    }
    found |= {f"only_{name}": Run((name,)) for name in EXPERTS}
    return found | {f"pair_{a}_{b}": Run((a, b)) for a, b in pairs()}


MAIN = ("direct", "proxy", "stage12", "stage12_head", "stage123")  # the runs of the three main rows
NOT_ROWS = ("stage12_head",)
DONE = "done.json"  # in the folder of a finished run: its steps and FLOPs

LABELS = {
    "untrained": "untrained",
    "shuffled": "all experts, shuffled targets",
    "direct": "all experts directly (stage 2 only)",
    "direct_raw": "all experts directly, no statistics",
    "direct_compute": "all experts directly, compute of 1+2",
    "direct_wide": "all experts directly, twice the width",
    "proxy": "the proxy (stage 1)",
    "stage12": "stages 1+2",
    "stage13": "stages 1+3",
    "stage123": "stages 1+2+3",
}


def label(row: str) -> str:
    """What the table calls a row."""
    if row in LABELS:
        return LABELS[row]
    kind, _, names = row.partition("_")
    return {"only": f"{names} alone", "pair": f"{names.replace('_', ' + ')}", "expert": f"{names} itself"}[kind]


def steps_of(run: Run, size: Size, compute_steps: int = 0) -> int:
    """Steps of a run; `compute_steps` are those of "compute", which somebody has counted."""
    tail = max(2, round(size.steps * size.finetune))
    return {
        "student": size.steps,
        "proxy": size.proxy_steps,
        "head": size.steps - tail,
        "tail": tail,
        "compute": compute_steps,
    }[run.steps]


def config(run: Run, size: Size, seed: int, folder: Path, shared: Path, *, compute_steps: int = 0) -> ConfigDict:
    """The complete config of a run.

    Args:
      folder: of this seed's runs. shared: what all seeds use: pictures, features, statistics of the experts.
    """
    c = common.base()
    c.seed = seed
    c.total_steps = steps_of(run, size, compute_steps)
    c.batch_size = size.batch
    c.student_resolutions = run.scales
    c.students.student = common.student(MODEL, dtype="float32", **run.overrides)
    if run.init_from:
        c.students.student.init_from = str(folder / run.init_from)
    c.adapter.hidden_dim = 256
    c.loss.shuffle_targets = run.shuffled
    c.optimizer.learning_rate = 1e-3 if run.init_from else 2e-3
    c.optimizer.warmup_steps = c.total_steps // 10
    c.optimizer.weight_decay = 0.05
    c.optimizer.b2 = 0.98
    c.optimizer.clip_norm = 1.0
    c.data.image_size = EXPERT_SIDE
    c.data.sources.transfer = common.source("images", str(shared / "pictures" / "transfer"))
    c.data.crop_scale = (0.35, 1.0)
    c.data.threads = 2
    c.data.feature_cache = str(shared / "features")
    c.augment = ConfigDict({"flip_p": 0.5, "jitter_p": 0.0, "grayscale_p": 0.0, "blur_p": 0.0, "solarize_p": 0.0})
    c.checkpoint.save_every = 250
    c.checkpoint.keep = 1
    c.log_every = 25
    c.statistics_steps = size.statistics_steps
    if run.teachers == ("proxy",):
        c.teachers.proxy = common.encoder_teacher(MODEL, run.scales, checkpoint=str(folder / "proxy"))
        c.teachers.proxy.dtype = "float32"
        own = folder / "statistics" / "proxy"
    else:
        known = experts()
        for name in run.teachers:
            c.teachers[name] = known[name]
        own = shared / "statistics" / ("experts" if run.normalized else "none")
    # Which statistics the paper's stage 3 has it does not say; those of stage 2 are kept here, as in configs/stage3_*.
    setattr(c, "statistics_from" if run.scales != (SIDE,) else "statistics", str(own))
    return c.lock()
