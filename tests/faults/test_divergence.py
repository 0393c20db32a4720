"""Two real processes hold a copy each; one bit of one of them is another: both stop, and say whose it is."""

import os
import socket
import subprocess
import sys

import pytest

from tests.launch.test_commands import ROOT

pytestmark = pytest.mark.faults

PROGRAM = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from eupe_jax.sharding.mesh import make_mesh
from eupe_jax.training import distributed
from eupe_jax.training.divergence import Diverging, ReplicaCheck

coordinator, number = sys.argv[1], int(sys.argv[2])
distributed.join(coordinator, 2, number)
mesh = make_mesh(fsdp=2)
values = np.arange(64, dtype=np.float32).reshape(8, 8)


def put(spec, flipped=None):
    # one bit is flipped in the copy of one device
    sharding, parts = NamedSharding(mesh, spec), []
    for device, index in sharding.addressable_devices_indices_map(values.shape).items():
        part = values[index].copy()
        if device == flipped:
            part.view(np.uint32)[1, 5] ^= 1
        parts.append(jax.device_put(part, device))
    return jax.make_array_from_single_device_arrays(values.shape, sharding, parts)


check, cut, whole = ReplicaCheck(mesh), PartitionSpec("fsdp"), PartitionSpec()
good = {"cut": put(cut), "whole": put(whole)}
check.check(1, good)
mine = jax.local_devices()[1] if number == 1 else None
for name, spec in (("cut", cut), ("whole", whole)):
    try:
        check.check(2, good | {name: put(spec, mine)})
    except Diverging as error:
        print(error, flush=True)
"""


def test_two_processes(record, tmp_path):
    with socket.socket() as server:
        server.bind(("localhost", 0))
        where = f"localhost:{server.getsockname()[1]}"
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, where, str(number)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=500) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], printed
    # Gloo prints as well
    said = [[line for line in out.splitlines() if line.startswith("after step")] for out, _ in printed]
    cut, whole = said[0]
    assert "after step 2 not all copies of cut are the same: suspect device(s) " in cut
    assert "of host(s) 0, 1;" in cut, "there are two of each half"
    assert "of host(s) 1;" in whole and whole.endswith("when all were alike (last after step 1)")
    assert said[0] == said[1], "both say the same"
    record("silent divergence", phase="2 processes", injected=2, detected=2, accepted=0)
