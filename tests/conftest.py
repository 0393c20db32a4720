"""Every test runs on eight forced CPU devices with full float32 matrix products."""

import logging
import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests are small and many: compiling takes longer than running, so the compiler is told to try less hard.
for flag, value in (("xla_force_host_platform_device_count", 8), ("xla_backend_optimization_level", 0)):
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{flag}={value}"

import jax  # noqa: E402  (the flags above are read when jax is imported)
import pytest  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
# Resumed runs and repeated fixtures compile the same programs again and again.
jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp(prefix="eupe_jax_tests_"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(autouse=True)
def messages_reach_caplog():
    """Commands give the project's loggers a handler of their own; a test after one starts afresh."""
    for name in ("eupe_jax", "launch", "convert"):
        logging.getLogger(name).propagate = True
        logging.getLogger(name).handlers.clear()
