"""Commands of launch/ as real processes: started, waited for, killed, and run again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from eupe_jax.training import checkpoints
from tests.data.test_loader import session_is_alive
from tests.launch.test_commands import ROOT

RECIPE = "--config=configs/stage2_vitt.py:runlocal"


class Command:
    """A command in a session of its own. What it and its workers print goes to a file: a full pipe would stop it."""

    def __init__(self, words: Sequence[str], log: Path, cache: Path, devices: int = 1, **environment: str) -> None:
        """words: such as ["launch/train.py", "--workdir=..."]. cache: folder of compiled programs."""
        held = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
        flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        held |= {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": flags,
            "JAX_DEFAULT_MATMUL_PRECISION": "highest",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.log, self.began = log, time.time()
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, words)], cwd=ROOT, env=held | environment,
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    @property
    def printed(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, happened: Callable[[], bool], seconds: float = 300) -> bool:
        """Whether it happened before the command ended.

        Raises:
          TimeoutError: neither, with what was printed.
        """
        end = time.monotonic() + seconds
        while not happened():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"nothing happened within {seconds} s: {self.printed[-3000:]}")
            time.sleep(0.002)
        return True

    def kill(self) -> bool:
        """kill -9; whether it was that which ended the command. Its workers are gone when this returns."""
        self.process.kill()
        status = self.process.wait()
        end = time.monotonic() + 30
        while session_is_alive(self.process.pid):
            assert time.monotonic() < end, "a worker outlived the command that started it"
            time.sleep(0.02)
        return status == -signal.SIGKILL

    def end(self, seconds: float = 550) -> int:
        """The exit status, once it has ended by itself.

        Raises:
          TimeoutError: it did not, with what was printed.
        """
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(f"did not end within {seconds} s: {self.printed[-3000:]}") from None

    def succeed(self, seconds: float = 550) -> str:
        """What was printed, once it has ended well."""
        status = self.end(seconds)
        assert status == 0, f"status {status}: {self.printed[-3000:]}"
        return self.printed


def finished_steps(workdir: Path) -> list[int]:
    """Steps of the checkpoints that are whole, in order."""
    return sorted(int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit())


def has_logged(command: Command, workdir: Path, past: int) -> bool:
    """Whether this very command has logged a step past that one: lines of one before it do not count."""
    path = workdir / "metrics.jsonl"
    return path.exists() and path.stat().st_mtime > command.began and logged_step(workdir) > past


def logged_step(workdir: Path) -> int:
    """Step of the last whole line of metrics; 0 where there is none."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def arrays_of(workdir: Path) -> dict[str, np.ndarray]:
    """{item/path: array} of the newest checkpoint, all that is in it: backbones, adapters, optimizers, statistics."""
    step = checkpoints.step_directory(workdir)
    items = sorted(path.name for path in step.iterdir() if path.is_dir() and path.name != checkpoints.MANIFEST)
    trees = {item: checkpoints.restore_item(step, item) for item in items}  # on whatever devices it was written
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(trees)}


def assert_same_run(workdir: Path, reference: Path) -> None:
    """Bit for bit: every array of the last checkpoint, and every line of metrics."""
    assert (workdir / "metrics.jsonl").read_text() == (reference / "metrics.jsonl").read_text()
    assert finished_steps(workdir)[-1] == finished_steps(reference)[-1]
    found, expected = arrays_of(workdir), arrays_of(reference)
    assert found.keys() == expected.keys() and any("optimizer" in name for name in expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=f"{workdir.name}: {name}")
