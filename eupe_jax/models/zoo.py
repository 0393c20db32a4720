"""Every encoder by name. A new family is one module with a `FAMILY`, and one entry of `FAMILIES`."""

import dataclasses
import difflib
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from eupe_jax.models import convnext, dune, perception_encoder, radio, siglip, vit
from eupe_jax.models.spec import EncoderSpec, Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY for module in (vit, convnext, perception_encoder, siglip, radio, dune)
}
_SPECS: dict[str, EncoderSpec] = {s.name: s for family in FAMILIES.values() for s in family.specs}


def names() -> list[str]:
    """All encoder names, in order of family and size."""
    return list(_SPECS)


def family(name: str) -> Family:
    """The family of encoder `name`; raises like `spec`."""
    return FAMILIES[spec(name).family]


def spec(name: str, **overrides: Any) -> EncoderSpec:
    """The `EncoderSpec` of `name`, its widths recomputed where `overrides` (constructor arguments) change them.

    Raises:
      ValueError: unknown name or unknown constructor argument; the message lists the nearest known ones.
    """
    if name not in _SPECS:
        raise ValueError(f"no encoder is called {name!r}{_nearest(name, _SPECS)}")
    found = _SPECS[name]
    if not overrides:
        return found
    kind = FAMILIES[found.family]
    fields = [f.name for f in dataclasses.fields(kind.module) if f.name not in ("parent", "name")]
    for key in overrides:
        if key not in fields:
            raise ValueError(f"{name} ({kind.module.__name__}) takes no argument {key!r}{_nearest(key, fields)}")
    kwargs = {**found.kwargs, **overrides}
    return dataclasses.replace(found, kwargs=kwargs, **kind.describe(kwargs))


def build(name: str, dtype: Any = jnp.float32, **overrides: Any) -> nn.Module:
    """The flax module of encoder `name`, computing in `dtype`, with constructor arguments overridden.

    Raises:
      ValueError: as `spec`.
    """
    found = spec(name, dtype=dtype, **overrides)
    return FAMILIES[found.family].module(**found.kwargs)


def _nearest(word: str, known) -> str:
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else f"; known are {', '.join(known)}"
