"""What every recipe shares: the fields of a run, with the choices that the paper leaves open.

A recipe is a function `get_config(mode="")` that returns a complete ConfigDict; `--print_config` of launch/train.py
shows it whole. Any field can be overridden: `--config.optimizer.learning_rate=1e-4`. The mode `runlocal`
(`--config=configs/stage2_vitb.py:runlocal`) keeps the shape of the run and shrinks everything else, so that it
takes seconds on a laptop and needs neither data nor weights.

"Ours" below marks a choice of this project where the paper (EUPE, arXiv 2603.22387) is silent.
"""

import dataclasses
from collections.abc import Mapping

from ml_collections import ConfigDict

from eupe_jax.data.augment import AugmentConfig
from eupe_jax.distill import resolutions
from eupe_jax.models import zoo

MODES = ("", "runlocal")

# The six students of the paper, as configs and checkpoints call them.
FAMILY = {
    "vitt": "eupe_vitt16",
    "vits": "eupe_vits16",
    "vitb": "eupe_vitb16",
    "convnext_tiny": "eupe_convnext_tiny",
    "convnext_small": "eupe_convnext_small",
    "convnext_base": "eupe_convnext_base",
}


def base() -> ConfigDict:
    """Fields common to all stages. Recipes set the ones left at zero or empty."""
    config = ConfigDict()
    config.seed = 0
    config.total_steps = 0
    config.batch_size = 0  # global: images a step over all devices
    config.accumulate = 1  # micro-batches a step: the same gradients, a part of the activations in memory at a time

    config.students = ConfigDict()  # name -> student(...)
    config.teachers = ConfigDict()  # name -> encoder_teacher(...) or host_teacher(...)
    config.student_resolutions = (256,)  # one is drawn each step; teachers have their own, drawn independently

    config.adapter = ConfigDict()
    config.adapter.hidden_dim = 3072  # EUPE §4.1: 1536 in stage 1, 3072 in stages 2 and 3
    config.adapter.eps = 1e-5  # ours: PyTorch's LayerNorm default

    config.loss = ConfigDict()
    config.loss.patch_cosine = 0.9  # EUPE §3.2, alpha
    config.loss.patch_smooth_l1 = 0.1  # EUPE §3.2, beta
    config.loss.smooth_l1_beta = 1.0  # ours: PyTorch's default, as in AM-RADIO
    config.loss.shuffle_targets = False  # a control: images get their neighbours' targets
    # Factor of the loss at each pair of resolutions ("s256_t384": student 256, teacher 384), where there are several.
    # Ours: 1 for all. Losses are means over tokens, so no pair counts for more by having more of them.
    config.loss.pair_scale = ConfigDict()

    config.optimizer = ConfigDict()  # ours, but for learning rate, cosine and weight decay
    config.optimizer.learning_rate = 0.0  # "base" rate of EUPE §4.1
    config.optimizer.lr_scaling = "none"  # "none": the paper's figure taken literally; "sqrt": x 4 sqrt(B / 1024),
    # the rule of the code base it grew from; "linear": x B / 256
    config.optimizer.min_learning_rate = 0.0
    config.optimizer.warmup_steps = 0
    config.optimizer.weight_decay = 1e-4  # EUPE §4.1; not on biases, norms, LayerScale, tokens
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.clip_norm = 3.0  # DINOv3's distillation

    # Folder of statistics measured for this very run (launch/measure_statistics.py), or, declaring that resolution or
    # data differ, the folder or checkpoint of another run to take them from. Exactly one is set.
    config.statistics = ""
    config.statistics_from = ""
    config.statistics_steps = 500  # EUPE §4.1

    config.data = ConfigDict()
    config.data.image_size = 256  # canonical size the host crops to: the largest view of the run
    config.data.sources = ConfigDict()  # name -> source(...)
    config.data.mixing = "batch"  # a step draws from one source (EUPE §3.4); "record" mixes sources within each batch
    config.data.mode = "crop"  # random-resized crop; "resize" squashes, "none" takes pictures of that size as they are
    config.data.crop_scale = (0.32, 1.0)  # ours: DINOv3's global crop; the paper only names RandomResizedCrop
    config.data.crop_ratio = (0.75, 4 / 3)
    config.data.max_pixels = 80_000_000  # of a picture; larger ones (decompression bombs) count as broken
    config.data.max_broken_fraction = 0.001  # of the records read; more, and more than 20, stop the run. 0: the first
    # Folder made by launch/precompute.py: teachers in it are read, not loaded or run, and pixels are augmented already.
    config.data.feature_cache = ""
    config.data.threads = 16  # decoding threads a host (or a worker)
    config.data.workers = 0  # decoding processes a host; 0 decodes in the training process

    # EUPE §4.1 names the operations and no figures; these are DINOv3's second global crop.
    config.augment = ConfigDict(dataclasses.asdict(AugmentConfig()))

    config.checkpoint = ConfigDict()
    config.checkpoint.save_every = 2000  # steps
    config.checkpoint.keep = 3
    config.checkpoint.keep_every = 0  # steps kept for good, 0: none
    config.checkpoint.keep_best = 0  # of those that were evaluated, the best ones by this scalar of the evaluations
    config.checkpoint.best_metric = ""  # as metrics.jsonl has it: "EVALUATION/SCALAR"
    config.checkpoint.best_mode = "max"  # or "min"

    # What a run does when something goes wrong (docs/reliability.md).
    config.faults = ConfigDict()
    config.faults.max_skipped = 10  # steps in a row that are not applied to a student; then the run stops
    config.faults.spike_factor = 0.0  # a step whose gradient norm is this many times the recent average is not applied
    # either; 0: every finite step is applied
    config.faults.fingerprint_every = 1000  # steps between comparisons of the copies of all parameters; 0: never
    config.faults.stall_factor = 10.0  # a step that takes this many times the median is reported as a stall

    config.mesh = ConfigDict()
    config.mesh.fsdp = 1  # devices a parameter is cut over; the data axis takes the rest
    config.mesh.tensor = 1  # devices that share the work on each image; 1 unless an image's activations do not fit
    config.mesh.slices = 0  # TPU slices joined by the data-centre network, which the data axis spans; 0: as found

    # How the chips compute. "auto" is what is known to be best for the chip; no weights depend on it.
    config.compute = ConfigDict()
    config.compute.attention = "auto"  # "fused" (our TPU kernel), "cudnn" (GPU), "plain"
    # "exact", "tanh": of frozen teachers alone; students are always exact. What "auto" is on the chips that begin a run
    # is noted in its config.json and kept to: other chips must ask for the same. Statistics do not say with which they
    # were measured: either serves.
    config.compute.teacher_gelu = "auto"
    config.compute.async_collectives = "auto"  # "on", "off"

    # Evaluations inside training, name -> evaluation(...): every so many steps and at the end. What is trained does not
    # depend on them.
    config.evals = ConfigDict()

    config.log_every = 50
    # Where figures are shown beside metrics.jsonl (docs/logging.md): also "wandb" and "mlflow", where installed.
    config.loggers = ("tensorboard",)
    return config


