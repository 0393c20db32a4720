"""Threads that a process does not wait for when it ends, so that one that hangs cannot keep it from ending.

The interpreter joins those of concurrent.futures at its exit, whatever they wait for: anybody's teacher, a dead disk.
"""

import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait


def start(task: Callable, *arguments, name: str) -> Future:
    """Begins `task(*arguments)` in a thread of its own; what it returns or raises is the future's."""
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(task(*arguments))
        except BaseException as error:  # whatever it is, whoever waits must hear of it
            future.set_exception(error)

    threading.Thread(target=work, name=name, daemon=True).start()
    return future


def for_each(task: Callable, items: Iterable, *, threads: int, name: str) -> None:
    """Does `task(item)` for all, so many at a time. Of what tasks raise, one is raised when all threads are done."""
    left = list(items)

    def work() -> None:
        while left:
            try:
                item = left.pop()
            except IndexError:  # another thread was faster
                return
            try:
                task(item)
            except BaseException:
                left.clear()  # nobody will want the rest
                raise

    pending = [start(work, name=name) for _ in range(min(threads, len(left)))]
    wait(pending)
    for future in pending:
        future.result()


def stacks() -> str:
    """The stacks of all threads of this process, the main thread's first."""
    threads = {thread.ident: thread for thread in threading.enumerate()}
    main = threading.main_thread().ident
    parts = []
    for ident, frame in sorted(sys._current_frames().items(), key=lambda entry: entry[0] != main):
        if ident == threading.get_ident():
            continue
        name = threads[ident].name if ident in threads else str(ident)
        parts.append(f"-- {name}\n{''.join(traceback.format_stack(frame))}")
    return "".join(parts)
