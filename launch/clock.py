"""Wall seconds of the parts of long work, kept in a file: work that was stopped and went on has its true times."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

from eupe_jax.data.shard_files import alone
from eupe_jax.files import write_whole


class Clock:
    """Seconds that every part has taken, over all processes and all the times they were started."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def seconds(self) -> dict[str, float]:
        """{part: seconds}, as the file has it."""
        return json.loads(self._path.read_text()) if self._path.exists() else {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Prints the part's name, and adds what the block takes, however it ends."""
        print(f"\n== {name}", flush=True)
        start = time.perf_counter()
        try:
            yield
        finally:
            with alone(self._path.with_name(f".{self._path.name}.lock")):
                seconds = self.seconds
                seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - start, 1)
                write_whole(self._path, json.dumps(seconds, indent=2))