def evaluation(
    name: str, data: str, every: int, *, teachers: Mapping[str, str] | None = None, **settings
) -> ConfigDict:
    """One evaluation inside training: `name` as launch/evaluate.py --list has it, with its settings.

    teachers: name -> checkpoint (or host:package.module:Class) of experts, for similarity and zero_shot.
    """
    entry = {"eval": name, "data": data, "every": every, "settings": settings, "teachers": dict(teachers or {})}
    return ConfigDict(entry)


def student(
    model: str, *, init_from: str = "", dtype: str = "bfloat16", remat: str = "none", **overrides
) -> ConfigDict:
    """One trainable encoder. `overrides` are constructor arguments of the model."""
    entry = ConfigDict({"model": model, "dtype": dtype, "remat": remat})
    entry.overrides = ConfigDict(overrides)
    # A checkpoint (backbone and adapters; fresh optimiser) or an official .safetensors/.pt file (backbone); "" starts
    # from random weights.
    entry.init_from = init_from
    entry.init_adapters = True
    return entry


def encoder_teacher(
    model: str, resolutions: tuple[int, ...], *, class_token: str = "native", checkpoint: str = "", **overrides
) -> ConfigDict:
    """A frozen Flax encoder inside the step. `checkpoint`: an Orbax checkpoint, or "random" for smoke tests."""
    entry = ConfigDict({"kind": "encoder", "model": model, "checkpoint": checkpoint, "student": ""})
    entry.overrides = ConfigDict(overrides)
    entry.dtype = "bfloat16"
    return _teacher(entry, resolutions, class_token)


