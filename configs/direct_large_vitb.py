"""DINOv3 ViT-L and PEcore-L, 300M parameters each, straight to ViT-B/16: for those without a pod.

    python launch/train.py --config=configs/direct_large_vitb.py --workdir=runs/direct_large_vitb \\
        --config.teachers.dinov3.checkpoint=... --config.teachers.pecore.checkpoint=... \\
        --config.data.sources.large.path=... \\
        --config.statistics=runs/direct_large_vitb_statistics   (from launch/measure_statistics.py with this config)

4% of the FLOPs of stages 1 and 2. What it gives up: the paper has no such run. Its nearest figures are "stage
2 only" (direct_vitb.py: level with all stages in kNN, far behind in dense tasks), with experts three to six times as
large. PElang is left out: at 448 pixels it would double the cost of a step; it helps text in images most (table 3:
TextVQA 48.6 without, 50.4 with it in stage 1). Zero-shot classification works through PEcore-L's text tower.

Experts and their sizes are ours: the published 300M-class DINOv3 at 256 pixels, as its larger sister in EUPE §4.1, and
PEcore-L at its own 336. Schedule and rate: direct_base.py. Fits devices one by one: no parameter is cut (`mesh.fsdp`).
"""

from ml_collections import ConfigDict

from configs import common, direct_base


def get_config(mode: str = "") -> ConfigDict:
    experts = {
        "dinov3": common.encoder_teacher("dinov3_vitl16", (256,)),
        "pecore": common.encoder_teacher("pe_core_l14_336", (336,)),
    }
    return common.finish(direct_base.base({"vitb": "eupe_vitb16"}, experts), mode)
