"""Stage 3 for ConvNeXt-S. Reported in the paper after this stage: SPair 40.1, NYUv2 .388, ADE20k 46.8.

    python launch/train.py --config=configs/stage3_convnext_small.py --workdir=gs://BUCKET/stage3_convnext_small \\
        --config.students.convnext_small.init_from=gs://BUCKET/stage2_convnext_small \\
        --config.teachers.proxy.checkpoint=gs://BUCKET/stage1 \\
        --config.statistics_from=gs://BUCKET/stage2_convnext_small --config.data.sources.large.path=...

Sources of all figures: stage3_base.py.
"""

from ml_collections import ConfigDict

from configs import stage3_base


def get_config(mode: str = "") -> ConfigDict:
    return stage3_base.base({"convnext_small": "eupe_convnext_small"}, mode)
