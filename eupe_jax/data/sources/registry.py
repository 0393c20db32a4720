"""The kinds of sources by name, as configs and commands give them."""

import inspect
from collections.abc import Callable

from eupe_jax.data.sources.array_record import ArrayRecordSource
from eupe_jax.data.sources.base import Source
from eupe_jax.data.sources.folder import ImageFolder
from eupe_jax.data.sources.memory import PackagedPhotos, synthetic
from eupe_jax.data.sources.parquet import Parquet
from eupe_jax.data.sources.tar_shards import TarShards
from eupe_jax.data.sources.tfds import open_tfds

# Those of the first table take a path, the others only options.
_WITH_PATH: dict[str, Callable[..., Source]] = {
    "array_record": ArrayRecordSource,
    "images": ImageFolder,
    "tar": TarShards,
    "parquet": Parquet,
    "tfds": open_tfds,
}
_WITHOUT_PATH: dict[str, Callable[..., Source]] = {"photos": PackagedPhotos, "synthetic": synthetic}

KINDS = (*_WITH_PATH, *_WITHOUT_PATH)


def _parameters(kind: str) -> list[inspect.Parameter]:
    parameters = list(inspect.signature(_WITH_PATH.get(kind) or _WITHOUT_PATH[kind]).parameters.values())
    return parameters[1:] if kind in _WITH_PATH else parameters


def source_options(kind: str) -> tuple[str, ...]:
    """Names of the options that `open_source` takes for a kind."""
    return tuple(p.name for p in _parameters(kind))


def open_source(kind: str, path: str = "", /, *, field: str = "source", **options) -> Source:
    """The source of one kind at `path`.

    kind "array_record": `ArrayRecordSource`, what launch/pack.py writes. "tar": WebDataset shards, `TarShards`.
    "parquet": Hugging Face datasets on disk, `Parquet`. "tfds": "NAME:SPLIT", `open_tfds`. "images": a folder (also of
    tar files), `ImageFolder`. "photos": the photographs packaged with scikit-image and scikit-learn. "synthetic":
    random pictures for smoke tests.
    field: how errors call the place the arguments come from, e.g. "data.sources.large".
    Raises ValueError, which begins with that field, for an unknown kind or option and for what cannot be opened.
    """
    if kind not in KINDS:
        raise ValueError(f"{field}.kind is {kind!r}: use one of {', '.join(map(repr, KINDS))}")
    if kind in _WITH_PATH and not path:
        raise ValueError(f"{field}.path is empty: kind {kind!r} needs one")
    if unknown := sorted(set(options) - set(source_options(kind))):
        known = ", ".join(source_options(kind)) or "none"
        raise ValueError(f"{field}.options.{unknown[0]} is not an option of kind {kind!r}; it takes: {known}")
    if missing := [p.name for p in _parameters(kind) if p.default is p.empty and p.name not in options]:
        raise ValueError(f"{field}.options.{missing[0]} is missing: kind {kind!r} needs it")
    try:
        return _WITH_PATH[kind](path, **options) if kind in _WITH_PATH else _WITHOUT_PATH[kind](**options)
    except (ValueError, OSError, ImportError) as e:
        raise ValueError(f"{field}: {e}") from e
