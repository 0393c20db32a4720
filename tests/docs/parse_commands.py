"""Reads commands as the scripts of this project would, up to the point where their work begins.

    python -m tests.docs.parse_commands < commands.json      # [["launch/train.py", "--config=..."], ...]

Prints a JSON list with what each script had to say against its command line, or null. A process of its own, because
the scripts define their flags for the whole process, and some set the environment.
"""

import argparse
import contextlib
import io
import json
import runpy
import sys

from absl import app, flags

from tests.docs.pages import ROOT


class Parsed(Exception):
    """The command line was read, and nothing was wrong with it."""


def _absl_run(main, argv=None, flags_parser=None):
    rest = flags_parser(sys.argv)
    # `guarded` of launch/cli.py refuses these, unless the command takes arguments.
    takes_arguments = any(c.cell_contents is True for c in main.__closure__ or ())
    if rest[1:] and not takes_arguments:
        raise SystemExit(f"unexpected argument {rest[1]!r}")
    raise Parsed


_parse_args = argparse.ArgumentParser.parse_args


def _argparse_run(parser, args=None, namespace=None):
    _parse_args(parser, args, namespace)
    raise Parsed


def problem(command: list[str], known: set[str]) -> str | None:
    """What a script says against its command line. known: flags that stay between scripts."""
    for name in set(flags.FLAGS) - known:
        delattr(flags.FLAGS, name)
    for name in [name for name in sys.modules if name == "launch" or name.startswith("launch.")]:
        del sys.modules[name]
    sys.argv = list(command)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            runpy.run_path(str(ROOT / command[0]), run_name="__main__")
    except Parsed:
        return None
    except SystemExit as stopped:
        return f"{stopped} {said.getvalue()}".strip()
    return "it ran to its end: is its command line read by argparse or absl?"


def main() -> None:
    app.run, argparse.ArgumentParser.parse_args = _absl_run, _argparse_run
    sys.path.insert(0, str(ROOT))
    known = set(flags.FLAGS)
    print(json.dumps([problem(command, known) for command in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
