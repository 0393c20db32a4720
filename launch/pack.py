"""Packs images of any source into ArrayRecord shards, the format for pods:

  python launch/pack.py --source=images --path=/data/images --out=/data/packed --workers=16
  python launch/pack.py --source=tar --path='/data/{000000..009999}.tar' --out=/data/lvd --shards=4096 --max_side=512
  python launch/pack.py --verify --out=/data/packed --workers=16

The same command again goes on where a stopped one left off, and finishes with the same bytes. manifest.json, written
last, lists shards, hashes and broken images. Training then takes --config.data.sources.NAME.kind=array_record with the
folder as path. --verify reads a finished folder again and names what is damaged: remove those shards and pack again.
"""

if __name__ == "__main__":
    import launch.early  # noqa: F401

import os
from pathlib import Path

from absl import flags

from eupe_jax.data import packing
from eupe_jax.data.pack_shard import ImageOptions
from eupe_jax.data.sources import registry
from eupe_jax.training.preemption import Preemption
from launch import cli

SOURCE = flags.DEFINE_string("source", "images", f"kind of source: {', '.join(registry.KINDS)}")
PATH = flags.DEFINE_string("path", "", "where the source is")
OPTION = flags.DEFINE_multi_string("option", [], "NAME=VALUE of the source's options (repeat it for more)")
OUT = flags.DEFINE_string("out", None, "folder of the shards (a local path or a mounted bucket)")
NAME = flags.DEFINE_string("name", "images", "how names of shards begin")
SHARDS = flags.DEFINE_integer("shards", None, "how many shards", lower_bound=1)
SHARD_RECORDS = flags.DEFINE_integer("shard_records", 10_000, "images a shard, at most; --shards wins", lower_bound=1)
MAX_SIDE = flags.DEFINE_integer("max_side", 0, "shrink larger images to this side, as JPEG; 0: none", lower_bound=0)
SIDE = flags.DEFINE_enum("side", "longest", ["longest", "shortest"], "which side --max_side bounds")
QUALITY = flags.DEFINE_integer("quality", 90, "JPEG quality of shrunk images", lower_bound=1, upper_bound=100)
CHECK = flags.DEFINE_enum("check", "header", ["header", "decode"], "what is read of images that stay as they are")
MAX_PIXELS = flags.DEFINE_integer(
    "max_pixels", ImageOptions.max_pixels, "images of more pixels count as broken", lower_bound=1
)
ON_BROKEN = flags.DEFINE_enum(
    "on_broken", "stop", packing.POLICIES, "broken images: stop past --max_broken_fraction, drop them all, or keep them"
)
FRACTION = flags.DEFINE_float("max_broken_fraction", 0.001, "of all images: more broken ones stop the pack")
WORKERS = flags.DEFINE_integer("workers", os.cpu_count() or 1, "processes", lower_bound=1)
VERIFY = flags.DEFINE_bool("verify", False, "read a finished folder again and name what is damaged")


def main() -> None:
    with Preemption():  # finished shards stay: SIGTERM ends it at once, with the status that asks to be run again
        pack()


def pack() -> None:
    out = cli.require(OUT, "out")
    if "://" in out:
        raise ValueError(f"--out {out}: shards are written to a local folder or a mounted bucket (gcsfuse)")
    if VERIFY.value:
        if damage := packing.verify(out, workers=WORKERS.value):
            print("\n".join(damage))
            raise ValueError(f"{out}: {len(damage)} findings, above: remove damaged shards and run the pack again")
        print(f"{out}: every shard and record is as its manifest says")
        return
    options = dict(map(_option, OPTION.value))
    source = registry.open_source(SOURCE.value, PATH.value, field="--source", **options)
    manifest = packing.pack(
        source,
        Path(out),
        kind=SOURCE.value,
        path=PATH.value,
        source_options=options,
        shards=SHARDS.value or -(-len(source) // SHARD_RECORDS.value),
        name=NAME.value,
        images=ImageOptions(MAX_SIDE.value, SIDE.value, QUALITY.value, CHECK.value, MAX_PIXELS.value),
        on_broken=ON_BROKEN.value,
        max_broken_fraction=FRACTION.value,
        workers=WORKERS.value,
    )
    broken = sum(len(shard["broken"]) for shard in manifest["shards"])
    print(
        f"{manifest['records']} images ({manifest['encoded_anew']} encoded anew), {manifest['bytes'] / 1e9:.3f} GB in "
        f"{manifest['shard_count']} shards of {out}; {broken} broken ones {manifest['broken_images']}, "
        f"listed in {packing.MANIFEST}"
    )


def _option(text: str) -> tuple[str, object]:
    """A number or true/false as such, anything else as text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"--option {text!r}: expected NAME=VALUE")
    if value.lower() in ("true", "false"):
        return name, value.lower() == "true"
    return name, int(value) if value.lstrip("-").isdigit() else value


if __name__ == "__main__":
    cli.run(main)
