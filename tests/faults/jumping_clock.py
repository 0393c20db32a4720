"""python jumping_clock.py SCRIPT ...: runs a script of launch/ while the clock that Python sees jumps by up to ten
years either way, every second."""

import os
import random
import runpy
import sys
import time

YEARS = 10 * 365 * 86400
EVERY_SECONDS = 1
now, now_ns = time.time, time.time_ns


def offset() -> int:
    """Seconds; another number every EVERY_SECONDS."""
    return random.Random(time.monotonic() // EVERY_SECONDS).randrange(-YEARS, YEARS)


time.time = lambda: now() + offset()
time.time_ns = lambda: now_ns() + offset() * 10**9

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.getcwd())
    runpy.run_path(sys.argv[0], run_name="__main__")
