"""Worker processes that never outlive the process that began them, however that ends."""

import faulthandler
import multiprocessing
import os
import signal
import threading


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
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    if through_notices:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()


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
