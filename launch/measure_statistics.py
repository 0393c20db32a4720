"""Measures the frozen statistics of a recipe's teachers (EUPE §3.3), once, before training:

python launch/measure_statistics.py --config=configs/stage2_vitb.py --out=gs://BUCKET/stage2/statistics

On several hosts, start it on each of them with --distributed (docs/pods.md).
"""

if __name__ == "__main__":
    import launch.early  # noqa: F401

from absl import flags

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
    for name, statistics in measured.items():
        if not distributed.is_main():
            continue
        for kind in statistics.mean:
            mean, std = statistics.mean[kind], statistics.std[kind]
            print(
                f"{name} {kind}: {len(mean)} coordinates, {statistics.count[kind]} tokens, "
                f"mean {mean.min():.3g}..{mean.max():.3g}, std {std.min():.3g}..{std.max():.3g}"
            )


if __name__ == "__main__":
    cli.run(main)
