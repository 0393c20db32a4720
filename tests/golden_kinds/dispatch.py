"""What kind of fixture a file is, by what it holds and never by its name, and which check runs on it."""

import importlib
import json
import pkgutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

import tests.golden_kinds as package

# kind written in the metadata -> kind as checks register it
META_KINDS = {
    "vit": "vit",
    "rope": "rope_tables",
    "convnext": "convnext",
    "pe_vision": "pe_vision",
    "pe_clip": "pe_clip",
    "tokenizer": "tokenizer",
    "resize_tokens": "resize_tokens",
    "resize_images": "resize_images",
    "losses": "losses",
    "adapter": "adapter",
    "token_stats": "token_stats",
    "knn": "knn",
    "seg_metrics": "seg_metrics",
    "slide": "slide_windows",
    "seg_e2e": "seg_linear_e2e",
    "schedules": "schedules",
    "depth_parts": "depth_parts",
    "depth_e2e": "depth_linear_e2e",
}
JSON_KINDS = ("state_dict_shapes", "augmentation_facts")


class UnknownKindError(ValueError):
    """The file is no fixture of any known kind."""


def classify(path: Path) -> str:
    """The kind of a fixture file.

    Raises:
      UnknownKindError: not a fixture of a known kind; the message says what was found in it.
    """
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as z:
            names = z.files
            meta = json.loads(str(z["meta"])) if "meta" in names else {}
        kind = meta.get("kind") if isinstance(meta, dict) else None
        if kind in META_KINDS:
            return META_KINDS[kind]
        raise UnknownKindError(f"{path.name}: meta kind {kind!r}, arrays {names[:8]}...")
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        if isinstance(content, dict) and content:
            if all(isinstance(v, dict) and {"parameters", "state_dict"} <= v.keys() for v in content.values()):
                return "state_dict_shapes"
            if "normalisation" in content:
                return "augmentation_facts"
        raise UnknownKindError(f"{path.name}: JSON with the keys {list(content)[:8]}")
    raise UnknownKindError(f"{path.name}: neither .npz nor .json")


def handlers() -> dict[str, Callable[[Path], None]]:
    """Every check that exists: kind -> check, which raises AssertionError or pytest.skip."""
    found: dict[str, Callable[[Path], None]] = {}
    for module_info in pkgutil.iter_modules(package.__path__):
        kinds = getattr(importlib.import_module(f"{package.__name__}.{module_info.name}"), "KINDS", {})
        unknown = set(kinds) - {*META_KINDS.values(), *JSON_KINDS}
        clashes = set(kinds) & set(found)
        if unknown or clashes:
            raise ValueError(f"{module_info.name}.KINDS: unknown kinds {unknown}, already registered {clashes}")
        found.update(kinds)
    return found
