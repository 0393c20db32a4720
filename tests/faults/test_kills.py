"""kill -9 at random moments of every command that runs for long: run again, it ends as if it had never been killed.

EUPE_KILL_SEED chooses other moments.
"""

import contextlib
import json
import os
import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from eupe_jax.training.checkpoints import Checkpoints
from eupe_jax.training.loop import train
from eupe_jax.training.measure import measure_statistics
from tests.evals.image_sets import write_shards
from tests.faults.commands import RECIPE, Command, assert_same_run, finished_steps, has_logged, logged_step
from tests.training.conftest import tiny_config

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]

STEPS, LOG_EVERY, SAVE_EVERY, EVALUATE_EVERY = 96, 3, 4, 12  # most saves fall between two lines of metrics
TRAINING_KILLS = {"start": 3, "training": 5, "save": 10, "evaluation": 7}
STATISTICS_KILLS, PACK_KILLS, PRECOMPUTE_KILLS = 6, 8, 5
RESULT = "evals/neighbours/vitt/{step}/metrics.json"

WITH_EVALUATION = """
from configs import common, stage2_vitt


def get_config():
    config = stage2_vitt.get_config("runlocal")
    settings = dict(resize=32, crop=32, ks=(3,), reported_k=3, batch_size=6)
    with config.unlocked():
        config.evals.neighbours = common.evaluation("knn", {data!r}, {every}, **settings)
    config.total_steps, config.log_every, config.checkpoint.save_every = {steps}, {log_every}, {save_every}
    return config
"""


@pytest.fixture(scope="module")
def moments():
    seed = int(os.environ.get("EUPE_KILL_SEED", 0))
    print("EUPE_KILL_SEED", seed)
    return random.Random(seed)


@dataclass
class Seen:
    """What lies in a run's folder: how far it has come, by what a kill cannot take back."""

    workdir: Path
    written: float = field(init=False)  # when metrics were, last
    newest: int = field(init=False)
    saving: set = field(init=False)

    def __post_init__(self):
        metrics = self.workdir / "metrics.jsonl"
        self.written = metrics.stat().st_mtime if metrics.exists() else 0.0
        self.newest = max(finished_steps(self.workdir), default=0)
        self.saving = set()
        for path in self.workdir.glob("checkpoints/*.orbax-checkpoint-tmp*"):
            with contextlib.suppress(FileNotFoundError):  # it has just been finished
                self.saving.add((path.name, path.stat().st_ino))

    @property
    def evaluating(self) -> bool:
        due = self.newest and self.newest % EVALUATE_EVERY == 0
        return due and not (self.workdir / RESULT.format(step=self.newest)).exists()

    def phase(self, before: "Seen") -> str:
        """What a run was doing that began at `before`."""
        if self.saving - before.saving:
            return "save"
        if self.evaluating and self.newest > before.newest:
            return "evaluation"
        return "training" if self.written > before.written else "start"


class Training:
    """launch/train.py with one recipe, in one folder after another."""

    def __init__(self, folder: Path, cache: Path, moments: random.Random) -> None:
        self.folder, self.cache, self.moments = folder, cache, moments
        self.recipe = folder / "recipe.py"
        data = str(write_shards(folder / "set", train=120, test=60))
        steps = {"steps": STEPS, "log_every": LOG_EVERY, "save_every": SAVE_EVERY, "every": EVALUATE_EVERY}
        self.recipe.write_text(WITH_EVALUATION.format(data=data, **steps))

    def start(self, workdir: Path) -> Command:
        words = ["launch/train.py", f"--config={self.recipe}", f"--workdir={workdir}"]
        words.append(f"--config.data.workers={int(self.moments.random() < 0.3)}")  # what is trained is the same
        return Command(words, self.folder / f"{workdir.name}.log", self.cache)

    def kill(self, workdir: Path, phase: str) -> str:
        """Aims a kill at a phase; the one it has hit, "" where the run was over before."""
        before = Seen(workdir)
        run = self.start(workdir)
        if phase == "start":
            time.sleep(self.moments.uniform(0, 6))
        else:  # first some steps, so that the run comes further from kill to kill
            run.wait_for(lambda: has_logged(run, workdir, past=before.newest))
            time.sleep(self.moments.uniform(0, 0.4) if phase == "training" else 0)  # later it saves or evaluates
        if phase in ("save", "evaluation"):
            run.wait_for(lambda: Seen(workdir).phase(before) == phase)
            time.sleep(self.moments.uniform(0, 0.1 if phase == "save" else 0.5))
        if not run.kill():
            assert run.process.returncode == 0, run.printed[-3000:]
            return ""
        after = Seen(workdir)
        assert after.newest >= before.newest, "a finished checkpoint was lost"
        return after.phase(before)


