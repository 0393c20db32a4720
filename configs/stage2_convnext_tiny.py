"""Stage 2 for ConvNeXt-T: 27.8M parameters, and 14.2M in its two adapters.

Its 8x8 grid at 256 pixels is upsampled to the proxy's 16x16.

    python launch/train.py --config=configs/stage2_convnext_tiny.py --workdir=gs://BUCKET/stage2_convnext_tiny \\
        --config.teachers.proxy.checkpoint=gs://BUCKET/stage1 \\
        --config.statistics=gs://BUCKET/stage2/statistics --config.data.sources.large.path=...

Sources of all figures: stage2_base.py. Statistics of the proxy come from launch/measure_statistics.py with this config.
"""

from ml_collections import ConfigDict

from configs import stage2_base


def get_config(mode: str = "") -> ConfigDict:
    return stage2_base.base({"convnext_tiny": "eupe_convnext_tiny"}, mode)