def host_teacher(factory: str, resolution: int, *, class_token: str = "native", **kwargs) -> ConfigDict:
    """A frozen teacher beside the input pipeline: `factory` is an import path "package.module:Class"."""
    entry = ConfigDict({"kind": "host", "factory": factory, "kwargs": ConfigDict(kwargs)})
    return _teacher(entry, (resolution,), class_token)


def _teacher(entry: ConfigDict, resolutions: tuple[int, ...], class_token: str) -> ConfigDict:
    entry.resolutions = tuple(resolutions)
    entry.class_token = class_token
    entry.class_weight = 1.0
    entry.patch_weight = 1.0
    return entry


def source(kind: str, path: str, weight: float = 1.0, *, repeat: int = 0, **options) -> ConfigDict:
    """One image source, drawn from in proportion to `weight` (`config.data.mixing` says how).

    repeat: how often each of its records may be seen in a run, at most; 0: endlessly.
    """
    entry = {"kind": kind, "path": path, "weight": weight, "repeat": repeat, "options": ConfigDict(options)}
    return ConfigDict(entry)


def lvd_like_mixture() -> ConfigDict:
    """EUPE §3.4: a batch is ImageNet-1k alone with probability 10%, else from the large set.

    LVD-1689M is not public: name your own large collection with --config.data.sources.large.path.
    """
    return ConfigDict(
        {
            "imagenet": source("tfds", "imagenet2012:train", weight=0.1, data_dir=""),  # "": tfds' own folder
            "large": source("images", "", weight=0.9),
        }
    )


TINY = {
    "vit": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "convnext": {"depths": (1, 1, 2, 1), "dims": (8, 16, 32, 64)},
    "perception_encoder": {"width": 32, "depth": 2, "num_heads": 2, "mlp_dim": 64, "pool_heads": 2},
}


def finish(config: ConfigDict, mode: str) -> ConfigDict:
    """Applies `mode`, then locks the fields so that a misspelt override is an error.

    Raises:
      ValueError: unknown mode, or one that these teachers do not have.
    """
    if mode not in MODES:
        raise ValueError(f"unknown config mode {mode!r}: use one of {MODES}")
    if mode == "runlocal":
        _shrink(config)
    teachers = {name: entry.resolutions for name, entry in config.teachers.items()}
    pairs = resolutions.every(config.student_resolutions, teachers)
    if len(pairs) > 1:
        config.loss.pair_scale = ConfigDict({str(pair): 1.0 for pair in pairs})
    return config.lock()


def _shrink(config: ConfigDict) -> None:
    """Two random tiny models, 64 pixels and below, synthetic images, a few steps: seconds, no data, no weights."""
    if hosts := [name for name, entry in config.teachers.items() if entry.kind == "host"]:
        raise ValueError(
            f"teachers {hosts} run on the host and have no small version: leave runlocal out, and shorten the run by "
            "--config.total_steps=6"
        )
    sides = {side: 32 * (1 + i) for i, side in enumerate(sorted(set(config.student_resolutions)))}
    config.student_resolutions = tuple(sides[s] for s in config.student_resolutions)
    for entry in (*config.students.values(), *config.teachers.values()):
        family = zoo.spec(entry.model).family
        entry.overrides = ConfigDict(TINY[family])
        entry.dtype = "float32"
    for entry in config.teachers.values():
        patch = zoo.spec(entry.model).patch_size
        entry.resolutions = tuple(patch * 2 * (1 + i) for i in range(len(entry.resolutions)))
        entry.checkpoint = "random"
    config.data.sources = ConfigDict({"synthetic": source("synthetic", "", size=64)})
    config.data.image_size = max(config.student_resolutions)
    config.data.threads = 2
    config.total_steps, config.batch_size, config.adapter.hidden_dim = 6, 8, 16
    config.optimizer.warmup_steps = 1
    config.statistics_steps = 2
    config.checkpoint.save_every = 3
    config.mesh.fsdp = 1
    config.log_every = 1
    for entry in config.students.values():
        entry.init_from = ""
