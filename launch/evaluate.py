"""Evaluates any encoder: python launch/evaluate.py --checkpoint=DIR --eval=knn --data=DIR --out=DIR

--checkpoint takes a training workdir or step, a converted teacher, a .safetensors / .pt file (with --model=NAME),
an exported NAME.pte, random:NAME (an untrained encoder) or host:package.module:Class (a teacher on the host).
--set=FIELD=VALUE changes a setting (repeat it for more); --list shows all evaluations and their settings. The same
command resumes what was stopped, and does nothing more where the result is complete.
"""

import dataclasses
import time

import jax
from absl import flags

from eupe_jax.evals import registry, report
from eupe_jax.training.checkpoints import versions
from launch import cli
from launch.load_any import load_any, with_teachers

CHECKPOINT = flags.DEFINE_multi_string("checkpoint", None, "what to evaluate (pca takes several)")
EVAL = flags.DEFINE_string("eval", None, f"one of {', '.join(registry.NAMES)}")
DATA = flags.DEFINE_string("data", None, "folder of the data set")
OUT = flags.DEFINE_string("out", None, "folder for metrics.json, tables, pictures and what a stopped run left")
STUDENT = flags.DEFINE_string("student", None, "which student, where a checkpoint holds several")
MODEL = flags.DEFINE_string("model", None, "zoo name, for a weights file that does not say which model it is")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "compute type of Flax encoders")
TEACHER = flags.DEFINE_multi_string("teacher", [], "NAME=CHECKPOINT of an expert, for similarity and zero_shot")
SET = flags.DEFINE_multi_string("set", [], "FIELD=VALUE of the evaluation's settings")
LIST = flags.DEFINE_bool("list", False, "print every evaluation with its settings and stop")


def main() -> None:
    if LIST.value:
        print("\n\n".join(registry.describe(name) for name in registry.NAMES))
        return
    name, out = cli.require(EVAL, "eval"), cli.require_local(OUT, "out")
    folder = cli.require_local(DATA, "data")
    sources = cli.require(CHECKPOINT, "checkpoint")
    module = registry.evaluation(name)
    settings = registry.settings(name, dict(_pair("set", text) for text in SET.value))
    if not folder.exists():
        raise FileNotFoundError(f"--data {folder}: no such folder")
    if len(sources) > 1 and name != "pca":
        raise ValueError(f"{name} takes one --checkpoint, got {len(sources)}")
    encoders = [load_any(source, STUDENT.value, MODEL.value, DTYPE.value) for source in sources]
    header = {
        "eval": name,
        "encoder": ", ".join(encoder.name for encoder in encoders),
        "checkpoint": ", ".join(sources),
        "fingerprint": ", ".join(encoder.fingerprint for encoder in encoders),
        "data": str(folder.resolve()),
        "settings": dataclasses.asdict(settings),
        "teachers": dict(_pair("teacher", text) for text in TEACHER.value),
    }
    found = report.read(out)
    if found is not None:
        if not report.same(found, header):
            raise ValueError(f"--out {out} holds the result of another evaluation: choose another folder")
        print(f"{out} is complete already:")
        _show(found["metrics"])
        return
    data = module.load(folder, settings)
    if header["teachers"]:
        data = with_teachers(data, header["teachers"], DTYPE.value)
    start = time.perf_counter()
    result = module.run(encoders if name == "pca" else encoders[0], data, settings, workdir=out / "work")
    header |= {
        "seconds": round(time.perf_counter() - start, 1),
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "versions": versions(),
    }
    report.write(out, result, header)
    _show(result.metrics)
    print(f"wrote {out}")


def _pair(flag: str, text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"--{flag} {text!r}: expected NAME=VALUE")
    return key, value


def _show(metrics: dict[str, float]) -> None:
    width = max(map(len, metrics), default=0)
    for name, value in metrics.items():
        print(f"  {name:<{width}}  {value:.4f}")


if __name__ == "__main__":
    cli.run(main)
