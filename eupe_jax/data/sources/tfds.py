"""TensorFlow Datasets, without TensorFlow."""

import numpy as np

from eupe_jax.data.sources.base import Record, digest_of


class Tfds:
    """A prepared TensorFlow Datasets split, read as ArrayRecord without TensorFlow; images stay encoded until decoded.

    name: e.g. "imagenet2012"; split, data_dir: as in `tfds.data_source` (data_dir may be remote).
    Raises ValueError when the split cannot be opened or has no image feature `image_key`.
    """

    def __init__(self, name: str, split: str = "train", data_dir: str | None = None, image_key: str = "image"):
        self._args = (name, split, data_dir, image_key)
        self._open()

    def _open(self):
        import tensorflow_datasets as tfds

        name, split, data_dir, key = self._args
        try:
            builder = tfds.builder(name, data_dir=data_dir)
            features = builder.info.features
            if features is None or key not in features:
                raise ValueError(f"it has no feature {key!r}, only {sorted(features or ())}")
            decoders = {key: tfds.decode.SkipDecoding()}
            self._data = builder.as_data_source(split=split, decoders=decoders)
            self.digest = digest_of((builder.info.full_name, split, len(self._data)))
        except Exception as e:  # tfds raises many kinds
            where = f" in {data_dir}" if data_dir else ""
            raise ValueError(f"tfds {name!r} split {split!r}{where} cannot be opened: {e}") from e

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Record:
        name, split, _, key = self._args
        image = self._data[int(index)][key]
        return Record(image if isinstance(image, bytes) else np.asarray(image), f"{name}/{split}[{index}]")

    def __getstate__(self):
        return self._args

    def __setstate__(self, args):
        self._args = args
        self._open()
