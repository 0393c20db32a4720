"""The three experts of stage 1 straight to ViT-B/16: the paper's "stage 2 only" (EUPE table 2).

    python launch/train.py --config=configs/direct_vitb.py --workdir=gs://BUCKET/direct_vitb \\
        --config.teachers.pecore.checkpoint=... --config.teachers.pelang.checkpoint=... \\
        --config.teachers.dinov3.checkpoint=... --config.data.sources.large.path=... \\
        --config.statistics=gs://BUCKET/direct_vitb_statistics   (from launch/measure_statistics.py with this config)

A control, and no saving: three experts at their own sizes cost 8.4 TFLOPs an image where the proxy costs 1.0, so this
schedule costs 2.6 times as much as stages 1 and 2 together. Expected, from table 2, against all three stages: ImageNet
kNN 84.0 (84.1), TextVQA 46.8 (50.4), SPair 35.1 (51.3), NYUv2 0.616 (0.391), ADE20k 41.9 (52.4).

Experts and their sizes: stage 1's, EUPE §4.1. Schedule: stage 2's, EUPE §4.1 (batch 8192, 390,000 steps, base rate
2e-5), with our 2,000 warm-up steps; that "stage 2 only" ran it is our reading, and so is that it had all three experts.
"""

from ml_collections import ConfigDict

from configs import common, direct_base


def get_config(mode: str = "") -> ConfigDict:
    experts = {
        "pecore": common.encoder_teacher("pe_core_g14_448", (448,)),
        "pelang": common.encoder_teacher("pe_lang_g14_448", (448,), class_token="none"),
        "dinov3": common.encoder_teacher("dinov3_vith16plus", (256,)),
    }
    config = direct_base.base({"vitb": "eupe_vitb16"}, experts)
    config.total_steps = 390_000
    config.batch_size = 8192
    config.optimizer.learning_rate = 2e-5
    config.optimizer.warmup_steps = 2000
    config.mesh.fsdp = 16
    return common.finish(config, mode)
