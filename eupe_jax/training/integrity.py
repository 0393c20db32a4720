"""Checksums of checkpoints: what is read back is what was written, or an error names the file.

Orbax commits a checkpoint as a whole but does not notice a bit that turned, a file cut short or one that went missing
afterwards. Before a checkpoint is committed its files' sizes and sha256 are written into it, and compared before
anything is restored.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from etils import epath
from jax.experimental.multihost_utils import broadcast_one_to_all

from eupe_jax.files import naming, write_whole
from eupe_jax.hashing import sha256_file

CHECKSUMS = "checksums.json"
# What Orbax writes last of all, after the checksums: the fact that it was committed, and when.
COMMITTED = "commit_success.txt"
STEP_METADATA = "_CHECKPOINT_METADATA"
TIMESTAMPS = ("init_timestamp_nsecs", "commit_timestamp_nsecs")
THREADS = 8  # hashing does not hold the interpreter, and buckets answer slowly
NAMED = 5  # files that an error names
MESSAGE_BYTES = 4096  # of an error that hosts tell each other, after its kind
DAMAGED, UNREAD = b"d", b"u"
# What a half-deleted checkpoint gives. Any other error says that a file could not be read, not that it is damaged.
GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class CorruptCheckpoint(ValueError):
    """A checkpoint is not what was written; the message names the files."""


def seal(step: epath.Path) -> None:
    """Writes the checksums of all files of a step directory into it; to be called before it is committed.

    Raises:
      ValueError: Orbax's own note of the step is missing or none. OSError: a file cannot be read, or this one written.
    """
    names = sorted(name for name in _files(step) if name not in (CHECKSUMS, COMMITTED, STEP_METADATA))
    with ThreadPoolExecutor(THREADS) as pool:
        files = dict(zip(names, pool.map(lambda name: _entry(step / name), names), strict=True))
    if (noted := _without_times(step)) is None:
        raise ValueError(f"{step / STEP_METADATA} is not what Orbax writes: nothing could be compared with it")
    held = {"files": files, STEP_METADATA: noted}
    write_whole(step / CHECKSUMS, json.dumps({**held, "sha256": _digest(held)}, indent=1))


def verify(step: epath.Path, items: Iterable[str] | None = None) -> None:
    """Compares the files of a step directory, or of some of its items, with their checksums.

    Raises:
      CorruptCheckpoint: checksums or files are missing, cut short or changed; names them.
      OSError: a file cannot be read (permission, a failing disk or network): whether it is damaged is not known.
    """
    if problem := _problem(step, items):
        raise CorruptCheckpoint(problem)


def verify_on_all_hosts(step: epath.Path) -> None:
    """`verify`, read by the first host alone; all hosts must call it, and all raise alike."""
    if jax.process_count() == 1:
        return verify(step)
    message = np.zeros(MESSAGE_BYTES, np.uint8)
    if jax.process_index() == 0:
        try:
            problem = _problem(step, None)
            encoded = DAMAGED + problem.encode() if problem else b""
        except OSError as error:
            encoded = UNREAD + str(error).encode()
        encoded = encoded[:MESSAGE_BYTES]
        message[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    told = bytes(np.asarray(broadcast_one_to_all(message), np.uint8)).rstrip(b"\0")
    if told:
        kind = CorruptCheckpoint if told[:1] == DAMAGED else OSError
        raise kind(told[1:].decode(errors="replace"))


def _problem(step: epath.Path, items: Iterable[str] | None) -> str | None:
    """What is wrong, in words; None where nothing is. Raises OSError where files cannot be read."""
    try:
        with naming(step / CHECKSUMS):
            text = (step / CHECKSUMS).read_text()
    except GONE:
        return f"{step} is damaged or unfinished: it has no {CHECKSUMS}"
    except UnicodeDecodeError as error:
        return f"{step / CHECKSUMS} is damaged: {error}"
    try:
        held = json.loads(text)
        files, digest = held["files"], held.pop("sha256")
        intact = digest == _digest(held) and all(_plain(name) for name in files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        return f"{step / CHECKSUMS} is damaged"
    if items is not None:
        wanted = set(items)
        files = {name: entry for name, entry in files.items() if name.split("/")[0] in wanted}
        if missing := wanted - {name.split("/")[0] for name in files}:
            return f"{step} holds no {', '.join(sorted(missing))}"
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda name: _difference(step / name, files[name]), files)
        wrong = [f"{name} {difference}" for name, difference in zip(files, found, strict=True) if difference]
    noted = _without_times(step)
    if noted is None or noted != held.get(STEP_METADATA):
        wrong.append(f"{STEP_METADATA} says other things than were written")
    if not wrong:
        return None
    more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
    return f"checkpoint {step} is damaged: {'; '.join(wrong[:NAMED])}{more}"


def _difference(path: epath.Path, entry: dict) -> str | None:
    try:
        with naming(path):
            size = path.stat().length
            if size != entry["size"]:
                return f"has {size} bytes, not {entry['size']}"
            return None if sha256_file(path) == entry["sha256"] else "has other bytes than were written"
    except GONE:
        return "is missing"
    except (KeyError, TypeError) as error:
        return f"cannot be checked: {error}"


def _without_times(step: epath.Path) -> dict | None:
    """What Orbax notes of the step, without when: that changes once more when it commits. None: no such note."""
    try:
        with naming(step / STEP_METADATA):
            noted = json.loads((step / STEP_METADATA).read_text())
        if not all(isinstance(noted.get(key), int | None) for key in TIMESTAMPS):
            return None
        return {key: value for key, value in noted.items() if key not in TIMESTAMPS}
    except (*GONE, ValueError, AttributeError, RecursionError):
        return None


def _entry(path: epath.Path) -> dict:
    return {"size": path.stat().length, "sha256": sha256_file(path)}


def _files(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """Names of all files below, relative to `folder`."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path, f"{prefix}{path.name}/")
        else:
            yield prefix + path.name


def _plain(name: str) -> bool:
    """Whether a name stays inside the folder."""
    return not name.startswith("/") and ".." not in name.split("/")


def _digest(held: dict) -> str:
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()
