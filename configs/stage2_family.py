"""Stage 2 for all six students at once: one forward pass of the proxy serves them all.

The proxy is most of what a step costs (87% for ViT-B), so six students together take about a quarter of the compute of
six runs. Each is trained as it would be alone, on the same images in the same order: optimiser, clipping, metrics and
checkpoint item are its own, and `load_encoder(workdir, student="vitb")` takes one out.

    python launch/measure_statistics.py --config=configs/stage2_family.py --out=gs://BUCKET/stage2/statistics \\
        --config.teachers.proxy.checkpoint=gs://BUCKET/stage1 --config.data.sources.large.path=...
    python launch/train.py --config=configs/stage2_family.py --workdir=gs://BUCKET/stage2_family \\
        --config.teachers.proxy.checkpoint=gs://BUCKET/stage1 \\
        --config.statistics=gs://BUCKET/stage2/statistics --config.data.sources.large.path=...

Sources of all figures: stage2_base.py. They are the same for all students, as in the paper.
"""

from ml_collections import ConfigDict

from configs import common, stage2_base


def get_config(mode: str = "") -> ConfigDict:
    return stage2_base.base(common.FAMILY, mode)
