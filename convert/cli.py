"""What the converters' command lines share."""

import argparse


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser from a script's docstring (description, example, details) with the flags that name an encoder."""
    description, example, details = doc.strip().split("\n\n")
    made = argparse.ArgumentParser(
        description=description,
        epilog=f"example:\n{example}\n\n{details}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="training workdir, step folder, .safetensors or .pt")
    add("--student", help="which student, where the checkpoint holds several")
    add("--model", help="zoo name, for a weights file that does not say which model it is")
    return made


def one_line(error: Exception, limit: int = 600) -> str:
    """An error as one line of bounded length."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[:limit] + " ..."
