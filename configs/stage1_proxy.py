"""Stage 1: several frozen experts -> one 1.9B proxy (EUPE §3.1, §4.1).

    python launch/measure_statistics.py --config=configs/stage1_proxy.py --out=gs://BUCKET/stage1_statistics \\
        --config.teachers.pecore.checkpoint=... --config.teachers.pelang.checkpoint=... \\
        --config.teachers.dinov3.checkpoint=... --config.data.sources.large.path=...
    python launch/train.py --config=configs/stage1_proxy.py --workdir=gs://BUCKET/stage1 \\
        --config.statistics=gs://BUCKET/stage1_statistics  (and the fields above)

From the paper: the three experts and their input sizes (448 for both Perception Encoders, 256 for DINOv3-H+), adapter
width 1536, losses and weights, normalisation over 500 iterations, data mixture, ImageNet pixel statistics for the
student.

Ours, because the paper gives no figure (it points to AM-RADIO): batch 2048, 300,000 steps (AM-RADIO saw 614M images),
base rate 1e-3 at cosine with 5,000 warm-up steps, student input 256, proxy shape (PE-G's trunk with DINOv3's block:
1536 x 50, 1.85B), proxy from random weights. PEcore's class token is its attention pool before `proj` (1536-d fits the
adapter rule "hidden = widest teacher"); PElang has no class token, so no class loss. Each expert gets its own published
pixel statistics.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(mode: str = "") -> ConfigDict:
    config = common.base()
    config.total_steps = 300_000
    config.batch_size = 2048
    config.students.proxy = common.student("eupe_proxy", remat="names")
    config.teachers.pecore = common.encoder_teacher("pe_core_g14_448", (448,))
    config.teachers.pelang = common.encoder_teacher("pe_lang_g14_448", (448,), class_token="none")
    config.teachers.dinov3 = common.encoder_teacher("dinov3_vith16plus", (256,))
    config.adapter.hidden_dim = 1536
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 5000
    config.data.image_size = 448
    config.data.sources = common.lvd_like_mixture()
    config.mesh.fsdp = 16
    return common.finish(config, mode)
