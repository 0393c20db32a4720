"""The folder of a run: whether what it holds is this run, and how it is cleared for another one without losing it."""

import hashlib
import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import jax
import numpy as np
from etils import epath
from jax.experimental.multihost_utils import process_allgather, sync_global_devices
from ml_collections import ConfigDict

from eupe_jax.training.checkpoints import read_manifest, restore_item, step_directory

LOGGER = logging.getLogger(__name__)

CONFIG, DATA = "config.json", "data.json"

# Fields that change what is computed by rounding at most: a resumed run may differ in them; "*" is any name.
# `accumulate` is none where loss.shuffle_targets is set: targets are shuffled within a micro-batch. The GELU
# of teachers is none of them, because it moves the targets: the config of a run says which it began with, never "auto".
FREE_FIELDS = (
    "log_every", "loggers", "checkpoint", "data.threads", "data.workers", "data.max_broken_fraction", "mesh", "evals",
    "faults.max_skipped", "faults.fingerprint_every", "faults.stall_factor",
    "accumulate", "compute.attention", "compute.async_collectives", "students.*.remat", "*.overrides.remat",
    "*.overrides.scan_unroll", "*.overrides.depthwise",
)  # fmt: skip

# What a run writes, in the order in which it is set aside: a run that still has its checkpoints is whole without the
# rest, and its config, which says that there is one, goes last. Compiled programs serve any run.
OF_A_RUN = (
    "profile", "tensorboard", "loggers", "evals", "timings.jsonl", "metrics.jsonl", "bad_steps.jsonl", "damaged",
    "statistics", "best.json", "checkpoints", DATA, CONFIG,
)  # fmt: skip


def check(workdir: epath.Path, config: ConfigDict) -> None:
    """Refuses a workdir that holds a run of another config. One whose config file is gone has it in its checkpoints.

    Raises:
      ValueError: lists every field that differs; its note lists those that may. Or the file, or the checkpoint that
        stands in for it, is damaged.
    """
    path = workdir / CONFIG
    if path.exists():
        held = _read(path, "delete it, and the config in the newest checkpoint is taken instead")
    elif step := _newest(workdir):
        held = read_manifest(step)["config"]
    else:
        return
    wanted = json.loads(json.dumps(config.to_dict()))
    free = [field for field in FREE_FIELDS if field != "accumulate" or not config.loss.shuffle_targets]
    if differences := list(_differences(held, wanted, free=free)):
        error = ValueError(
            f"{workdir} holds a run of another config; choose another workdir, start over with --fresh, or go back "
            "to: " + "; ".join(f"{field}={old!r} (now {new!r})" for field, old, new in differences)
        )
        error.add_note(f"fields that a resumed run may change: {', '.join(free)}")
        raise error


def check_data(workdir: epath.Path, facts: Mapping[str, Mapping]) -> None:
    """Refuses data that another host, or the run in this workdir so far, does not see: another number of records is
    another order.

    Raises:
      ValueError: names the hosts, or the sources and what changed; or what is known of the data is damaged or gone.
    """
    digest = np.frombuffer(hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest(), np.uint8)
    hosts = process_allgather(digest).reshape(-1, digest.size)
    if others := np.flatnonzero(np.any(hosts != hosts[0], axis=1)).tolist():
        raise ValueError(f"hosts {others} see other data than host 0: give all hosts the same files; here: {facts}")
    path, mend = workdir / DATA, "bring it back from a copy of the run: nothing else tells which data it began with"
    if not path.exists():
        if step := _newest(workdir):
            raise ValueError(f"{path} is missing, but there is {step}: {mend}")
        return
    if differences := list(_differences(_read(path, mend), facts, "data.")):
        raise ValueError(
            f"{workdir} holds a run on other data: bring it back, or choose another workdir: "
            + "; ".join(f"{field} was {old!r}, not {new!r}" for field, old, new in differences)
        )


def check_statistics(step: epath.Path, statistics: Mapping[str, Mapping]) -> None:
    """Refuses to go on from the checkpoint in `step` with other statistics of teachers: other targets.

    Raises:
      ValueError: names the teachers.
    """
    held = restore_item(step, "statistics")
    changed = [
        name
        for name, arrays in statistics.items()
        for what, kinds in arrays.items()
        for kind, value in kinds.items()
        if not np.array_equal(held[name][what][kind], value)
    ]
    if changed:
        raise ValueError(
            f"the statistics of teacher(s) {', '.join(dict.fromkeys(changed))} are not those that {step} was trained "
            "with: its targets would change; bring the files back that config.statistics named, measured for this run"
        )


def _read(path: epath.Path, mend: str) -> dict:
    try:
        held = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {mend}") from error
    if not isinstance(held, dict):
        raise ValueError(f"{path} is damaged (no object of JSON): {mend}")
    return held


def _newest(workdir: epath.Path) -> epath.Path | None:
    """The newest finished checkpoint of the run in `workdir`."""
    try:
        return step_directory(workdir / "checkpoints")
    except FileNotFoundError:
        return None


def _differences(
    old: object, new: object, prefix: str = "", free: Sequence[str] = FREE_FIELDS
) -> Iterator[tuple[str, object, object]]:
    if any(fnmatchcase(prefix.rstrip("."), field) for field in free):
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{prefix}{key}.", free)
    elif old != new:
        yield prefix.rstrip("."), old, new


def set_aside(workdir: epath.Path, keep: Collection[str] = ()) -> epath.Path | None:
    """Moves the run that `workdir` holds, if any, into `workdir/old.N`; all processes must call it, the first moves.

    keep: what stays where it is, because the next run takes it.

    Returns:
      The folder that it is in now, on the first process.

    Raises:
      ValueError: a bucket, where nothing is moved at once.
    """
    if "://" in str(workdir):
        raise ValueError(
            f"--fresh moves folders, which buckets do not do at once: choose another workdir than {workdir}"
        )
    old = None
    there = [name for name in OF_A_RUN if name not in keep and (workdir / name).exists()]
    if there and jax.process_index() == 0:
        numbers = [int(p.name[4:]) for p in workdir.iterdir() if p.name.startswith("old.") and p.name[4:].isdigit()]
        old = workdir / f"old.{max(numbers, default=-1) + 1}"
        old.mkdir()
        for name in there:
            (workdir / name).rename(old / name)
        LOGGER.warning("the run that %s held is in %s now; to resume the new one, leave --fresh out", workdir, old)
    sync_global_devices("workdir cleared")
    return old
