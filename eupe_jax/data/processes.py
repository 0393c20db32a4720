"""Worker processes that never outlive the process that began them, however that ends."""

import multiprocessing
import os
import signal
import sys
import threading

from eupe_jax.data.threads import stacks


def end_with_parent(*, through_notices: bool = False) -> None:
    """Call it in a worker: it ends at once when its parent does, also when the parent was killed and could tell nobody.

    Otherwise a worker that waits for work would wait, and hold its memory, for ever. On SIGUSR1 it prints the stacks of
    its threads, as a stalled run asks it to.

    through_notices: SIGTERM does not end it. A notice goes to all processes of a job, and whoever began the worker
    needs it until all is saved, however long that may take. Whoever does so ends it by another signal.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    _print_stacks_when_asked()
    if through_notices:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()


def _print_stacks_when_asked() -> None:
    """On SIGUSR1, also while the main thread waits inside a library: a thread of its own prints them.

    Under the interpreter's lock, so a library that holds it keeps them from being printed; faulthandler does without
    the lock, but walks frames that change meanwhile, and has crashed workers that were well.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.signal(signal.SIGUSR1, lambda *_: None)  # without a handler nothing is written to the pipe
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def listen() -> None:
        while True:
            if signal.SIGUSR1 in os.read(read, 64):
                print(stacks(), file=sys.stderr, flush=True)

    threading.Thread(target=listen, name="print_stacks", daemon=True).start()


_HINTS = {
    signal.SIGKILL: "if nobody did, memory has run out, and the kernel's log says so",
    signal.SIGBUS: "shared memory (/dev/shm) may be full",
    signal.SIGSEGV: "a library crashed, perhaps on a damaged file",
}


def how_it_ended(code: int) -> str:
    """The exit status of a process, as `multiprocessing` gives it, in words."""
    if code >= 0:
        return f"ended with exit status {code}"
    try:
        number = signal.Signals(-code)
    except ValueError:
        return f"was killed by signal {-code}"
    return f"was killed by {number.name}" + (f": {_HINTS[number]}" if number in _HINTS else "")
