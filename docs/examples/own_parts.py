"""A recipe of one's own parts: two teachers of two kinds, a student, a source and an evaluation that eupe_jax has not.

    export PYTHONPATH=docs/examples
    python launch/measure_statistics.py --config=docs/examples/own_parts.py --out=runs/own/statistics
    python launch/train.py --config=docs/examples/own_parts.py --workdir=runs/own/train \\
        --config.statistics=runs/own/statistics

It is sized to show that everything fits together: seconds on a CPU. Put zip files of images into data/own.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.base()
    config.total_steps = 4
    config.batch_size = 8
    config.student_resolutions = (32,)
    config.data.image_size = 32
    config.data.crop_scale = (0.35, 1.0)
    config.data.sources.own = common.source("zip", "data/own")
    config.data.threads = 2

    # A student of another shape is overrides of a model that exists; one of another kind is a family.
    config.students.mixer = common.student("convmixer_small", dtype="float32", width=16, depth=2, kernel_size=3)
    config.students.narrow = common.student("eupe_vitt16", dtype="float32", embed_dim=32, depth=2, num_heads=2)

    config.teachers.hog = common.host_teacher("hog_teacher:HogTeacher", 32)
    config.teachers.mixer = common.encoder_teacher(
        "convmixer_base", (32,), checkpoint="random", width=24, depth=1, kernel_size=3
    )

    config.adapter.hidden_dim = 32
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 1
    config.statistics_steps = 2
    config.log_every = 2
    config.evals.rank = common.evaluation("effective_rank", "data/pictures", every=4, resize=32, crop=32)
    return config.lock()
