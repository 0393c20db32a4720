"""Stage 3 for ConvNeXt-T. Reported in the paper after this stage: SPair 41.3, NYUv2 .430, ADE20k 43.5.

    python launch/train.py --config=configs/stage3_convnext_tiny.py --workdir=gs://BUCKET/stage3_convnext_tiny \\
        --config.students.convnext_tiny.init_from=gs://BUCKET/stage2_convnext_tiny \\
        --config.teachers.proxy.checkpoint=gs://BUCKET/stage1 \\
        --config.statistics_from=gs://BUCKET/stage2_convnext_tiny --config.data.sources.large.path=...

Sources of all figures: stage3_base.py.
"""

from ml_collections import ConfigDict

from configs import stage3_base


def get_config(mode: str = "") -> ConfigDict:
    return stage3_base.base({"convnext_tiny": "eupe_convnext_tiny"}, mode)
