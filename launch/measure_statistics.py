"""Measures the frozen statistics of a recipe's teachers (EUPE §3.3), once, before training:

python launch/measure_statistics.py --config=configs/stage2_vitb.py --out=gs://BUCKET/stage2/statistics

A card of them for people, README.md, and its picture lie beside them. On several hosts, start it on each of them with
--distributed (docs/pods.md).
"""

if __name__ == "__main__":
    import launch.early  # noqa: F401

from collections.abc import Mapping

from absl import flags
from etils import epath

from convert import statistics_card
from eupe_jax.distill.normalization import Statistics
from eupe_jax.files import write_whole
from eupe_jax.training import distributed
from eupe_jax.training.measure import measure_statistics
from eupe_jax.training.preemption import Preemption
from launch import cli, processes

CONFIG = cli.define_config()
OUT = flags.DEFINE_string("out", None, "folder for TEACHER.safetensors files")


def main() -> None:
    config, out = cli.require(CONFIG, "config"), cli.require(OUT, "out")
    with Preemption() as preemption:  # SIGTERM ends it at once: files are written when all is measured
        processes.join(preemption)
        measured = measure_statistics(config, out)
    if not distributed.is_main():
        return
    describe(epath.Path(out), measured)
    for name, statistics in measured.items():
        for kind in statistics.mean:
            mean, std = statistics.mean[kind], statistics.std[kind]
            print(
                f"{name} {kind}: {len(mean)} coordinates, {statistics.count[kind]} tokens, "
                f"mean {mean.min():.3g}..{mean.max():.3g}, std {std.min():.3g}..{std.max():.3g}"
            )


def describe(folder: epath.Path, measured: Mapping[str, Statistics]) -> None:
    """Writes the card of {teacher: statistics}, and its picture where matplotlib is installed."""
    picture = statistics_card.histograms(measured)
    if picture:
        write_whole(folder / statistics_card.PICTURE, picture)
    name = statistics_card.PICTURE if picture else None
    write_whole(folder / statistics_card.CARD, statistics_card.card(measured, name))


if __name__ == "__main__":
    cli.run(main)
