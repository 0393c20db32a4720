"""Worker processes that never outlive the process that began them, however that ends."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Call it in a worker: it ends at once when its parent does, also when the parent was killed and could tell nobody.

    Otherwise a worker that waits for work would wait, and hold its memory, for ever.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()
