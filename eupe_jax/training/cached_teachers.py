"""Which of a run's settings a feature cache depends on, and refusing one that was built with others."""

import dataclasses
import json
import logging
from collections.abc import Iterable, Mapping

from ml_collections import ConfigDict

from eupe_jax.data.augment import AugmentConfig
from eupe_jax.data.feature_cache import FeatureCache

LOGGER = logging.getLogger(__name__)

_CROP_FIELDS = ("image_size", "mode", "crop_scale", "crop_ratio")
# What tells a teacher and its tokens; the checkpoint is left out: a run from the cache does without it.
_TEACHER_FIELDS = ("kind", "model", "student", "overrides", "factory", "kwargs", "class_token", "resolutions")


def relevant_fields(config: ConfigDict, teachers: Iterable[str]) -> dict[str, object]:
    """{dotted field: plain value} of everything in a config that cached pixels and features depend on."""
    fields = {f"data.{name}": config.data[name] for name in _CROP_FIELDS}
    augment = dataclasses.asdict(AugmentConfig.from_dict(config.augment))
    fields |= {f"augment.{name}": value for name, value in augment.items()}
    for teacher in teachers:
        entry = config.teachers[teacher].to_dict()
        fields |= {f"teachers.{teacher}.{name}": entry[name] for name in _TEACHER_FIELDS if name in entry}
    return json.loads(json.dumps(fields))  # as a manifest gives them back


def open_cache(config: ConfigDict) -> FeatureCache | None:
    """The cache that `config.data.feature_cache` names, if any, with teachers of this config in it.

    A teacher that the cache does not hold is loaded and run on the cache's pixels; so may all be: a student of a proxy
    then sees the very pictures that the proxy saw.

    Raises:
      ValueError: it was built with other settings (each is named).
      FileNotFoundError: there is no cache.
    """
    folder = config.data.feature_cache
    if not folder:
        return None
    cache = FeatureCache(folder, threads=config.data.threads)
    held = [name for name in config.teachers if name in cache.teachers]
    _require_same(folder, cache.recipe["config"], relevant_fields(config, held))
    if others := [name for name in config.teachers if name not in held]:
        LOGGER.info("teachers %s come from the feature cache; %s run on its pixels", held, others)
    return cache


def _require_same(folder: str, old: Mapping, new: Mapping) -> None:
    if changed := [field for field, value in new.items() if old.get(field) != value]:
        said = "; ".join(f"{field} was {old.get(field)!r}, not {new[field]!r}" for field in changed)
        raise ValueError(f"{folder} holds a feature cache of other settings: {said}: build another one")
