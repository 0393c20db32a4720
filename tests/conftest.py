"""Every test runs on eight forced CPU devices with full float32 matrix products."""

import atexit
import logging
import os
import shutil
import tempfile

FLAGS = {
    "xla_force_host_platform_device_count": 8,
    # The tests are small and many: compiling takes longer than running, so the compiler is told to try less hard.
    "xla_backend_optimization_level": 0,
    # Eight devices share the cores with all else that runs here. Where one of them comes 40 s late to what they do
    # together, XLA would abort the process, and with it all tests after this one.
    "xla_cpu_collective_call_terminate_timeout_seconds": 300,
}
for flag, value in FLAGS.items():
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{flag}={value}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Resumed runs, workers and the processes that tests start compile the same programs again and again. The first process
# of a session makes a folder for them, and the others have it from their environment: it is part of what they are
# found by.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="eupe_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")

import jax  # noqa: E402  (it reads the above when it is imported)
import pytest  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")

# Files of a minute or so, the longest first: begun last, one would leave the other workers without anything to do.
LONGEST = (
    "tests/training/test_loop.py",
    "tests/faults/test_quick.py",
    "tests/convert/test_to_executorch.py",
    "tests/launch/test_processes.py",
    "tests/launch/test_evaluations.py",
    "tests/test_golden.py",
    "tests/docs/test_examples.py",
    "tests/training/test_meshes.py",
    "tests/training/test_accumulation.py",
    "tests/training/test_program.py",
    "tests/training/test_family.py",
    "tests/evals/test_similarity.py",
    "tests/launch/test_pack.py",
    "tests/convert/test_fuzzed_checkpoints.py",
    "tests/models/test_encoders.py",
)


def pytest_configure(config):
    config.option.loadscopereorder = False  # xdist would begin with the files of many tests, which are short ones


def pytest_collection_modifyitems(items):
    rank = {file: number for number, file in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(LONGEST)))


@pytest.fixture(autouse=True)
def messages_reach_caplog():
    """Commands give the project's loggers a handler of their own; a test after one starts afresh."""
    for name in ("eupe_jax", "launch", "convert"):
        logging.getLogger(name).propagate = True
        logging.getLogger(name).handlers.clear()
