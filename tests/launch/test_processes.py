"""Real processes, joined by jax.distributed, train as one does; what one number of them saves, another resumes."""

import importlib.util
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import stage2_vitt
from eupe_jax.distill.normalization import STD_FLOOR, Statistics
from eupe_jax.sharding import chips
from eupe_jax.sharding.mesh import batch_sharding, make_mesh
from eupe_jax.training import checkpoints, distributed
from eupe_jax.training.loop import train
from eupe_jax.training.measure import measure_statistics
from eupe_jax.training.metrics import read_metrics
from tests.conftest import FLAGS
from tests.launch.test_commands import ROOT, assert_one_line, run

DEVICES = 8  # of all processes together
STEPS = 4
FIELDS = {
    "total_steps": STEPS,
    "checkpoint.save_every": 2,
    "mesh.fsdp": DEVICES,  # every process holds a part of each large array
    "students.vitt.overrides.embed_dim": 128,  # large enough to be cut
    "teachers.proxy.overrides.embed_dim": 128,
    # half of what there is to compile
    **{f"augment.{name}_p": 0.0 for name in ("jitter", "grayscale", "blur", "solarize")},
}


def recipe(statistics):
    """The recipe of all runs, as launch/train.py reads it."""
    config = stage2_vitt.get_config("runlocal")
    config.update_from_flattened_dict({**FIELDS, "statistics": str(statistics)})
    return config


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def launch(command, processes, *flags):
    """Runs a command in this many processes at once; what each printed on stderr."""
    here = DEVICES // processes
    joined = [f"--coordinator=localhost:{free_port()}", f"--num_processes={processes}"] if processes > 1 else []
    command = [
        sys.executable, f"launch/{command}.py", "--config=configs/stage2_vitt.py:runlocal",
        *(f"--config.{name}={value}" for name, value in FIELDS.items()), *joined, *flags,
    ]  # fmt: skip
    flags = FLAGS | {"xla_force_host_platform_device_count": here}
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(f"--{flag}={value}" for flag, value in flags.items()),
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }
    started = [
        subprocess.Popen(
            [*command, f"--process_id={i}"] if joined else command,
            cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for i in range(processes)
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=550)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, "\n\n".join(printed)
    return printed


def saved(workdir):
    """{item/path: array} of the last checkpoint."""
    step = checkpoints.step_directory(workdir)
    assert step.name == str(STEPS)
    items = {item: checkpoints.restore_item(step, f"vitt.{item}") for item in ("backbone", "adapters", "optimizer")}
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(items)}


def assert_same_run(workdir, reference):
    """Every figure of every step within 1e-5, and so the whole tree of parameters and moments by its norm."""
    lines, expected = (read_metrics(folder / "metrics.jsonl") for folder in (workdir, reference))
    assert [line["step"] for line in lines] == [line["step"] for line in expected] == list(range(1, STEPS + 1))
    differences = []
    for line, wanted in zip(lines, expected, strict=True):
        assert line.keys() == wanted.keys()
        differences += [(abs(line[k] - wanted[k]) / max(abs(wanted[k]), 1e-30), k, line["step"]) for k in line]
    assert max(differences)[0] <= 1e-5, f"largest differences: {sorted(differences)[-5:]}"
    found, wanted = saved(workdir), saved(reference)
    assert found.keys() == wanted.keys()
    far = sum(float(np.sum((np.float64(found[k]) - wanted[k]) ** 2)) for k in wanted)
    size = sum(float(np.sum(np.float64(wanted[k]) ** 2)) for k in wanted)
    print(f"{workdir.name}: figures differ by {max(differences)}, parameters and moments by {(far / size) ** 0.5:.2g}")
    assert (far / size) ** 0.5 <= 1e-5


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """(workdir, folder of statistics) of the run of one process."""
    folder = tmp_path_factory.mktemp("one")
    measure_statistics(recipe(""), folder / "statistics")
    train(recipe(folder / "statistics"), folder / "run")
    return folder / "run", folder / "statistics"


def test_two_processes_train_as_one_and_one_goes_on_from_their_checkpoint(one, tmp_path):
    reference, statistics = one
    flags = [f"--workdir={tmp_path}/two", f"--config.statistics={statistics}"]
    first, second = launch("train", 2, *flags, "--stop_at=2")
    assert "8 devices (cpu) of 2 process(es)" in first and "step" not in second, "one process speaks"
    assert len(read_metrics(tmp_path / "two" / "timings.jsonl")) == 2
    train(recipe(statistics), tmp_path / "two")
    assert_same_run(tmp_path / "two", reference)


@pytest.mark.slow
def test_two_processes_go_on_from_the_checkpoint_of_one(one, tmp_path):
    reference, statistics = one
    flags = [f"--workdir={tmp_path}/two", f"--config.statistics={statistics}"]
    launch("train", 1, *flags, "--stop_at=2")
    launch("train", 2, *flags)
    assert_same_run(tmp_path / "two", reference)


@pytest.mark.slow
def test_four_processes_train_as_one_and_trace_a_step(one, tmp_path):
    reference, statistics = one
    launch("train", 4, f"--workdir={tmp_path}/four", f"--config.statistics={statistics}", "--profile=2")
    assert_same_run(tmp_path / "four", reference)
    assert len(list((tmp_path / "four").glob("profile/plugins/profile/steps_2_2/*.xplane.pb"))) == 4


@pytest.mark.slow
def test_four_processes_measure_the_statistics_of_one(one, tmp_path):
    _, statistics = one
    launch("measure_statistics", 4, f"--out={tmp_path}")
    found, wanted = (Statistics.load(folder / "proxy.safetensors") for folder in (tmp_path, statistics))
    for kind, mean in wanted.mean.items():
        np.testing.assert_allclose(found.mean[kind], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.std[kind], wanted.std[kind], rtol=1e-5, atol=1e-3 * STD_FLOOR)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (("host:1", None, None), "--coordinator without --num_processes, --process_id: give all three"),
        ((None, 2, 1), "--num_processes, --process_id without --coordinator"),
        (("host", 2, 1), "--coordinator=host must be HOST:PORT"),
        (("host:1", 2, 2), "--process_id=2 must be less than --num_processes=2"),
    ],
)
def test_flags_that_do_not_fit_together(told, message):
    with pytest.raises(ValueError, match=message):
        distributed.check_arguments(dict(zip(("--coordinator", "--num_processes", "--process_id"), told, strict=True)))


def test_no_cluster_ends_in_one_line(tmp_path):
    flags = ["--config=configs/stage2_vitt.py:runlocal", f"--workdir={tmp_path}/run", "--distributed"]
    assert_one_line(run("launch/train.py", *flags), "--distributed finds no cluster here", "--coordinator=HOST:PORT")
    assert not (tmp_path / "run").exists()


def test_positions_of_this_process_are_all_where_it_is_alone():
    sharding = batch_sharding(make_mesh(fsdp=2))
    np.testing.assert_array_equal(distributed.local_positions(sharding, 16), np.arange(16))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra: tpu)")
@pytest.mark.parametrize(("fsdp", "tensor"), [(16, 1), (16, 2)])
def test_hosts_of_a_torus_share_a_batch_out(fsdp, tensor):
    """Devices of one host are no neighbours in the batch; together the hosts make each image once."""
    devices = chips.topology("v5e:16x16")
    sharding = batch_sharding(make_mesh(fsdp, tensor, devices=devices))
    hosts = sorted({device.process_index for device in devices})
    parts = [distributed.local_positions(sharding, 4096, host) for host in hosts]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(4096))
    assert not np.array_equal(np.concatenate(parts), np.arange(4096)), "or positions would not be needed"
