"""Stage 3 for all six students at once, from the six of stage 2: one forward pass of the proxy serves them all.

At each step all students see the images at one size, drawn anew, and the proxy at one of its own: what a student sees
is what it would see in a run of its own.

    python launch/train.py --config=configs/stage3_family.py --workdir=gs://BUCKET/stage3_family \\
        --config.students.vitt.init_from=gs://BUCKET/stage2_family \\
        --config.students.vits.init_from=gs://BUCKET/stage2_family  (and so on, for each student) \\
        --config.teachers.proxy.checkpoint=gs://BUCKET/stage1 \\
        --config.statistics_from=gs://BUCKET/stage2_family --config.data.sources.large.path=...

Sources of all figures: stage3_base.py. They are the same for all students, as in the paper.
"""

from ml_collections import ConfigDict

from configs import common, stage3_base


def get_config(mode: str = "") -> ConfigDict:
    return stage3_base.base(common.FAMILY, mode)
