"""TensorFlow Datasets, without TensorFlow."""

import numpy as np

from eupe_jax.data.sources.base import Record, RecordError, digest_of, in_range

_PREPARE = "prepare it once with file_format='array_record' (tfds build, or download_and_prepare)"


class Tfds:
    """A prepared TensorFlow Datasets split, read as ArrayRecord without TensorFlow; images stay encoded until decoded.

    name: e.g. "imagenet2012" or "imagenet2012:5.1.0"; split, e.g. "train" or "train[:10%]", data_dir: as in
    `tfds.data_source` (default: tfds' own, ~/tensorflow_datasets).
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
        self.digest = digest_of((builder.info.full_name, split, len(self._data)))

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Record:
        name, split, _, key = self._args
        index = in_range(index, len(self))
        try:
            image = self._data[index][key]
        except (RuntimeError, ValueError) as e:
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
