"""Stage 2 for ViT-S/16: 21.6M parameters, and 11.8M in its two adapters.

    python launch/train.py --config=configs/stage2_vits.py --workdir=gs://BUCKET/stage2_vits \\
        --config.teachers.proxy.checkpoint=gs://BUCKET/stage1 \\
        --config.statistics=gs://BUCKET/stage2/statistics --config.data.sources.large.path=...

Sources of all figures: stage2_base.py. Statistics of the proxy come from launch/measure_statistics.py with this config.
"""

from ml_collections import ConfigDict

from configs import stage2_base


def get_config(mode: str = "") -> ConfigDict:
    return stage2_base.base({"vits": "eupe_vits16"}, mode)
