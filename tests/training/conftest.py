"""A tiny run: two random teachers, one student, synthetic pictures."""

import dataclasses

import pytest
from ml_collections import ConfigDict

from configs import common
from eupe_jax.data.augment import AugmentConfig
from eupe_jax.training.measure import measure_statistics


def tiny_config(steps=4, students=("vit",)):
    config = common.base()
    config.total_steps, config.batch_size, config.log_every = steps, 8, 1
    models = {"vit": ("eupe_vitt16", "vit"), "convnext": ("eupe_convnext_tiny", "convnext")}
    for name in students:
        model, family = models[name]
        # at the published 1e-5 and 1e-6 the blocks are invisible and nothing is proven
        config.students[name] = common.student(model, dtype="float32", layerscale_init=0.5, **common.TINY[family])
    for name, sizes in (("a", (32,)), ("b", (48,))):
        config.teachers[name] = common.encoder_teacher(
            "dinov3_vits16", sizes, checkpoint="random", layerscale_init=0.5, **common.TINY["vit"]
        )
        config.teachers[name].dtype = "float32"
    config.student_resolutions = (32,)
    config.adapter.hidden_dim = 16
    config.optimizer.learning_rate = 1e-2
    config.statistics_steps = 2
    config.data.sources.synthetic = common.source("synthetic", "", size=48)
    config.data.image_size = 48
    config.data.threads = 2
    config.checkpoint.save_every = 2
    config.augment = ConfigDict(dataclasses.asdict(AugmentConfig(jitter_p=0.0, blur_p=0.0)))  # quick to compile
    return config


@pytest.fixture(scope="session")
def tiny_statistics(tmp_path_factory):
    folder = tmp_path_factory.mktemp("statistics")
    measure_statistics(tiny_config(), folder)
    return str(folder)
