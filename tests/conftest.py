"""Every test runs on eight forced CPU devices with full float32 matrix products."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax  # noqa: E402  (the flags above are read when jax is imported)

jax.config.update("jax_default_matmul_precision", "highest")
