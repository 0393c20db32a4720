"""Stage 3 for ViT-T/16. Reported in the paper after this stage: IN1k-kNN 66.3, SPair 37.2, NYUv2 .571, ADE20k 36.7.

    python launch/train.py --config=configs/stage3_vitt.py --workdir=gs://BUCKET/stage3_vitt \\
        --config.students.vitt.init_from=gs://BUCKET/stage2_vitt \\
        --config.teachers.proxy.checkpoint=gs://BUCKET/stage1 \\
        --config.statistics_from=gs://BUCKET/stage2_vitt --config.data.sources.large.path=...

Sources of all figures: stage3_base.py.
"""

from ml_collections import ConfigDict

from configs import stage3_base


def get_config(mode: str = "") -> ConfigDict:
    return stage3_base.base({"vitt": "eupe_vitt16"}, mode)
