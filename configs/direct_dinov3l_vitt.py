"""DINOv3 ViT-L alone, 300M parameters, to ViT-T/16, a size that DINOv3 does not have: the cheapest recipe.

    python launch/train.py --config=configs/direct_dinov3l_vitt.py --workdir=runs/direct_dinov3l_vitt \\
        --config.teachers.dinov3.checkpoint=... --config.data.sources.large.path=... \\
        --config.statistics=runs/direct_dinov3l_vitt_statistics   (from launch/measure_statistics.py with this config)

1% of the FLOPs of stages 1 and 2. What it gives up: everything that DINOv3 does not know. It has no text, so no
zero-shot classification; and DINOv3's own ViT-S lies below EUPE's in text and understanding (EUPE table 5: TextVQA 41.7
and 44.1, GQA 64.2 and 65.0), level with it in segmentation (ADE20k 46.9 and 46.6), ahead in depth (NYUv2 0.404 and
0.455). For a ViT-S or ViT-B from DINOv3 alone take DINOv3's own, which were distilled from its 7B model.

The expert and its size (256 pixels, as DINOv3-H+ in EUPE §4.1) are ours. Schedule and rate: direct_base.py.
"""

from ml_collections import ConfigDict

from configs import common, direct_base


def get_config(mode: str = "") -> ConfigDict:
    experts = {"dinov3": common.encoder_teacher("dinov3_vitl16", (256,))}
    return common.finish(direct_base.base({"vitt": "eupe_vitt16"}, experts), mode)
