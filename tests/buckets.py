"""An emulator of Google Cloud Storage for tests."""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator


@contextlib.contextmanager
def running_emulator() -> Iterator[str]:
    """Address of a running one; it holds the empty bucket "data", in memory."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # As it comes it answers one connection at a time, and gcsfs keeps several open.
    code = (
        "import http.server as h; h.HTTPServer = h.ThreadingHTTPServer; "
        "from gcp_storage_emulator.__main__ import main; main()"
    )
    arguments = ["start", "--host=127.0.0.1", f"--port={port}", "--in-memory", "--default-bucket=data"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(300):
            try:
                socket.create_connection(("127.0.0.1", port), 0.2).close()
                break
            except OSError:
                assert process.poll() is None, "the emulator ended"
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)
