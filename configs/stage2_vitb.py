"""Stage 2 for ViT-B/16: 85.7M parameters, and 14.2M in its two adapters.

    python launch/train.py --config=configs/stage2_vitb.py --workdir=gs://BUCKET/stage2_vitb \\
        --config.teachers.proxy.checkpoint=gs://BUCKET/stage1 \\
        --config.statistics=gs://BUCKET/stage2/statistics --config.data.sources.large.path=...

Sources of all figures: stage2_base.py. Statistics of the proxy come from launch/measure_statistics.py with this config.
"""

from ml_collections import ConfigDict

from configs import stage2_base


def get_config(mode: str = "") -> ConfigDict:
    return stage2_base.base({"vitb": "eupe_vitb16"}, mode)
