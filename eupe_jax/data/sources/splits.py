"""Which files of a folder are one split, where their names say so: SPLIT-00000-of-00004.parquet and the like."""

import posixpath
import re
from collections.abc import Sequence

from eupe_jax.data.sources.storage import File

EVERY = "*"

_FOLDERS = ("train", "val", "validation", "test")


def choose_split(files: Sequence[File], split: str, where: str) -> list[File]:
    """The files of one split; "" takes all where they are of one, "*" takes all.

    Raises ValueError for files of several splits and none chosen, for a split that is not there, and for shards missing
    from a numbered set.
    """
    by_name: dict[str, list[File]] = {}
    for file in files:
        by_name.setdefault(_split_of(file.path), []).append(file)
    listed = ", ".join(repr(n) for n in sorted(by_name))
    if not split and len(by_name) > 1:
        raise ValueError(f"{where} holds several splits, {listed}: name one, split={max(by_name)!r}, or split='*'")
    if split not in ("", EVERY) and split not in by_name:
        raise ValueError(f"{where} has no split {split!r}, only {listed}")
    chosen = list(files) if split in ("", EVERY) else by_name[split]
    _check_complete(chosen, where)
    return chosen


def _number(path: str) -> re.Match | None:
    return re.search(r"-(\d{5,})-of-(\d{5,})", posixpath.basename(path))


def _split_of(path: str) -> str:
    """What stands before the number: of "train-00000-of-00002.parquet" and "tiny-train.array_record-00000-of-01024"
    that is "train". Without a number the folder's name counts, where it is that of a split."""
    base, folder = posixpath.basename(path), posixpath.basename(posixpath.dirname(path))
    if found := _number(path):
        return base[: found.start()].split(".")[0].split("-")[-1]
    return folder if folder in _FOLDERS else ""


def _check_complete(files: Sequence[File], where: str) -> None:
    there: dict[tuple[str, str], set[int]] = {}
    for file in files:
        if found := _number(file.path):
            stem = file.path[: file.path.rindex(found[0])]
            there.setdefault((stem, found[2]), set()).add(int(found[1]))
    for (stem, total), numbers in there.items():
        if missing := set(range(int(total))) - numbers:
            first = f"{posixpath.basename(stem)}-{min(missing):0{len(total)}d}-of-{total}"
            raise ValueError(f"{where}: {len(missing)} of {int(total)} shards are missing, the first is {first}")
