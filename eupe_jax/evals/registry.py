"""Every evaluation by name. A new one is one module (see interface.py) and one entry here."""

import ast
import contextlib
import dataclasses
import difflib
import importlib
import types
import typing
from collections.abc import Mapping
from types import ModuleType
from typing import Any

NAMES = (
    "knn",
    "linear_probe",
    "zero_shot",
    "segmentation",
    "depth",
    "correspondence",
    "similarity",
    "pca",
)


def evaluation(name: str) -> ModuleType:
    """The module of evaluation `name`, with its `Settings`, `load` and `run`; imported only now.

    Raises:
      ValueError: no such evaluation; the message names the nearest.
    """
    if name not in NAMES:
        raise ValueError(f"no evaluation is called {name!r}{_nearest(name, NAMES)}")
    return importlib.import_module(f"eupe_jax.evals.{name}")


def settings(name: str, changes: Mapping[str, Any]) -> Any:
    """The evaluation's Settings with some fields changed; strings (from a command line) are read as Python literals.

    Raises:
      ValueError: unknown field, or a value of another type than the field's.
    """
    kind = evaluation(name).Settings
    defaults = {f.name: getattr(kind(), f.name) for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    values = {}
    for field, value in changes.items():
        if field not in defaults:
            raise ValueError(f"{name} has no setting {field!r}{_nearest(field, defaults)}")
        values[field] = _converted(f"{name}.{field}", value, hints[field], defaults[field])
    try:
        return kind(**values)
    except (TypeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"{name} does not take {values}: {error}") from None


def _converted(what: str, value: Any, hint: Any, default: Any) -> Any:
    if isinstance(value, str) and not _fits(value, hint):
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
    if isinstance(value, list):
        value = tuple(value)
    for candidate in (value, (value,)):  # one number for a tuple of numbers
        if _fits(candidate, hint):
            return float(candidate) if hint is float else candidate
    raise ValueError(f"{what} must be like {default!r}, got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type as Settings are annotated: plain types, unions, literals and tuples."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is typing.Literal:
        return value in args
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        each = args[:1] * len(value) if args[-1] is Ellipsis else args
        return len(each) == len(value) and all(map(_fits, value, each))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is type(None):
        return value is None
    return type(value) is hint


def describe(name: str) -> str:
    """The settings of an evaluation with their defaults, one a line."""
    kind = evaluation(name).Settings
    lines = [f"  {f.name}={getattr(kind(), f.name)!r}" for f in dataclasses.fields(kind)]
    return "\n".join([f"{name}: {evaluation(name).__doc__.strip().splitlines()[0]}", *lines])


def _nearest(word: str, known) -> str:
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else f"; known are {', '.join(known)}"
