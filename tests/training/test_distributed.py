"""Joining the processes of a run: what has to be mended ends it, what only takes longer asks for another try."""

import socket
import subprocess
import sys

import jax
import pytest

from eupe_jax.training import distributed
from eupe_jax.training.preemption import RESUME_ME, ResumeMe


def ended(program):
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    return process.returncode, process.stderr


def test_a_port_in_use_has_to_be_mended():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConnectionError, match=f"process 0 cannot listen at --coordinator=here:{port} .*in use"):
            distributed.join(f"here:{port}", 2, 0)
    distributed._check_port(f"here:{port}")
    with pytest.raises(ValueError, match="--coordinator=here:70000 must be HOST:PORT"):
        distributed.join("here:70000", 2, 0)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("DEADLINE_EXCEEDED: Barrier timed out", ResumeMe),
        ("UNAVAILABLE: failed to connect to all addresses", ResumeMe),
        ("INVALID_ARGUMENT: Unexpected task", ConnectionError),
    ],
)
def test_others_that_do_not_come_are_no_reason_to_stop_for_good(said, kind, monkeypatch):
    def fail(**_):
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(kind, match="cannot join the processes at here:1234: " + said):
        distributed.join("here:1234", 2, 1)


def test_a_process_that_waits_in_vain_asks_to_be_run_again():
    with socket.create_server(("localhost", 0)) as server:  # it never answers
        status, said = ended(f"""
from eupe_jax.training import distributed
distributed.TIMEOUT = 1
distributed.join("localhost:{server.getsockname()[1]}", 2, 1)
""")
    assert status == RESUME_ME and "did not all come within 1 s: status 75, run the same command again" in said, said


ABORTS = """
import ctypes
from eupe_jax.training import distributed
distributed.ABORTING = 1
distributed._explain_aborts()
libc = ctypes.CDLL(None)
"""


def test_an_abort_says_what_to_do():
    status, said = ended(ABORTS + "libc.abort()")
    assert status == RESUME_ME and "run the same command again on all hosts" in said, said
