"""Stage 3 for ViT-B/16. Reported in the paper after this stage: IN1k-kNN 84.1, SPair 51.3, NYUv2 .391, ADE20k 52.4.

    python launch/train.py --config=configs/stage3_vitb.py --workdir=gs://BUCKET/stage3_vitb \\
        --config.students.vitb.init_from=gs://BUCKET/stage2_vitb \\
        --config.teachers.proxy.checkpoint=gs://BUCKET/stage1 \\
        --config.statistics_from=gs://BUCKET/stage2_vitb --config.data.sources.large.path=...

Sources of all figures: stage3_base.py.
"""

from ml_collections import ConfigDict

from configs import stage3_base


def get_config(mode: str = "") -> ConfigDict:
    return stage3_base.base({"vitb": "eupe_vitb16"}, mode)
