"""What the command-line entries share: flags, and errors as one line that names the fix."""

import atexit
import contextlib
import logging
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from eupe_jax.training.preemption import RESUME_ME, ResumeMe

BAD_INPUT = 2  # exit status

EXPECTED_ERRORS = (ValueError, OSError, ImportError)


def define_config(help_text: str = "recipe, e.g. configs/stage2_vitb.py or configs/stage2_vitb.py:runlocal"):
    """The --config flag: a file with `get_config(mode)`, and --config.FIELD=VALUE overrides."""
    return config_flags.DEFINE_config_file("config", None, help_text, lock_config=True)


def fail(message: str) -> None:
    """Prints one line and exits with status 2."""
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    sys.exit(BAD_INPUT)


def _reason(text: str) -> str:
    """The line that helps, out of what ml_collections says: it quotes whole tracebacks, and every place it looked."""
    if "Traceback" in text:
        return text.strip().splitlines()[-1].split("Error: ", 1)[-1]
    found = re.search(r"No such file or directory: '[^']*'", text)
    return found[0] if found and "Attempted" in text else text


_arguments: list[str] = []


def arguments() -> list[str]:
    """What the command line names besides flags, for commands that take such (`run(main, arguments=True)`)."""
    return list(_arguments)


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(tuple(argv))
    except flags.Error as error:
        fail(_reason(str(error)))
    except AttributeError as error:  # an override of a field that the config does not have
        text = str(error).replace("\\'", "'")
        found = re.search(r"'(?P<field>[^']+)'(?:.*?Did you mean \"(?P<near>[^\"]+)\")?", text, re.DOTALL)
        field = found["field"].strip('"') if found else str(error)
        near = f"; did you mean {found['near']!r}?" if found and found["near"] else ""
        wanted = [a for a in argv if field in a]
        fail(f"the config has no field {field!r} ({wanted[0] if wanted else 'in an override'}){near}")
    except EXPECTED_ERRORS + (TypeError, KeyError) as error:
        fail(f"cannot read the config or its overrides: {error}")
    return rest


def _not_of_orbax(record: logging.LogRecord) -> bool:
    """Filter: what Orbax raises it also logs, with its stack, from every layer; an error is one line."""
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def set_up_logging() -> None:
    """Our own messages, plainly; of the libraries only errors (Orbax writes dozens of lines a save)."""
    absl_logging.set_verbosity(absl_logging.ERROR)
    absl_logging.get_absl_logger().addFilter(_not_of_orbax)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for name in ("eupe_jax", "launch", "convert"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.handlers[:] = [handler]
        logger.propagate = False


def run(main: Callable[[], None], *, arguments: bool = False) -> None:
    """Runs `main()` under absl. Bad input ends in the error's notes, if any, one line and status 2; EUPE_TRACEBACK=1
    shows the stack as well. `ResumeMe`, as of a run that was told to leave, and saved, ends in one line and status
    RESUME_ME.

    `arguments`: whether the command takes anything besides flags.
    """

    def guarded(argv: list[str]) -> None:
        _arguments[:] = argv[1:]
        if _arguments and not arguments:
            fail(f"unexpected argument {_arguments[0]!r}: flags are given as --flag=value")
        set_up_logging()
        try:
            main()
        except ResumeMe as notice:
            print(f"{notice}: {notice.again} to go on", file=sys.stderr)
            sys.exit(RESUME_ME)
        except EXPECTED_ERRORS as error:
            if os.environ.get("EUPE_TRACEBACK"):
                raise
            for note in getattr(error, "__notes__", ()):  # what does not go into a line: lists of files
                print(note, file=sys.stderr)
            atexit.register(_hush)
            with _hushed():
                fail(f"{_reason(str(error))} [EUPE_TRACEBACK=1 shows where]")

    app.run(guarded, flags_parser=_parse)


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Inside, threads of other packages print into nobody's line."""
    hooks, disabled = (sys.unraisablehook, sys.excepthook, threading.excepthook), logging.root.manager.disable
    with warnings.catch_warnings():
        _hush()
        time.sleep(0.05)  # whoever is in the middle of a line ends it
        try:
            yield
        finally:
            sys.unraisablehook, sys.excepthook, threading.excepthook = hooks
            logging.disable(disabled)


def _hush() -> None:
    """At the end nobody says more: what a failed save left behind (coroutines nobody awaits, tasks nobody asked) would
    bury the error's line under stacks of other packages."""
    warnings.simplefilter("ignore")
    logging.disable()
    sys.unraisablehook = sys.excepthook = threading.excepthook = lambda *_: None


def require(flag: flags.FlagHolder, name: str) -> object:
    """The value of a flag that must be given."""
    if flag.value is None:
        fail(f"--{name} is missing: see --help")
    return flag.value


def require_local(flag: flags.FlagHolder, name: str) -> Path:
    """The path on this machine that a flag must give; one in a bucket would be a local folder called gs: otherwise."""
    text = require(flag, name)
    if "://" in text:
        raise ValueError(f"--{name} {text} is remote: name a local folder or a mounted bucket (gcsfuse)")
    return Path(text)
