"""Runs a recipe's teachers once over augmented views of its images and keeps pixels and features:

python launch/precompute.py --config=configs/quickstart.py:stage1 --out=runs/quickstart/features --views=2

Training then names the folder, --config.data.feature_cache=runs/quickstart/features, and needs these teachers no more.
The same command resumes, and builds shards anew that are gone. With --verify it builds damaged ones anew too, and the
finished cache is read back, every byte; --out=FOLDER --verify alone checks one that is there.
"""

if __name__ == "__main__":
    import launch.early  # noqa: F401

from absl import flags

from eupe_jax.data.feature_cache import FeatureCache
from eupe_jax.data.feature_codec import PRECISIONS
from eupe_jax.training.precompute import precompute
from eupe_jax.training.preemption import Preemption
from launch import cli

CONFIG = cli.define_config()
OUT = flags.DEFINE_string("out", None, "folder of the cache, local or mounted")
VIEWS = flags.DEFINE_integer("views", 2, "augmented views of every image", lower_bound=1)
PRECISION = flags.DEFINE_enum("precision", "bf16", PRECISIONS, "how features are stored")
SHARDS = flags.DEFINE_integer("shards", None, "files; default: of about 256 MiB each", lower_bound=1)
RECORDS = flags.DEFINE_integer("records", None, "use only the first so many images of the source", lower_bound=1)
TEACHERS = flags.DEFINE_list("teachers", [], "names of the config's teachers to run; default: all")
VERIFY = flags.DEFINE_bool("verify", False, "read the cache back; build what is damaged anew")


def build() -> FeatureCache:
    return precompute(
        cli.require(CONFIG, "config"),
        cli.require(OUT, "out"),
        views=VIEWS.value,
        precision=PRECISION.value,
        shards=SHARDS.value,
        records=RECORDS.value,
        teachers=TEACHERS.value,
        verify=VERIFY.value,
    )


def main() -> None:
    only_verify = VERIFY.value and CONFIG.value is None
    with Preemption():  # finished shards stay: SIGTERM ends it at once, with the status that asks to be run again
        cache = FeatureCache(cli.require(OUT, "out")) if only_verify else build()
    if VERIFY.value and (damaged := cache.verify()):
        print("\n".join(damaged))
        raise ValueError(
            f"{OUT.value}: {len(damaged)} parts of the feature cache are damaged: the command that built it, with "
            "--verify, builds them anew"
        )
    print(f"{len(cache)} images x {cache.views} views in {OUT.value}; fingerprint {cache.fingerprint[:16]}")


if __name__ == "__main__":
    cli.run(main)
