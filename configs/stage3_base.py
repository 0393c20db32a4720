"""Stage 3: a short multi-resolution finetune of a stage-2 student (EUPE §3.1, §4.1).

From the paper: starts from the stage-2 student, same proxy as teacher, batch 4096, 100,000 iterations (0.41 billion
samples), base rate 1e-5, student and proxy each draw one of {256, 384, 512} at every iteration, independently.

Ours: weight decay as in stage 2, cosine as in stage 2, 500 warm-up steps, stage 2's statistics (its adapters were
trained on them), adapters carried over, fresh optimiser.
"""

from collections.abc import Mapping

from ml_collections import ConfigDict

from configs import common

PYRAMID = (256, 384, 512)


def base(models: Mapping[str, str], mode: str) -> ConfigDict:
    """The recipe of these students, {name: zoo model}; one forward pass of the proxy serves them all."""
    config = common.base()
    config.total_steps = 100_000
    config.batch_size = 4096
    config.students = ConfigDict({name: common.student(model, remat="names") for name, model in models.items()})
    config.teachers.proxy = common.encoder_teacher("eupe_proxy", PYRAMID)
    config.student_resolutions = PYRAMID
    config.adapter.hidden_dim = 3072
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_steps = 500
    config.optimizer.weight_decay = 1e-4
    config.data.image_size = max(PYRAMID)
    config.data.sources = common.lvd_like_mixture()
    config.mesh.fsdp = 16
    return common.finish(config, mode)
