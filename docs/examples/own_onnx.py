"""An ONNX file of yours and a packaged expert, straight to a ViT-T on your own pictures; sized for two CPU cores.

    MINE="--config=docs/examples/own_onnx.py --config.data.sources.mine.path=/path/to/photos \\
        --config.teachers.mine.kwargs.path=/path/to/model.onnx --config.teachers.mine.kwargs.patches=last_map"
    python launch/measure_statistics.py $MINE --out=runs/mine/statistics
    python launch/train.py $MINE --workdir=runs/mine/train
    python convert/to_executorch.py --checkpoint=runs/mine/train --out=mine.pte

Copy the file and change what you like.
"""

from ml_collections import ConfigDict

from configs import common

SIDE = 128


def get_config() -> ConfigDict:
    config = common.base()
    config.students.vitt = common.student("eupe_vitt16", dtype="float32", layerscale_init=1.0, rope_rescale=None)
    config.student_resolutions = (SIDE,)

    # Tensors are named as the file names them; a wrong name is an error that lists the outputs.
    config.teachers.mine = common.host_teacher(
        "eupe_jax.distill.host_teachers:OnnxTeacher",
        SIDE,
        path="model.onnx",
        patches="patches",  # [B, D, h, w]; else patch_layout="NHWC", or "BND" with prefix_tokens=1 for one class token
        class_token="none",  # "native" with cls="NAME" of a [B, D] tensor
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    config.teachers.content = common.host_teacher("eupe_jax.distill.host_teachers:EfficientNetLite0", SIDE)

    config.data.sources.mine = common.source("images", "photos")  # a folder of image files, in folders or not
    config.data.image_size = SIDE
    config.data.crop_scale = (0.35, 1.0)
    config.data.threads = 2

    config.batch_size = 16
    config.total_steps = 1000
    config.adapter.hidden_dim = 512
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.statistics = "runs/mine/statistics"
    config.statistics_steps = 50
    config.checkpoint.save_every = 250
    config.log_every = 10
    return config.lock()
