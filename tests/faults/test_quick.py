"""What of the fault suite is quick enough for the ordinary tests: one run that meets several faults."""

import random
import signal

from eupe_jax.training.preemption import RESUME_ME
from tests.faults.commands import RECIPE, Command, assert_same_run, finished_steps, has_logged, logged_step
from tests.faults.test_kills import Seen

STEPS = 40
FIELDS = {
    "total_steps": STEPS,
    "checkpoint.save_every": 4,
    # half of what there is to compile
    **{f"augment.{name}_p": 0.0 for name in ("jitter", "grayscale", "blur", "solarize")},
}


def test_killed_terminated_and_damaged_it_ends_as_the_run_left_alone(tmp_path, cache, record):
    def start(workdir, *flags):
        fields = (f"--config.{name}={value}" for name, value in FIELDS.items())
        words = ["launch/train.py", RECIPE, f"--workdir={workdir}", *fields, *flags]
        return Command(words, tmp_path / f"{workdir.name}.log", cache)

    def start_and_wait_for(condition):
        before = Seen(run)
        started = start(run)
        assert started.wait_for(lambda: condition(started, before)), started.printed[-3000:]
        return started, before

    whole, run = tmp_path / "whole", tmp_path / "run"
    start(whole).succeed()

    # kill -9, some steps after a save
    started, _ = start_and_wait_for(lambda started, before: finished_steps(run) and logged_step(run) % 4 == 2)
    assert started.kill()
    assert finished_steps(run)

    # kill -9 while a save is under way; one that has just ended is none
    hit, killed = "", 0
    while hit != "save":
        started, before = start_and_wait_for(lambda started, before: Seen(run).phase(before) == "save")
        assert started.kill() and (killed := killed + 1) < 5
        after = Seen(run)
        assert before.newest <= after.newest < STEPS
        hit = after.phase(before)

    # the machine is taken away
    started, _ = start_and_wait_for(lambda started, before: has_logged(started, run, past=before.newest + 1))
    started.process.send_signal(signal.SIGTERM)
    assert started.end(60) == RESUME_ME, started.printed[-3000:]
    assert "run the same command again" in started.printed
    last = finished_steps(run)[-1]
    assert last == logged_step(run) < STEPS, "saved at the step that it left at"

    # a bit turns in the newest checkpoint
    files = sorted((run / f"checkpoints/{last}/vitt.optimizer").rglob("d/*"))
    victim = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[random.Random(0).randrange(len(content))] ^= 1
    victim.write_bytes(content)
    stopped = start(run)
    assert stopped.end() == 2
    (line,) = [line for line in stopped.printed.splitlines() if line.startswith("error:")]
    assert victim.name in line and "--on_corrupt=fallback" in line and finished_steps(run)[-1] == last
    start(run, "--on_corrupt=fallback").succeed()

    assert (run / f"damaged/{last}").is_dir()
    assert_same_run(run, whole)
    record("kill -9", phase="training", injected=killed, recovered=killed, lost=0)  # those that missed the save as well
    record("kill -9", phase="save", injected=1, recovered=1, lost=0)
    record("SIGTERM", phase="training", injected=1, recovered=1, lost=0)
    record("corrupted checkpoint", injected=1, detected=1, accepted=0)
