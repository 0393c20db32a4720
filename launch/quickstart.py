"""From experts to phone in minutes on a laptop: make quickstart, or python launch/quickstart.py --images=FOLDER

Two real experts teach a small proxy, the proxy teaches a real ViT-T/16, which becomes a PyTorch module and an
ExecuTorch file that the runtime on this machine executes. Ends with OUT/report.html and OUT/summary.json.
"""

import importlib.metadata
import json
import os
import platform
import shlex
import shutil
from pathlib import Path

from absl import flags
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from configs import quickstart as recipes
from eupe_jax.files import write_whole
from eupe_jax.training.loop import train
from eupe_jax.training.measure import measure_statistics
from eupe_jax.training.metrics import read_metrics
from eupe_jax.training.precompute import precompute
from launch import cli, quickstart_evaluation, quickstart_images
from launch.clock import Clock
from launch.quickstart_report import write_report
from launch.quickstart_verdict import verdict

IMAGES = flags.DEFINE_string("images", None, "folder of images (tar files in it count); default: see README")
OUT = flags.DEFINE_string("out", recipes.FOLDER, "folder for everything that is made")
BUDGET = flags.DEFINE_float("budget", 1.0, "share of the steps and images: 0.05 is a smoke test", 0.001, 10.0)
RESUME = flags.DEFINE_bool("resume", False, "go on where a stopped quickstart with the same flags left off")

VIEWS = 2  # augmented views of every image that the experts see
MADE = (
    "features", "statistics", "stage1", "stage2", "stage3", "shuffled", "student.safetensors",
    "student.safetensors.md", "student.safetensors.statistics.md", "student.safetensors.statistics.png",
    "student.pte", "student.json", "student.pte.md", "student.pte.statistics.md", "student.pte.statistics.png",
    "summary.json", "report.html", "seconds.json",
)  # fmt: skip


def scaled(mode: str, out: Path) -> ConfigDict:
    """A recipe of configs/quickstart.py with paths below `out` and its steps scaled by --budget."""
    config = recipes.get_config(mode, str(out))
    with config.unlocked():
        config.total_steps = max(4, round(config.total_steps * BUDGET.value))
        config.statistics_steps = max(2, round(config.statistics_steps * min(1.0, BUDGET.value)))
        config.optimizer.warmup_steps = config.total_steps // 10
        config.log_every = max(1, min(config.log_every, config.total_steps // 4))
    return config


def main() -> None:
    try:
        from convert import to_executorch, to_torch
    except ImportError as error:
        raise ImportError(f"{error}; the quickstart needs: pip install 'eupe_jax[quickstart]'") from error
    out = cli.require_local(OUT, "out")
    out.mkdir(parents=True, exist_ok=True)
    clock = Clock(out / "seconds.json")

    with clock.part("images"):
        limit = max(64, round(quickstart_images.MAX_TRAIN * min(1.0, BUDGET.value)))
        corpus = quickstart_images.prepare(IMAGES.value, out / "images", recipes.EXPERT_RESOLUTION, limit)
        if not RESUME.value:  # only now: bad input must not cost an earlier result
            _clear(out)
        print(f"{corpus.train_count} training images: {corpus.source}")

    configs = {mode: scaled(mode, out) for mode in recipes.STEPS}
    stage1, stage2 = configs["stage1"], configs["stage2"]
    with clock.part("experts: features of every training image"):
        precompute(stage1, out / "features", views=VIEWS)
        measure_statistics(stage1, stage1.statistics)
    with clock.part("stage 1: two experts into a proxy"):
        train(stage1, out / "stage1")
    with clock.part("statistics of the proxy"):
        measure_statistics(stage2, stage2.statistics)
    with clock.part("stage 2: the proxy into a ViT-T/16"):
        train(stage2, out / "stage2")
    with clock.part("stage 3: several resolutions"):
        train(configs["stage3"], out / "stage3")
    with clock.part("control: stage 2 on shuffled targets"):
        train(configs["shuffled"], out / "shuffled")
    with clock.part("evaluation on held-out images"):
        figures, panels = quickstart_evaluation.evaluate(out, stage1, corpus)
    with clock.part("PyTorch and ExecuTorch"):
        encoder = quickstart_evaluation.load_student(out)
        to_torch.convert(encoder, out / "student.safetensors", corpus.train)
        report = to_executorch.convert(encoder, out / "student.pte", images=corpus.train)
        print(to_executorch.summarise(report))

    curves = {mode: read_metrics(out / mode / "metrics.jsonl") for mode in recipes.STEPS}
    summary = {
        "images": _describe_images(corpus),
        **figures,
        **_describe_export(report, out / "student.pte"),
        "stages": {mode: _describe_stage(configs[mode], clock.seconds, mode) for mode in recipes.STEPS},
        "seconds": clock.seconds | {"total": round(sum(clock.seconds.values()), 1)},
        "budget": BUDGET.value,
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
        "versions": _versions(),
        "commands": _commands(out),
        "small": SMALL,
    }
    write_whole(out / "summary.json", json.dumps(summary, indent=2))
    path = write_report(out, summary, curves, panels)
    _print_verdict(summary)
    print(f"\n{summary['seconds']['total']:.0f} s in all. Open {path}")


def _clear(out: Path) -> None:
    for name in MADE:
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _describe_images(corpus: quickstart_images.Corpus) -> dict:
    heldout = {name: {"count": len(images), "what": what} for name, (images, what) in corpus.heldout.items()}
    return {"source": corpus.source, "train": corpus.train_count, "heldout": heldout}


PART_OF_STAGE = {
    "stage1": "stage 1: two experts into a proxy",
    "stage2": "stage 2: the proxy into a ViT-T/16",
    "stage3": "stage 3: several resolutions",
    "shuffled": "control: stage 2 on shuffled targets",
}


def _describe_stage(config: ConfigDict, seconds: dict[str, float], mode: str) -> dict:
    took = seconds[PART_OF_STAGE[mode]]
    return {
        "steps": config.total_steps,
        "batch_size": config.batch_size,
        "seconds": took,
        "images_per_second": round(config.total_steps * config.batch_size / took, 1),
        "learning_rate": config.optimizer.learning_rate,
        "student_resolutions": list(config.student_resolutions),
    }


def _describe_export(report: dict, path: Path) -> dict:
    worst = lambda gate: {  # noqa: E731
        "max_abs": max(f["max_abs"] for f in gate.values()),
        "cosine": min(f["cosine"] for f in gate.values()),
    }
    (method,) = report["methods"].values()
    delegation = method["delegation"]
    pairs = {pair: method["gates"][pair] for pair in ("flax_vs_torch", "torch_vs_pte")}
    return {
        "parity": {pair: worst(gate) for pair, gate in pairs.items()},
        "pte": {
            "latency_ms": method["latency"]["median_ms"],
            "threads": method["latency"]["threads"],
            "resolution": max(recipes.SCALES),
            "megabytes": round(path.stat().st_size / 1e6, 2),
            "partitions": delegation["partitions"],
            "nodes_outside": delegation["nodes_outside"],
            "share_of_flops": delegation["share_of_flops"],
        },
    }


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "flax", "torch", "executorch", "numpy")}


