"""TensorFlow Datasets, without TensorFlow."""

import os
import posixpath
import re

import numpy as np

from eupe_jax.data.sources import storage
from eupe_jax.data.sources.array_record import ArrayRecordSource
from eupe_jax.data.sources.base import Record, RecordError, Source, digest_of, in_range

_PREPARE = "prepare it once with file_format='array_record' (tfds build, or download_and_prepare)"


def open_tfds(path: str, *, data_dir: str | None = None, image_key: str = "image") -> Source:
    """A split by its name, "NAME:SPLIT" or "NAME:VERSION:SPLIT" (split "train" where there is none).

    data_dir: as in `Tfds`, or in a bucket, whose ArrayRecord shards are then read by byte ranges.

    Raises:
      ValueError: no such version, or as the source.
    """
    name, version, split = re.fullmatch(r"([^:]*)(:[\d.*]+)?(?::(.*))?", path, re.DOTALL).groups()
    if not storage.is_remote(data_dir or ""):
        return Tfds(name + (version or ""), split or "train", data_dir or None, image_key)
    folder = posixpath.join(data_dir, name)
    versions = {posixpath.dirname(f.path) for f in storage.find(folder, _is_info, "prepared versions")}
    of_number = {posixpath.basename(v): v for v in versions if posixpath.dirname(v) == folder}
    number = version[1:] if version else max(of_number, key=_version_key, default="")
    if number not in of_number:
        raise ValueError(f"{folder} has no version {number!r}, only {sorted(of_number)}")
    return ArrayRecordSource(of_number[number], key=image_key, split=split or "train")


def _is_info(path: str) -> bool:
    return posixpath.basename(path) == "dataset_info.json"


def _version_key(version: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", version)]


class Tfds:
    """A prepared TensorFlow Datasets split, read as ArrayRecord without TensorFlow; images stay encoded until decoded.

    name: e.g. "imagenet2012" or "imagenet2012:5.1.0"; split, e.g. "train" or "train[:10%]", data_dir: as in
    `tfds.data_source` (default: tfds' own, ~/tensorflow_datasets; a local folder).
    Raises ValueError when the split cannot be opened or has no image feature `image_key`.
    """

    def __init__(self, name: str, split: str = "train", data_dir: str | None = None, image_key: str = "image"):
        self._args = (name, split, data_dir, image_key)
        self._open()

    def _open(self):
        name, split, data_dir, key = self._args
        where = f" in {data_dir}" if data_dir else ""
        try:
            builder = _builder(name, data_dir)
            _check(builder, split, key)
            self._data = builder.as_data_source(split=split, decoders={key: _skip_decoding()})
        except Exception as e:  # tfds raises many kinds, some of a hundred lines
            reason = " ".join(str(e).split())
            raise ValueError(f"tfds {name!r} split {split!r}{where} cannot be opened: {reason[:400]}") from e
        self._info = os.path.join(builder.data_dir, "dataset_info.json")
        self.digest = digest_of((builder.info.full_name, split, len(self._data)))

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Record:
        name, split, _, key = self._args
        index = in_range(index, len(self))
        try:
            image = self._data[index][key]
        except (RuntimeError, ValueError) as e:
            storage.read_file(self._info)  # says whether the folder is there
            raise RecordError(f"{name}/{split}[{index}]", f"cannot be read: {e}") from e
        return Record(image if isinstance(image, bytes) else np.asarray(image), f"{name}/{split}[{index}]")

    def __getstate__(self):
        return self._args

    def __setstate__(self, args):
        self._args = args
        self._open()


def _skip_decoding():
    import tensorflow_datasets as tfds

    return tfds.decode.SkipDecoding()


def _builder(name: str, data_dir: str | None):
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as e:
        where = data_dir or "~/tensorflow_datasets"
        raise ValueError(f"tensorflow-datasets knows none of that name, and {where} holds none") from e


def _check(builder, split: str, key: str) -> None:
    """What tfds itself says late, or at length. Raises ValueError."""
    info = builder.info
    if not info.splits:
        raise ValueError(f"nothing is prepared in {builder.data_dir}; {_PREPARE}")
    if info.file_format is not None and info.file_format.value not in ("array_record", "parquet"):
        raise ValueError(
            f"{builder.data_dir} is prepared as {info.file_format.value}, which has no random access; {_PREPARE} in "
            "another data_dir"
        )
    if split.split("[")[0].split("+")[0] not in info.splits:
        raise ValueError(f"it has the splits {sorted(info.splits)}")
    if info.features is None or key not in info.features:
        raise ValueError(f"it has no feature {key!r}, only {sorted(info.features or ())}")
