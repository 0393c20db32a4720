"""Experts straight to a student, without a proxy: what the leaves share. Costs, and what is given up: docs/direct.md.

From the paper (EUPE §3.2-3.4, §4.1): losses and weights, statistics over 500 iterations, data mixture, student at 256
pixels, adapter width 3072 (stages 2 and 3), weight decay 1e-4. Each expert gets its own published pixel statistics and
input size.

Ours: schedule and rate are stage 1's (stage1_proxy.py), which is the same problem with a large student: batch 2048,
300,000 steps (AM-RADIO saw 614M images), base rate 1e-3 at cosine with 5,000 warm-up steps. direct_vitb.py takes the
paper's stage 2 instead.
"""

from collections.abc import Mapping

from ml_collections import ConfigDict

from configs import common


def base(students: Mapping[str, str], experts: Mapping[str, ConfigDict]) -> ConfigDict:
    """A recipe for these students, {name: zoo model}, and experts, {name: teacher}; the leaf finishes it."""
    config = common.base()
    config.total_steps = 300_000
    config.batch_size = 2048
    config.students = ConfigDict({name: common.student(model, remat="names") for name, model in students.items()})
    config.teachers = ConfigDict(dict(experts))
    config.student_resolutions = (256,)
    config.adapter.hidden_dim = 3072
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 5000
    config.optimizer.weight_decay = 1e-4
    config.data.image_size = max(256, *(side for expert in experts.values() for side in expert.resolutions))
    config.data.sources = common.lvd_like_mixture()
    return config