def _recipe(mode: str, out: Path) -> str:
    """The flags of a recipe as it was run: what --out and --budget have changed in configs/quickstart.py."""
    run, usual = (flatten_dict(c.to_dict(), sep=".") for c in (scaled(mode, out), recipes.get_config(mode)))
    changed = [f"--config.{key}={value}" for key, value in run.items() if value != usual[key]]
    return shlex.join([f"--config=configs/quickstart.py:{mode}", *changed])


def _commands(out: Path) -> list[dict[str, str]]:
    recipe = {mode: _recipe(mode, out) for mode in recipes.STEPS}
    train, statistics = "python launch/train.py", "python launch/measure_statistics.py"
    export = f"--checkpoint={out}/stage3 --images={out}/images/train"
    return [
        {"what": "expert features", "command": f"python launch/precompute.py {recipe['stage1']} --out={out}/features"},
        {"what": "expert statistics", "command": f"{statistics} {recipe['stage1']} --out={out}/statistics/experts"},
        {"what": "stage 1", "command": f"{train} {recipe['stage1']} --workdir={out}/stage1"},
        {"what": "proxy statistics", "command": f"{statistics} {recipe['stage2']} --out={out}/statistics/proxy"},
        {"what": "stage 2", "command": f"{train} {recipe['stage2']} --workdir={out}/stage2"},
        {"what": "stage 3", "command": f"{train} {recipe['stage3']} --workdir={out}/stage3"},
        {"what": "the shuffled control", "command": f"{train} {recipe['shuffled']} --workdir={out}/shuffled"},
        {"what": "to PyTorch", "command": f"python convert/to_torch.py {export} --out={out}/student.safetensors"},
        {"what": "to ExecuTorch", "command": f"python convert/to_executorch.py {export} --out={out}/student.pte"},
    ]


SMALL = [
    {"what": "experts", "here": "EfficientNet-Lite0 (4.7M parameters) and PP-OCRv4's text detector",
     "full": "PEcore-G (1.9B), PElang-G (1.7B), DINOv3-H+ (840M)"},
    {"what": "proxy", "here": "three-stage ConvNeXt, 1.4M parameters", "full": "ViT, 1.9B parameters"},
    {"what": "student", "here": "ViT-T/16, 5.5M parameters: the real one, from random weights",
     "full": "the same, or ViT-S/B, ConvNeXt-T/S/B"},
    {"what": "images", "here": "at most 2,000, 64 to 128 pixels", "full": "1.7 billion, 256 to 512 pixels"},
    {"what": "stage 2", "here": "a few hundred steps of 16 images", "full": "390,000 steps of 8,192 images"},
    {"what": "stage 3", "here": "64, 80, 96 pixels", "full": "256, 384, 512 pixels, 100,000 steps of 4,096 images"},
    {"what": "RoPE coordinates", "here": "as they are", "full": "randomly rescaled in training"},
    {"what": "LayerScale", "here": "starts at 1", "full": "starts at 1e-5 (ViT) and 1e-6 (ConvNeXt)"},
    {"what": "code", "here": "the same models, losses, step, loop, checkpoints and converters", "full": "the same"},
]  # fmt: skip


def _print_verdict(summary: dict) -> None:
    print(f"\n{verdict(summary)['sentence']}")
    for heldout, experts in summary["margins"].items():
        for expert, m in experts.items():
            print(
                f"{heldout}: {expert} patches: student {m['student']:.3f}, best control {m['best']:.3f} "
                f"({m['best_control']}), margin {m['margin']:+.3f}"
            )


if __name__ == "__main__":
    cli.run(main)
