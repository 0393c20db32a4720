"""Stage 2: the frozen proxy -> one small student at 256x256, long (EUPE §3.1, §4.1).

From the paper: batch 8192, 390,000 iterations (3.19 billion samples), cosine schedule from a base rate of 2e-5, weight
decay 1e-4, 256 pixels for both, adapter width 3072, losses, data mixture.

Ours: AdamW (.9, .999), clipping at 3, 2,000 warm-up steps, RoPE coordinate rescale in training (on in the published
student factories). Whether the code behind the paper scaled its base rate is not known: see `optimizer.lr_scaling`.
"""

from collections.abc import Mapping

from ml_collections import ConfigDict

from configs import common


def base(models: Mapping[str, str], mode: str) -> ConfigDict:
    """The recipe of these students, {name: zoo model}; one forward pass of the proxy serves them all."""
    config = common.base()
    config.total_steps = 390_000
    config.batch_size = 8192
    config.students = ConfigDict({name: common.student(model, remat="names") for name, model in models.items()})
    config.teachers.proxy = common.encoder_teacher("eupe_proxy", (256,))
    config.student_resolutions = (256,)
    config.adapter.hidden_dim = 3072
    config.optimizer.learning_rate = 2e-5
    config.optimizer.warmup_steps = 2000
    config.optimizer.weight_decay = 1e-4
    config.data.image_size = 256
    config.data.sources = common.lvd_like_mixture()
    config.mesh.fsdp = 16
    return common.finish(config, mode)
