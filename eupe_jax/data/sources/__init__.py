"""Where records come from: random access to encoded images, without TensorFlow or JAX.

A source answers `len(source)` and `source[i] -> Record`, can be pickled (worker processes), and has a `digest`, a
string that changes when its records do (it goes into fingerprints of what is made from them). Decoding is not its
business (`eupe_jax.data.host`).
"""

from eupe_jax.data.sources.array_record import ArrayRecordSource
from eupe_jax.data.sources.base import IMAGE_SUFFIXES, Changed, Record, RecordError, Source, Unavailable
from eupe_jax.data.sources.folder import ImageFolder
from eupe_jax.data.sources.memory import ArraySource, PackagedPhotos, synthetic
from eupe_jax.data.sources.parquet import Parquet
from eupe_jax.data.sources.registry import KINDS, open_source, source_options
from eupe_jax.data.sources.tar_shards import TarShards
from eupe_jax.data.sources.tfds import Tfds

__all__ = [
    "IMAGE_SUFFIXES",
    "KINDS",
    "ArrayRecordSource",
    "ArraySource",
    "Changed",
    "ImageFolder",
    "PackagedPhotos",
    "Parquet",
    "Record",
    "RecordError",
    "Source",
    "TarShards",
    "Tfds",
    "Unavailable",
    "open_source",
    "source_options",
    "synthetic",
]
