"""Stage 3 for ViT-S/16. Reported in the paper after this stage: IN1k-kNN 78.2, SPair 46.5, NYUv2 .455, ADE20k 46.6.

    python launch/train.py --config=configs/stage3_vits.py --workdir=gs://BUCKET/stage3_vits \\
        --config.students.vits.init_from=gs://BUCKET/stage2_vits \\
        --config.teachers.proxy.checkpoint=gs://BUCKET/stage1 \\
        --config.statistics_from=gs://BUCKET/stage2_vits --config.data.sources.large.path=...

Sources of all figures: stage3_base.py.
"""

from ml_collections import ConfigDict

from configs import stage3_base


def get_config(mode: str = "") -> ConfigDict:
    return stage3_base.base({"vits": "eupe_vits16"}, mode)
