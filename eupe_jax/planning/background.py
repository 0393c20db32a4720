"""Long work in a process of its own: it can be interrupted, crash or run out of memory without taking others along."""

import contextlib
import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

EXPECTED = (ValueError, OSError, ImportError)
NOTE_EVERY = 60.0  # seconds between lines where nobody watches
LEAVE_WITHIN = 30.0  # seconds that a process has to end after its answer


class ChildFailed(OSError):
    """The process died, or raised what nobody expects: then its traceback is the error's note."""


def run(function: Callable[..., Any], *args: Any, title: str) -> Any:
    """`function(*args)` (both picklable) in a new process, with the time it takes so far on stderr.

    Raises:
      ValueError, OSError, ImportError: as the function did, with its message.
      ChildFailed: anything else went wrong.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(sender, function, args), daemon=True)
    child.start()
    sender.close()
    try:
        with _clock(title) as tick:
            while not receiver.poll(0.5):
                tick()
        kind, value = receiver.recv()
    except EOFError:
        child.join()
        raise ChildFailed(f"{title}: the process ended with status {child.exitcode} and said nothing") from None
    else:
        child.join(LEAVE_WITHIN)
    finally:
        if child.is_alive():
            child.kill()  # what it writes, it writes under temporary names
        child.join()
        receiver.close()
    if kind == "result":
        return value
    if kind:
        raise _BY_NAME[kind](value)
    error = ChildFailed(f"{title}: {value.strip().splitlines()[-1]}")
    error.add_note(value)
    raise error


_BY_NAME = {kind.__name__: kind for kind in EXPECTED}


def _work(sender: Any, function: Callable[..., Any], args: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and ends this process
    try:
        message = ("result", function(*args))
    except EXPECTED as error:
        message = (next(kind.__name__ for kind in EXPECTED if isinstance(error, kind)), str(error))
    except BaseException:  # noqa: BLE001 - whatever it is, the parent reports it
        message = ("", traceback.format_exc())
    sender.send(message)
    sender.close()


@contextlib.contextmanager
def _clock(title: str) -> Iterator[Callable[[], None]]:
    """Calls to what it yields keep "title: 1:23" up to date: one line on a terminal, one a minute elsewhere."""
    start, watched = time.monotonic(), sys.stderr.isatty()
    noted = start

    def line() -> str:
        seconds = int(time.monotonic() - start)
        return f"{title}: {seconds // 60}:{seconds % 60:02}"

    def tick() -> None:
        nonlocal noted
        if watched:
            print(f"\r{line()}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - noted >= NOTE_EVERY:
            noted = time.monotonic()
            print(line(), file=sys.stderr, flush=True)

    try:
        yield tick
    finally:
        print(f"\r{line()}" if watched else line(), file=sys.stderr, flush=True)
