"""Commands out of blocks of shell: what each would start, with placeholders filled in."""

import re
import shlex
import tomllib
from collections.abc import Iterator

from tests.docs.pages import ROOT

RECIPE = "configs/stage2_vitb.py"  # stands in for a recipe that is not named
NOT_RUN = "# not run by the tests: "

# What starts a block of shell, besides this project's own commands.
SHELL = {".", "cd", "export", "sleep", "wait", "exit", "[", "for", "done", "git"}
CLOUD = {"gcloud", "xpk", "cmake", "adb"}  # needs what no test has
WRAPPERS = {"nohup", "srun", "do", "until"}

PHONY = set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split())
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


class Wrong(ValueError):
    """A command that cannot be right; says why."""


def lines(text: str, variables: dict[str, str]) -> Iterator[list[str]]:
    """The words of every command in `text`, one list a command, `$NAME` of `variables` filled in.

    variables: gains those that `text` sets by NAME="..." on a line of its own.
    """
    for line in re.sub(r"\\\n *", " ", text).splitlines():
        for name, value in variables.items():
            line = re.sub(rf"\${name}\b", lambda _, value=value: value, line)
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words, skip = [], False
        for word in lexer:
            if skip:
                skip = False
            elif set(word) <= set("();<>|&"):
                skip = word[0] in "<>"  # what follows is a file
                if skip and words and words[-1].isdigit():  # 2>&1
                    words.pop()
                if not skip and words:
                    yield words
                    words = []
            else:
                words.append(word)
        if len(words) == 1 and (found := re.fullmatch(r"([A-Z]+)=(.*)", words[0])):
            variables[found[1]] = found[2]
        elif words:
            yield words


def is_shell(text: str) -> bool:
    """Whether every command begins with a word that is known here."""
    known = SHELL | CLOUD | {"make", "pip"}
    variables: dict[str, str] = {}
    try:
        starts = [words[0] for words in map(_bare, lines(text, variables)) if words]
    except ValueError:  # an apostrophe: prose
        return False
    fits = all(word in known or is_python(word) or word.endswith("/pip") for word in starts)
    return fits and bool(starts or variables)


def is_python(word: str) -> bool:
    return re.fullmatch(r"(.*/)?python[\d.]*", word) is not None


def _bare(words: list[str]) -> list[str]:
    """Without what comes before the command itself: VARIABLE=value, nohup, srun, do."""
    while words and (words[0] in WRAPPERS or re.match(r"\w+=", words[0])):
        words = words[1:]
    return words


def scripts(words: list[str], marked: bool) -> Iterator[list[str]]:
    """[script, argument, ...] of every script of ours that a command starts; other commands are checked here.

    marked: whether the page says that the block is not run.
    Raises:
      Wrong: unknown commands, targets, extras, files or modules; a cloud's command in a block that is not marked.
    """
    words = _bare(words)
    if not words:
        return
    if is_python(words[0]):
        yield from _python(words[1:])
    elif words[0] == "make":
        if wrong := {w for w in words[1:] if "=" not in w} - PHONY:
            raise Wrong(f"the Makefile has no target {sorted(wrong)}")
    elif words[0] == "pip" or words[0].endswith("/pip"):
        _pip(words[1:])
    elif words[0] in CLOUD:
        if not marked:
            raise Wrong(f"{words[0]} is not run by any test: begin the block with '{NOT_RUN}REASON'")
        for word in words:
            if "launch/" in word or "convert/" in word:  # a command inside a command's argument
                for inner in lines(word.partition("=")[2] or word, {}):
                    yield from scripts(inner, marked)
    elif words[0] not in SHELL:
        raise Wrong(f"unknown command {words[0]!r}")


def _python(words: list[str]) -> Iterator[list[str]]:
    if not words:
        return
    if words[0] == "-m":
        module = ROOT / words[1].replace(".", "/")
        if words[1] not in ("venv", "pytest", "pip") and not (module.with_suffix(".py").exists() or module.is_dir()):
            raise Wrong(f"no module {words[1]}")
    elif not (ROOT / words[0]).is_file():
        raise Wrong(f"no such file: {words[0]}")
    else:
        yield [words[0], *(() if "--help" in words else _filled(words[1:]))]


def _filled(arguments: list[str]) -> Iterator[str]:
    """Without `...`, and with something in place of what a reader is to fill in: RECIPE, STEP, $i."""
    for word in arguments:
        if word == "..." or word.endswith("=..."):
            continue
        word = re.sub(r"^\[(--.*)\]$", r"\1", word)  # a flag that may be left out
        word = re.sub(r"^--config=[A-Z]+$", f"--config={RECIPE}", word)
        yield re.sub(r"=([A-Z][A-Z_]+|\$\w)$", "=1", word)


def _pip(words: list[str]) -> None:
    for first, second in zip(words, words[1:], strict=False):
        if first == "-r" and not (ROOT / second).is_file():
            raise Wrong(f"no such file: {second}")
    for word in words:
        if found := re.fullmatch(r"(\.|eupe_jax)\[([\w,]+)\]", word):
            if wrong := set(found[2].split(",")) - EXTRAS:
                raise Wrong(f"pyproject.toml has no extra {sorted(wrong)}")