def test_training(tmp_path, cache, moments, record):
    """In the start, in steps, in saves and in evaluations, of one run after the other."""
    training = Training(tmp_path, cache, moments)
    whole, runs, hit = tmp_path / "whole", [tmp_path / "run0"], Counter()
    training.start(whole).succeed()
    lines = (whole / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == STEPS // LOG_EVERY + STEPS // EVALUATE_EVERY
    while missing := [phase for phase, wanted in TRAINING_KILLS.items() if hit[phase] < wanted]:
        assert hit.total() < 4 * sum(TRAINING_KILLS.values()), f"kills that were aimed do not hit: {hit}"
        phase = training.kill(runs[-1], moments.choice(missing))
        hit[phase] += 1
        print(f"{runs[-1].name} is logged up to {logged_step(runs[-1])}; hit: {dict(hit)}", flush=True)
        if not phase or Seen(runs[-1]).newest == STEPS:  # it is done, or has nothing to save any more: begin another
            runs.append(tmp_path / f"run{len(runs)}")
    for run in runs:
        training.start(run).succeed()
        assert_same_run(run, whole)
        for step in range(EVALUATE_EVERY, STEPS + 1, EVALUATE_EVERY):
            found, expected = (json.loads((f / RESULT.format(step=step)).read_text()) for f in (run, whole))
            assert (found["metrics"], found["fingerprint"]) == (expected["metrics"], expected["fingerprint"])
    print(f"{len(runs)} runs; hit: {dict(hit)}")
    for phase in TRAINING_KILLS:
        record("kill -9", phase=phase, injected=hit[phase], recovered=hit[phase], lost=0)


def test_a_kill_right_after_a_save_loses_no_line(tmp_path, monkeypatch):
    """The step that is saved has been logged: its metrics are not in the checkpoint."""
    config = tiny_config(steps=4)
    config.statistics = str(tmp_path / "statistics")
    measure_statistics(config, config.statistics)
    train(config, tmp_path / "whole")
    save = Checkpoints.save

    def killed(self, step, *args, **kwargs):
        save(self, step, *args, **kwargs)
        self.wait()
        if step == 2:
            raise RuntimeError("killed")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(Checkpoints, "save", killed)
        train(config, tmp_path / "run")
    assert finished_steps(tmp_path / "run") == [2]
    train(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_compiled_programs_cut_short(tmp_path, cache, moments, record):
    """What a kill leaves where programs are kept is compiled again, and gives the same run."""
    training = Training(tmp_path, cache, moments)
    training.start(tmp_path / "whole").succeed()
    training.cache = tmp_path / "cache"
    shutil.copytree(cache, training.cache)
    programs = sorted(training.cache.glob("*-cache"))
    for path in programs:
        path.write_bytes(path.read_bytes()[: moments.randrange(path.stat().st_size)])
    training.start(tmp_path / "run").succeed()
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    record("compiled program cut short", injected=len(programs), recovered=len(programs), lost=0)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and not p.name.endswith(".partial")}


def test_statistics(tmp_path, cache, moments, record):
    """Nothing is written before all is measured; measured again, they are the same."""

    def start(out):
        words = ["launch/measure_statistics.py", RECIPE, f"--out={out}", "--config.statistics_steps=60"]
        return Command(words, tmp_path / "log", cache)

    began = time.time()
    start(tmp_path / "whole").succeed()
    seconds, kills, again = time.time() - began, 0, 0
    expected = contents(tmp_path / "whole")
    assert set(expected) == {"proxy.safetensors", "README.md", "statistics.png"}
    while kills < STATISTICS_KILLS:
        out = tmp_path / f"out{again}"
        run = start(out)
        if kills % 3:
            run.wait_for(lambda run=run: "statistics:  " in run.printed)  # the bar: batches are under way
            time.sleep(moments.uniform(0, 1))
        else:
            time.sleep(moments.uniform(0, seconds))
        kills += run.kill()
        found = contents(out) if out.exists() else {}
        assert found.items() <= expected.items(), "half-written statistics"
        again += bool(found)
    for out in tmp_path.glob("out*"):
        start(out).succeed()
        assert contents(out) == expected
    record("kill -9", phase="statistics", injected=kills, recovered=kills, lost=0)


def killed_at_work(start, out: Path, whole: Path, kills: int, moments: random.Random) -> None:
    """Kills a command that makes shards in `out` so often at random moments, and lets it end: the same bytes.

    It goes on where it was killed; done before it is killed often enough, it begins again.
    """

    def shards():
        return len(list(out.glob("*.array_record")))

    killed = 0
    while killed < kills:
        run, done = start(out), shards()
        run.wait_for(lambda done=done: shards() > done)  # it starts with imports
        time.sleep(moments.uniform(0, 0.2))
        killed += run.kill()
        if (out / "manifest.json").exists():
            start(out).succeed()
            assert contents(out) == contents(whole)
            shutil.rmtree(out)
    start(out).succeed()
    assert contents(out) == contents(whole)
    assert not [path for path in out.iterdir() if path.is_dir()], "what it worked with is left"


def test_pack(tmp_path, cache, moments, record):
    def start(out):
        # 300 pictures of 256 x 256 that have to be encoded, in 30 shards: seconds of work with something to lose
        source = ["--source=synthetic", "--option=size=256", "--option=count=300", "--shards=30", "--max_side=200"]
        words = ["launch/pack.py", *source, f"--out={out}", f"--workers={moments.choice((1, 2))}"]
        return Command(words, tmp_path / "log", cache)

    start(tmp_path / "whole").succeed()
    killed_at_work(start, tmp_path / "out", tmp_path / "whole", PACK_KILLS, moments)
    record("kill -9", phase="pack", injected=PACK_KILLS, recovered=PACK_KILLS, lost=0)


def test_precompute(tmp_path, cache, moments, record):
    def start(out, *flags):
        words = ["launch/precompute.py", RECIPE, f"--out={out}", "--views=6", "--shards=12", "--precision=int8"]
        return Command([*words, *flags], tmp_path / "log", cache)

    start(tmp_path / "whole", "--verify").succeed()
    out = tmp_path / "out"
    killed_at_work(start, out, tmp_path / "whole", PRECOMPUTE_KILLS, moments)
    record("kill -9", phase="precompute", injected=PRECOMPUTE_KILLS, recovered=PRECOMPUTE_KILLS, lost=0)

    shard = min(out.glob("*.array_record"))  # damage, too, is undone by the same command
    whole = shard.read_bytes()
    shard.write_bytes(whole[:70_000] + bytes([whole[70_000] ^ 1]) + whole[70_001:])
    start(out, "--verify").succeed()
    assert contents(out) == contents(tmp_path / "whole")
    record("damaged shard of features", phase="precompute --verify", injected=1, recovered=1, accepted=0)
