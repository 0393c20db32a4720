"""What the converters' command lines share."""

import argparse
import sys
from importlib import util
from typing import NoReturn


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """A wrong flag gives one line, like every other bad input."""
        print(f"error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


def described(doc: str) -> argparse.ArgumentParser:
    """A parser from a script's docstring of three paragraphs: description, example, details."""
    description, example, details = doc.strip().split("\n\n")
    return _Parser(
        description=description,
        epilog=f"example:\n{example}\n\n{details}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def parser(doc: str) -> argparse.ArgumentParser:
    """`described`, with the flags that name an encoder."""
    made = described(doc)
    add = made.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="training workdir, step folder, .safetensors or .pt")
    add("--student", help="which student, where the checkpoint holds several")
    add("--model", help="zoo name, for a weights file that does not say which model it is")
    return made


def require_export() -> None:
    """Ends a script with one line where what it needs is not installed."""
    if missing := [name for name in ("torch", "torchao", "executorch") if util.find_spec(name) is None]:
        sys.exit(f"error: needs {', '.join(missing)}: pip install 'eupe_jax[export]'")


def one_line(error: Exception, limit: int = 600) -> str:
    """An error as one line of bounded length."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[:limit] + " ..."
