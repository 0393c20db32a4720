"""Several processes of one run: joining them, and which part of a batch each of them makes."""

import ctypes
import errno
import faulthandler
import fcntl
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.errors import JaxRuntimeError
from jax.sharding import Sharding

from eupe_jax.training.preemption import RESUME_ME, ResumeMe

TIMEOUT = 300  # seconds to wait for the others at the start
LEAVING = 60  # seconds that a process which ends with an error waits for the others, which do not know
LOST_AFTER = 60  # seconds without a sign of life after which a process counts as lost, and the others end
ABORTING = 10  # seconds that an abort has to say what to do; then the kernel ends the process

_ABORTED = (
    b"error: JAX ended this process (above: why). Where that is another process which died or is out of reach, run the "
    b"same command again on all hosts: the run goes on from its last checkpoint\n"
)


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    lost_after: int = LOST_AFTER,
) -> None:
    """Joins the processes of a run with `jax.distributed`, before anything asks JAX for devices.

    Without arguments JAX finds them by itself: on TPU pods and several slices of them, on GKE, under Slurm and Open
    MPI. With other launchers every process is told all three: `coordinator` ("HOST:PORT" of process 0), how many there
    are, and its own number. Processes that do not come together within TIMEOUT seconds end with the status
    `preemption.RESUME_ME` and say so (JAX itself would abort them): a machine that is given back may take longer. When
    one is lost later, JAX ends the others some seconds after `lost_after`; they say what to do, and have that status.

    Raises:
      ValueError: arguments that do not fit together, or none where nothing can be found.
      ConnectionError: this process cannot take part: the coordinator's port is in use, or others refuse it.
      ResumeMe: the others did not come, or went away again.
    """
    told = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    check_arguments(told)
    if process_id == 0:
        _check_port(coordinator)
    where = f"at {coordinator}" if coordinator else "of this cluster"
    alarm = threading.Timer(TIMEOUT, _give_up, [where])
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=num_processes,
            process_id=process_id,
            initialization_timeout=TIMEOUT + 60,
            heartbeat_timeout_seconds=lost_after,
            shutdown_timeout_seconds=LEAVING,
        )
    except ValueError as error:  # "coordinator_address should be defined", and the like
        raise ValueError(
            f"--distributed finds no cluster here ({_first_line(error)}), as it does on TPU pods, GKE, Slurm and Open "
            "MPI: give --coordinator=HOST:PORT --num_processes=N --process_id=I"
        ) from error
    except JaxRuntimeError as error:
        said = f"cannot join the processes {where}: {_first_line(error)}"
        if str(error).startswith("INVALID_ARGUMENT"):
            raise ConnectionError(said) from error
        raise ResumeMe(said) from error
    finally:
        alarm.cancel()
    _explain_aborts()


def check_arguments(told: Mapping[str, str | int | None]) -> None:
    """Raises ValueError unless all or none of the three flags are given, and they make sense together."""
    given = [flag for flag, value in told.items() if value is not None]
    missing = [flag for flag, value in told.items() if value is None]
    if not given:
        return
    if missing:
        raise ValueError(f"{', '.join(given)} without {', '.join(missing)}: give all three, or --distributed alone")
    coordinator, count, number = told.values()
    if not re.fullmatch(r".+:\d{1,5}", coordinator) or int(coordinator.rpartition(":")[2]) > 65535:
        raise ValueError(f"--coordinator={coordinator} must be HOST:PORT, of the machine that process 0 runs on")
    if not 0 <= number < count:
        raise ValueError(f"--process_id={number} must be less than --num_processes={count}: they are numbered from 0")


def _check_port(coordinator: str) -> None:
    """Raises ConnectionError where process 0 cannot listen at the coordinator's port: JAX would crash."""
    try:
        with socket.socket(socket.AF_INET6) as server:  # as JAX does
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was closed just now is free
            server.bind(("::", int(coordinator.rpartition(":")[2])))
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):  # others: no IPv6 here, and no answer
            raise ConnectionError(
                f"process 0 cannot listen at --coordinator={coordinator} ({error.strerror}): choose another port, or "
                "end what has it"
            ) from error


def _give_up(where: str) -> None:
    print(
        f"error: the processes {where} did not all come within {TIMEOUT} s: status {RESUME_ME}, run the same command "
        "again on all hosts, and see that the coordinator can be reached from all machines",
        file=sys.stderr,
        flush=True,
    )
    os._exit(RESUME_ME)  # the call that waits cannot be interrupted


def _explain_aborts() -> None:
    """JAX aborts the process, from a thread of its own, when another one is lost: it ends with a line that says what
    to do, and the status that asks for it. A handler of Python's own would come too late, so C calls this one. Faults
    of compiled code abort as well; from here they look the same."""
    global _on_abort
    if _on_abort is None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        _on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(_aborted)  # kept: C holds no reference
        libc = ctypes.CDLL(None)
        libc.signal(signal.SIGABRT, _on_abort)
        _bound_aborts(libc)


def _bound_aborts(libc: ctypes.CDLL) -> None:
    """Has an abort end the process also where a thread that stays in compiled code keeps Python, which `_aborted` then
    waits for. All of it is C and the kernel: faulthandler comes first and writes what it finds into a pipe, which sends
    SIGUSR2, which sets an alarm in as many seconds as it has for a number (12)."""
    if sys.platform != "linux" or faulthandler.is_enabled():  # it has been asked to write where a person reads
        return
    reading, writing = os.pipe()  # open to the end; what does not go into it is dropped
    os.set_blocking(writing, False)
    libc.signal(signal.SIGUSR2, libc.alarm)
    fcntl.fcntl(reading, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(reading, fcntl.F_SETSIG, signal.SIGUSR2)
    fcntl.fcntl(reading, fcntl.F_SETFL, os.O_ASYNC)
    faulthandler.enable(writing, all_threads=False)


_on_abort: Callable | None = None


def _aborted(_signal: int) -> None:
    signal.alarm(ABORTING)  # memory may be damaged, and locked
    os.write(2, _ABORTED)
    os._exit(RESUME_ME)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def is_main() -> bool:
    """Whether this process is the one that writes files and draws bars. (Orbax writes checkpoints from all.)"""
    return jax.process_index() == 0


def local_positions(sharding: Sharding, batch_size: int, process_index: int | None = None) -> np.ndarray:
    """Positions in the global batch (int64 [b], ascending) that the devices of a process take.

    On a torus the devices of one host are in general no neighbours in the mesh: it takes several runs of positions.
    Hosts whose devices hold the same part (cut by the tensor axis) make the same images.

    Raises:
      ValueError: the batch does not divide over the mesh.
    """
    process = jax.process_index() if process_index is None else process_index
    slices = [
        index[0]
        for device, index in sharding.devices_indices_map((batch_size,)).items()
        if device.process_index == process
    ]
    return np.unique(np.concatenate([np.arange(batch_size)[part] for part in slices]))
