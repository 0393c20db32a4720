"""The quickstart's recipes: two real experts -> a small proxy -> a real ViT-T/16, minutes on two CPU cores.

    make quickstart                      # all of it, with a report at the end
    python launch/train.py --config=configs/quickstart.py:stage2 --workdir=runs/quickstart/stage2   # one step by hand

Modes: stage1, stage2, stage3, and shuffled (stage 2 on other images' targets: a control). The losses, adapters,
normalisation and the road are EUPE's. Everything else is sized for minutes instead of weeks, and is ours: experts
(EfficientNet-Lite0 for content, PP-OCRv4's detector for text; both Apache-2.0), a three-stage ConvNeXt of 1.4M
parameters as proxy (far better for the CPU second than a small ViT in so short a run), 64 to 96 pixels, batch 16,
LayerScale 1 (published: 1e-5 and 1e-6, too slow to open in a few hundred steps), no random rescale of RoPE coordinates
(it costs .025 of cosine in 300 steps), and learning rates of 1e-3 to 3e-3.
"""

from ml_collections import ConfigDict

from configs import common

FOLDER = "runs/quickstart"
EXPERT_RESOLUTION = 128
SCALES = (64, 80, 96)
STEPS = {"stage1": 1000, "stage2": 450, "stage3": 90, "shuffled": 300}
PROXY = {"depths": (1, 1, 4), "dims": (48, 96, 192), "depthwise": "matmul", "layerscale_init": 1.0}


def get_config(mode: str = "stage1", folder: str = FOLDER) -> ConfigDict:
    """One recipe of the road below `folder`.

    Raises:
      ValueError: unknown mode.
    """
    if mode not in STEPS:
        raise ValueError(f"unknown quickstart mode {mode!r}: use one of {tuple(STEPS)}")
    config = common.base()
    config.total_steps = STEPS[mode]
    config.batch_size = 16
    config.student_resolutions = SCALES if mode == "stage3" else (64,)
    config.adapter.hidden_dim = 256
    config.optimizer.learning_rate = {"stage1": 3e-3, "stage3": 1e-3}.get(mode, 2e-3)
    config.optimizer.warmup_steps = STEPS[mode] // 10
    config.optimizer.weight_decay = 0.05
    config.optimizer.b2 = 0.98
    config.optimizer.clip_norm = 1.0
    config.data.image_size = EXPERT_RESOLUTION
    config.data.sources.train = common.source("images", f"{folder}/images/train")
    config.data.crop_scale = (0.35, 1.0)
    config.data.threads = 2
    config.augment = ConfigDict({"flip_p": 0.5, "jitter_p": 0.0, "grayscale_p": 0.0, "blur_p": 0.0, "solarize_p": 0.0})
    config.checkpoint.save_every = 100
    config.checkpoint.keep = 1
    config.log_every = 10
    (_stage1 if mode == "stage1" else _later_stage)(config, mode, folder)
    return config.lock()


def _stage1(config: ConfigDict, mode: str, folder: str) -> None:
    config.students.proxy = common.student("eupe_convnext_tiny", dtype="float32", **PROXY)
    hosts = "eupe_jax.distill.host_teachers:"
    config.teachers.efficientnet = common.host_teacher(f"{hosts}EfficientNetLite0", EXPERT_RESOLUTION, threads=1)
    config.teachers.ppocr = common.host_teacher(
        f"{hosts}PPOCRv4Detector", EXPERT_RESOLUTION, class_token="none", threads=1
    )
    config.data.feature_cache = f"{folder}/features"
    config.statistics = f"{folder}/statistics/experts"
    config.statistics_steps = 125


def _later_stage(config: ConfigDict, mode: str, folder: str) -> None:
    config.students.student = common.student(
        "eupe_vitt16", dtype="float32", layerscale_init=1.0, rope_rescale=None
    )
    config.teachers.proxy = common.encoder_teacher(
        "eupe_convnext_tiny", config.student_resolutions, checkpoint=f"{folder}/stage1"
    )
    config.teachers.proxy.dtype = "float32"
    config.statistics_steps = 60
    config.loss.shuffle_targets = mode == "shuffled"
    if mode == "stage3":
        config.students.student.init_from = f"{folder}/stage2"
        config.statistics_from = f"{folder}/statistics/proxy"
    else:
        config.statistics = f"{folder}/statistics/proxy"
