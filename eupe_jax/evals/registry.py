"""Every evaluation by name. A new one is one module (see interface.py) and one entry here."""

import ast
import dataclasses
import difflib
import importlib
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
    values = {}
    for field, value in changes.items():
        if field not in defaults:
            raise ValueError(f"{name} has no setting {field!r}{_nearest(field, defaults)}")
        values[field] = _converted(f"{name}.{field}", value, defaults[field])
    return kind(**values)


def _converted(what: str, value: Any, default: Any) -> Any:
    if isinstance(value, str) and not isinstance(default, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            if default is not None:
                raise ValueError(f"{what} must be like {default!r}, got {value!r}") from None
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(default, tuple) and isinstance(value, int | float | str):
        value = (value,)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if default is not None and value is not None and type(value) is not type(default):
        raise ValueError(f"{what} must be like {default!r}, got {value!r}")
    return value


def describe(name: str) -> str:
    """The settings of an evaluation with their defaults, one a line."""
    kind = evaluation(name).Settings
    lines = [f"  {f.name}={getattr(kind(), f.name)!r}" for f in dataclasses.fields(kind)]
    return "\n".join([f"{name}: {evaluation(name).__doc__.strip().splitlines()[0]}", *lines])


def _nearest(word: str, known) -> str:
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else f"; known are {', '.join(known)}"
