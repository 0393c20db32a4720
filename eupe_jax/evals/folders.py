"""Unlabelled pictures for evaluations that look at a few of them."""

from collections.abc import Sequence
from pathlib import Path

from eupe_jax.data.sources import ImageFolder, Record, Source
from eupe_jax.evals.interface import DataError


class Subset:
    """Some records of a source, in the order of `indices`."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self._source, self._indices = source, [int(i) for i in indices]
        self.digest = f"{source.digest} {self._indices}"

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        return self._source[self._indices[index]]

    def batches(self, size: int) -> list["Subset"]:
        """The same in pieces of `size`; the last may be shorter."""
        return [Subset(self._source, self._indices[i : i + size]) for i in range(0, len(self), size)]


def read_folder(folder: Path) -> ImageFolder:
    """Every image below a folder, also those inside tar files; raises DataError where there is none."""
    try:
        return ImageFolder(folder)
    except (ValueError, OSError) as error:
        raise DataError(str(error)) from None
