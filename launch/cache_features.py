"""Runs a recipe's host teachers once over augmented views of its images and keeps their features:

python launch/cache_features.py --config=configs/quickstart.py:stage1 --out=runs/quickstart/features --views=2

Training then names the folder: --config.data.feature_cache=runs/quickstart/features. The same command resumes.
"""

from absl import flags

from eupe_jax.training.pipeline import cache_features
from launch import cli

CONFIG = cli.define_config()
OUT = flags.DEFINE_string("out", None, "folder of the cache")
VIEWS = flags.DEFINE_integer("views", 2, "augmented views of every image", lower_bound=1)


def main() -> None:
    cache = cache_features(cli.require(CONFIG, "config"), cli.require(OUT, "out"), VIEWS.value)
    print(f"{len(cache)} images x {cache.views} views in {OUT.value}; fingerprint {cache.fingerprint[:16]}")


if __name__ == "__main__":
    cli.run(main)
