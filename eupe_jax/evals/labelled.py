"""Labelled image sets for classification: tar shards, or a folder a class.

Two layouts of ROOT, told apart by what is there; SPLIT is "train", and "val", "validation" or "test":
  tar shards    ROOT/classes.txt, one class name a line (line number from 0 = label); ROOT/SPLIT-000000.tar, -000001 ...
                with samples KEY.jpg (or another image suffix) + KEY.cls, the class name or its number as text
  image folder  ROOT/SPLIT/CLASS/*.jpg, as ImageNet is usually unpacked; CLASS.tar in place of a folder counts too.
                Labels number the sorted names of the training classes, or the lines of ROOT/classes.txt if there is one
"""

import hashlib
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from eupe_jax.data.sources import IMAGE_SUFFIXES, ImageFolder, Record, Source
from eupe_jax.evals.interface import DataError

TEST_SPLITS = ("val", "validation", "test")
CLASSES = "classes.txt"

_LONGEST_NAME = 1000  # bytes of a .cls member; more is not a class name


class LabelledImages:
    """One split: a source of encoded images (`eupe_jax.data.sources`) that also knows every record's label.

    Attributes:
      split: its name, e.g. "train".
      labels: int32 [N], indices into `classes`.
      classes: class names by label; the same for all splits of a set.
      digest: changes when the images, the labels or the classes do.
    """

    def __init__(self, split: str, classes: tuple[str, ...], labels: np.ndarray, source: Source):
        """Raises ValueError when labels and records do not fit together."""
        labels = np.asarray(labels, np.int32)
        if labels.shape != (len(source),):
            raise ValueError(f"split {split!r}: {labels.shape} labels for {len(source)} images")
        if labels.size and not 0 <= labels.min() <= labels.max() < len(classes):
            raise ValueError(f"split {split!r}: labels {labels.min()}..{labels.max()} for {len(classes)} classes")
        self.split, self.classes, self.labels, self._source = split, tuple(classes), labels, source
        facts = (source.digest, hashlib.sha256(labels.tobytes()).hexdigest(), self.classes)
        self.digest = hashlib.sha256(repr(facts).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        return self._source[int(index)]


def load_split(folder: Path, split: str) -> LabelledImages:
    """Reads one split of the set in `folder`; image bytes are left where they are.

    Raises:
      DataError: no such split, a broken list or shard, an image without a class, a class that is not listed, an empty
        file, ...; the message names the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"no such folder: {folder}")
    shards, unpacked = sorted(folder.glob(f"{split}-*.tar")), folder / split
    if shards and unpacked.is_dir():
        raise DataError(f"{folder} holds {split!r} twice, as {shards[0].name} and as a folder: remove one of them")
    if shards:
        return _load_shards(folder, split, shards)
    if unpacked.is_dir():
        return _load_folders(folder, split)
    raise DataError(
        f"{folder} has no split {split!r}: expected {split}-000000.tar, ... beside {CLASSES}, or {split}/CLASS/*.jpg"
    )


class TrainTest(NamedTuple):
    """The two splits of a set; same classes."""

    train: LabelledImages
    test: LabelledImages


def load_train_test(folder: Path, test_split: str = "") -> TrainTest:
    """The training split and the one to test on, see `load_test`. Raises like `load_split`."""
    return TrainTest(load_split(folder, "train"), load_test(folder, test_split))


def load_test(folder: Path, split: str = "") -> LabelledImages:
    """The split of that name, by default the first of "val", "validation" and "test" that is there.

    Raises:
      DataError: none of them is there, and all that `load_split` raises.
    """
    folder = Path(folder)
    if split:
        return load_split(folder, split)
    found = [s for s in TEST_SPLITS if (folder / s).is_dir() or any(folder.glob(f"{s}-*.tar"))]
    if not found:
        raise DataError(f"{folder}: expected a split called {', '.join(TEST_SPLITS)}, or one named by test_split")
    return load_split(folder, found[0])


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names, one a line; trailing blank lines are passed over.

    Raises:
      DataError: missing or not UTF-8, an empty or repeated line, or no class; names the line.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path} cannot be read as a list of class names: {e}") from e
    first: dict[str, int] = {}
    for number, name in enumerate(lines, 1):
        if not name:
            raise DataError(f"{path}, line {number}: empty; every line is a class name")
        if name in first:
            raise DataError(f"{path}, line {number}: class {name!r} stands already on line {first[name]}")
        first[name] = number
    if not first:
        raise DataError(f"{path}: no class names; expected one a line")
    return tuple(lines)


class _Entry(NamedTuple):
    file: str
    member: str
    offset: int
    size: int
    checksum: int  # of the member's header: name, size and time


class _Shards:
    """Records inside tar shards, read without unpacking."""

    def __init__(self, entries: list[_Entry]):
        self._entries = entries
        facts = [(Path(e.file).name, *e[1:]) for e in entries]
        self.digest = hashlib.sha256(repr(facts).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Record:
        e = self._entries[index]
        with open(e.file, "rb") as f:
            f.seek(e.offset)
            return Record(f.read(e.size), f"{e.file}:{e.member}")


def _load_shards(folder: Path, split: str, shards: list[Path]) -> LabelledImages:
    classes = read_classes(folder / CLASSES)
    label_of = {name: i for i, name in enumerate(classes)}
    numbers = [re.fullmatch(rf"{re.escape(split)}-(\d+)\.tar", p.name) for p in shards]
    if all(numbers) and (missing := set(range(len(shards))) - {int(n[1]) for n in numbers}):
        raise DataError(f"{folder}: shard {min(missing)} of {split!r} is missing, up to {shards[-1].name} are there")
    entries, labels = [], []
    for shard in shards:
        for entry, text in _read_shard(shard):
            entries.append(entry)
            labels.append(_label(text, label_of, f"{shard}:{entry.member}", folder / CLASSES))
    if not entries:
        raise DataError(f"{shards[0]}: split {split!r} holds no samples KEY.jpg + KEY.cls")
    return LabelledImages(split, classes, np.asarray(labels), _Shards(entries))


def _read_shard(shard: Path) -> list[tuple[_Entry, bytes]]:
    """(image, text of its class) of every sample, in the order of the images."""
    images: dict[str, _Entry] = {}
    texts: dict[str, bytes] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for m in tar:
                key, suffix = _key(m.name)
                if not m.isreg() or key is None or suffix not in (*IMAGE_SUFFIXES, ".cls"):
                    continue
                if key in (texts if suffix == ".cls" else images):
                    raise DataError(f"{shard}:{m.name}: the sample {key!r} has more than one such member")
                if not 0 < m.size <= (_LONGEST_NAME if suffix == ".cls" else m.size):
                    raise DataError(f"{shard}:{m.name}: {m.size} bytes cannot be what its suffix says")
                if suffix == ".cls":
                    texts[key] = tar.extractfile(m).read()
                else:
                    images[key] = _Entry(str(shard), m.name, m.offset_data, m.size, m.chksum)
    except (tarfile.TarError, OSError) as e:
        raise DataError(f"{shard} cannot be read as an uncompressed tar file: {e}") from e
    if alone := sorted(images.keys() ^ texts.keys()):
        wanted = "an image of that key" if alone[0] in texts else f"{alone[0]}.cls with its class"
        raise DataError(f"{shard}: the sample {alone[0]!r} lacks {wanted} ({len(alone)} incomplete in this shard)")
    return [(entry, texts[key]) for key, entry in images.items()]


def _key(member: str) -> tuple[str | None, str]:
    """(key: path and name up to the first dot of the name, the rest in lower case); hidden files have no key."""
    folder, slash, base = member.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return (folder + slash + stem, dot + suffix.lower()) if stem else (None, "")


def _label(text: bytes, label_of: dict[str, int], image: str, classes: Path) -> int:
    name = text.decode("utf-8", errors="replace").strip()
    if name in label_of:
        return label_of[name]
    if name.isascii() and name.isdigit() and int(name) < len(label_of):
        return int(name)
    raise DataError(f"{image}: its class {name!r} is not one of the {len(label_of)} of {classes}")


def _load_folders(folder: Path, split: str) -> LabelledImages:
    root = folder / split
    try:
        source = ImageFolder(root)
    except (ValueError, OSError) as e:
        raise DataError(f"split {split!r}: {e}") from e
    classes = _folder_classes(folder, split)
    label_of = {name: i for i, name in enumerate(classes)}
    labels, skip = np.empty(len(source), np.int32), len(str(root)) + 1
    for i in range(len(source)):
        path = source.name(i)
        head, separator, _ = path[skip:].replace(".tar:", "/").partition("/")
        if not separator:
            raise DataError(f"{path}: an image outside the class folders {root}/CLASS")
        if head not in label_of:
            raise DataError(f"{path}: {head!r} is not one of the {len(classes)} classes {', '.join(classes[:3])}, ...")
        labels[i] = label_of[head]
    present = {label_of.get(name) for name in _class_names(root)}
    if empty := sorted(present - set(labels.tolist()) - {None}):
        raise DataError(f"{root / classes[empty[0]]}: the class folder holds no image")
    return LabelledImages(split, classes, labels, source)


def _folder_classes(folder: Path, split: str) -> tuple[str, ...]:
    if (folder / CLASSES).exists():
        return read_classes(folder / CLASSES)
    train = folder / "train"
    return tuple(_class_names(train if train.is_dir() else folder / split))


def _class_names(root: Path) -> list[str]:
    visible = [p for p in root.iterdir() if not p.name.startswith(".")]
    names = {p.name for p in visible if p.is_dir()} | {p.stem for p in visible if p.suffix == ".tar"}
    return sorted(names)
