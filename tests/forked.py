"""Our commands as processes of their own, without the seconds in which each of them imports the same libraries.

A server process has imported these; for every command it forks, and the fork becomes the command: with its own
arguments, environment, streams and exit status, and JAX not yet asked for devices. Environment variables that are read
while a library is imported (JAX_*) are those of the server: a test that sets one starts a Python of its own.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

# What the commands share; they define their flags themselves. Nothing here starts a thread or asks for devices.
IMPORTED = [
    "configs.common",
    "convert.to_executorch",  # the quickstart's; left out where its libraries are not installed
    "eupe_jax.evals.encoders",
    "eupe_jax.evals.report",
    "eupe_jax.training.loop",
    "eupe_jax.training.measure",
    "eupe_jax.training.precompute",
    "launch.training_evals",
    "tests.forked",
]


def run(words: Sequence[str], folder: Path, environment: dict[str, str], timeout: float) -> subprocess.CompletedProcess:
    """What `python WORDS` does in `folder`, as `subprocess.run` with captured text says it.

    words: a script, relative to `folder`, and its arguments.

    Raises:
      subprocess.TimeoutExpired: it was still running after `timeout` seconds, and was killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with tempfile.TemporaryDirectory() as printed:
        files = [Path(printed) / name for name in ("stdout", "stderr")]
        process = context.Process(target=_become, args=(list(words), folder, environment, files))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(words, timeout, *(file.read_bytes() for file in files))
        return subprocess.CompletedProcess(words, process.exitcode, *(file.read_text() for file in files))


def _become(words: list[str], folder: Path, environment: dict[str, str], files: list[Path]) -> None:
    for stream, file in enumerate(files, 1):
        opened = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, stream)
        os.close(opened)
    multiprocessing.process._parent_process = None  # workers of ours end with theirs; a command has none
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = words
    paths = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[0:0] = [str((folder / words[0]).parent), *filter(None, paths)]
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()  # a fork ends without them
