"""Stage 3 for ConvNeXt-B. Reported in the paper after this stage: SPair 37.7, NYUv2 .365, ADE20k 48.9.

    python launch/train.py --config=configs/stage3_convnext_base.py --workdir=gs://BUCKET/stage3_convnext_base \\
        --config.students.convnext_base.init_from=gs://BUCKET/stage2_convnext_base \\
        --config.teachers.proxy.checkpoint=gs://BUCKET/stage1 \\
        --config.statistics_from=gs://BUCKET/stage2_convnext_base --config.data.sources.large.path=...

Sources of all figures: stage3_base.py.
"""

from ml_collections import ConfigDict

from configs import stage3_base


def get_config(mode: str = "") -> ConfigDict:
    return stage3_base.base({"convnext_base": "eupe_convnext_base"}, mode)
