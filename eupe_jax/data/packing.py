"""Any source of images to a folder of ArrayRecord shards: parallel, resumable at any moment, verified.

While it is made, the folder holds finished shards and `.pack/`: the plan, an entry for every finished shard, and shards
being written. A shard gets its name when it is whole and on the disk, its entry after that, and `manifest.json` is
written last of all; then `.pack/` goes. Records keep the source's order: shuffling is the loader's business.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from eupe_jax.data.pack_shard import ImageOptions, Shard, check_any, check_broken, find_damage, write_shard
from eupe_jax.data.processes import end_with_parent
from eupe_jax.data.shard_files import alone, write_json
from eupe_jax.data.sources import Source
from eupe_jax.data.sources.base import is_plain_name

MANIFEST = "manifest.json"
WORK = ".pack"
FORMAT = "eupe_jax packed images 1"
POLICIES = ("stop", "drop", "keep")

# Options of sources that say how they are read, not what: the digest tells whether the records are the same.
_HOW = frozenset({"index_dir", "cache_mib", "relist"})


def pack(
    source: Source,
    out: str | os.PathLike,
    *,
    kind: str,
    path: str = "",
    source_options: Mapping | None = None,
    shards: int,
    name: str = "images",
    images: ImageOptions = ImageOptions(),  # noqa: B008  frozen
    on_broken: Literal["stop", "drop", "keep"] = "stop",
    max_broken_fraction: float = 0.001,
    workers: int = 1,
    progress: bool = True,
) -> dict:
    """Packs every record of `source` into `out` and returns the manifest; goes on where an earlier call was stopped.

    Args:
      kind, path, source_options: where the source comes from, for the manifest; names are stored relative to `path`.
      shards: how many; records are shared out evenly, in order.
      on_broken: "keep" stores broken images as they are, "drop" leaves them out, "stop" does too, but gives up when
        they are more than `max_broken_fraction` of all. The manifest lists them in any case.
      workers: processes; 1 works in this one.

    Raises:
      BrokenImages: lists them. ValueError: `out` holds something else, or settings do not fit.
      OSError: disk full, a source whose storage fails (Unavailable) or was Changed, another pack is at work there, or a
        worker died.
    """
    if on_broken not in POLICIES:
        raise ValueError(f"on_broken must be one of {POLICIES}, got {on_broken!r}")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if not 0 <= max_broken_fraction <= 1:
        raise ValueError(f"max_broken_fraction must be in [0, 1], got {max_broken_fraction}")
    plan = _plan(source, kind, path, source_options, shards, name, images, on_broken == "keep")
    folder = Path(out)
    done = _read_manifest(folder, plan)
    if done is not None:
        shutil.rmtree(folder / WORK, ignore_errors=True)
        return done
    with _claimed(folder, plan) as entries:
        most = int(max_broken_fraction * len(source)) if on_broken == "stop" else len(source)
        wanted = [shard for shard in _shards(len(source), shards, name) if shard.file not in entries]
        todo = sum(shard.stop - shard.first for shard in wanted)
        job = _WriteJob(source, images, folder, _roots(path), on_broken == "keep", most)
        bar = tqdm(total=len(source), initial=len(source) - todo, unit="img", desc=folder.name, disable=not progress)
        with bar, contextlib.closing(_each(job, wanted, workers, bar)) as written:
            check_broken(_broken_of(entries), most)
            for entry in written:
                entries[entry["file"]] = entry
                check_broken(_broken_of(entries), most)
        manifest = _manifest(plan, [entries[s.file] for s in _shards(len(source), shards, name)], on_broken)
        check_any(manifest["records"], _broken_of(entries))
        write_json(folder / MANIFEST, manifest)
    shutil.rmtree(folder / WORK)
    return manifest


def verify(folder: str | os.PathLike, *, workers: int = 1, progress: bool = True) -> list[str]:
    """Reads every record of a finished pack again; returns what is damaged, one line each.

    Sizes and sha256 of the shards, the checksum of every record and the header of every image.
    Raises FileNotFoundError or ValueError when `folder` holds no finished pack.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        unfinished = (
            "an unfinished pack: run the command that began it again" if (folder / WORK).is_dir() else "no pack"
        )
        raise FileNotFoundError(f"{folder} holds {unfinished} ({MANIFEST} is missing)")
    manifest = _load(folder / MANIFEST)
    job = _VerifyJob(folder, ImageOptions(**manifest["images"]))
    with tqdm(total=manifest["records"], unit="img", desc=f"verify {folder.name}", disable=not progress) as bar:
        found = list(itertools.chain(*_each(job, manifest["shards"], workers, bar)))
    known = {entry["file"] for entry in manifest["shards"]}
    extra = sorted({p.name for p in folder.glob("*.array_record")} - known)
    return sorted(found) + [f"{name}: not in the manifest" for name in extra]


# ---- what is to be made


def _plan(source, kind, path, source_options, shards, name, images: ImageOptions, keep: bool) -> dict:
    if not 1 <= shards <= len(source):
        raise ValueError(f"shards must be between 1 and the {len(source)} records of the source, got {shards}")
    if not name or set(name) & set("/\\*?[]{} ") or name.startswith("."):
        raise ValueError(f"name {name!r} must make a plain file name")
    plan = {
        "format": FORMAT,
        "name": name,
        "shard_count": shards,
        "images": asdict(images),
        "broken_images": "kept" if keep else "left out",
        "source": {
            "kind": kind,
            "path": path,
            "options": dict(source_options or {}),
            "records": len(source),
            "digest": source.digest,
        },
    }
    if images.max_side:  # other versions may encode the same pixels differently
        plan["encoder"] = {package: version(package) for package in ("pillow", "simplejpeg")}
    return json.loads(json.dumps(plan))


def _roots(path: str) -> tuple[str, ...]:
    """What names of records may begin with: the path, if it is a folder, else the folder that its pattern is in."""
    static = re.split(r"[*?\[{]", path)[0]
    return (path.rstrip("/") + "/", static[: static.rfind("/") + 1]) if path else ()


def _shards(records: int, count: int, name: str) -> Iterator[Shard]:
    digits = max(5, len(str(count)))
    for i in range(count):
        file = f"{name}-{i:0{digits}d}-of-{count:0{digits}d}.array_record"
        yield Shard(file, i * records // count, (i + 1) * records // count)


def _manifest(plan: dict, entries: list[dict], policy: str) -> dict:
    kinds = Counter(b["kind"] for entry in entries for b in entry["broken"])
    totals = {key: sum(entry[key] for entry in entries) for key in ("records", "encoded_anew", "bytes")}
    return {**plan, **totals, "broken": {"policy": policy, **dict(sorted(kinds.items()))}, "shards": entries}


def _broken_of(entries: Mapping[str, dict]) -> list[dict]:
    return [b for entry in entries.values() for b in entry["broken"]]


# ---- what is there already


def _load(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
        if found["format"] != FORMAT:
            raise ValueError(f"its format is {found['format']!r}, this code knows {FORMAT!r}")
        if outside := [e["file"] for e in found.get("shards", []) if not is_plain_name(e["file"])]:
            raise ValueError(f"it names {outside[0]!r}, which is no file of its folder")
        return found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{path}: not of a pack ({type(e).__name__}: {e})") from e


def _read_manifest(folder: Path, plan: dict) -> dict | None:
    """The manifest of the same pack, if it is finished and its shards are there."""
    if not (folder / MANIFEST).is_file():
        return None
    found = _load(folder / MANIFEST)
    _check_same(folder, found, plan)
    return found if all(_is_there(folder, entry) for entry in found["shards"]) else None


def _is_there(folder: Path, entry: dict) -> bool:
    path = folder / entry["file"]
    return is_plain_name(entry["file"]) and path.is_file() and path.stat().st_size == entry["bytes"]


def _check_same(folder: Path, old: dict, plan: dict) -> None:
    before, now = _fields(_content(old)), _fields(_content(plan))
    differences = [
        f"{field}={before.get(field)!r} (now {value!r})" for field, value in now.items() if before.get(field) != value
    ]
    if differences:
        raise ValueError(f"{folder} holds another pack; choose another folder or go back to: {'; '.join(differences)}")


def _content(plan: dict) -> dict:
    """Without what may be another for the same records: where they lie and how they are read."""
    source = {key: value for key, value in plan["source"].items() if key != "path"}
    source["options"] = {key: value for key, value in source["options"].items() if key not in _HOW}
    return {**plan, "source": source}


def _fields(plan: dict) -> dict[str, object]:
    """Two levels in one: source.kind, images.max_side, ..."""
    return {
        f"{key}.{field}" if field else key: inner
        for key, value in plan.items()
        for field, inner in (value.items() if isinstance(value, dict) else [("", value)])
    }


@contextlib.contextmanager
def _claimed(folder: Path, plan: dict) -> Iterator[dict[str, dict]]:
    """Holds the folder for this process; gives the entries of the shards that are finished."""
    work = folder / WORK
    if folder.exists() and not work.exists() and not (folder / MANIFEST).exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no pack: choose another folder")
    work.mkdir(parents=True, exist_ok=True)
    with alone(work / "lock", f"another process is packing into {folder}"):
        entries = _finished(folder)
        if entries and (work / "plan.json").exists():
            _check_same(folder, _load(work / "plan.json"), plan)
        stale = [p for p in work.glob("*.array_record.json") if p.name.removesuffix(".json") not in entries]
        for leftover in itertools.chain(stale, work.glob("*.partial"), folder.glob("*.partial")):
            leftover.unlink(missing_ok=True)
        write_json(work / "plan.json", plan)
        yield entries


def _finished(folder: Path) -> dict[str, dict]:
    """Entries of the shards that are there: of an unfinished pack, or of a finished one that has lost some."""
    entries = _load(folder / MANIFEST)["shards"] if (folder / MANIFEST).exists() else []
    entries += [json.loads(p.read_text()) for p in sorted((folder / WORK).glob("*.array_record.json"))]
    return {entry["file"]: entry for entry in entries if _is_there(folder, entry)}


# ---- workers


class _WriteJob:
    """Called with a shard: writes it, notes its entry, returns that."""

    def __init__(
        self, source: Source, images: ImageOptions, folder: Path, roots: tuple[str, ...], keep: bool, most: int
    ):
        self._source, self._images, self._folder = source, images, folder
        self._roots, self._keep, self._most = roots, keep, most

    def __call__(self, shard: Shard, tick: Callable[[int], None]) -> dict:
        work = self._folder / WORK
        entry = write_shard(
            self._source,
            shard,
            self._images,
            self._folder,
            work / f"{shard.file}.{os.getpid()}.partial",
            roots=self._roots,
            keep_broken=self._keep,
            most_broken=self._most,
            tick=tick,
        )
        write_json(work / f"{shard.file}.json", entry)
        return entry


class _VerifyJob:
    """Called with the entry of a shard: returns what is damaged."""

    def __init__(self, folder: Path, images: ImageOptions):
        self._folder, self._images = folder, images

    def __call__(self, entry: dict, tick: Callable[[int], None]) -> list[str]:
        return find_damage(self._folder, entry, self._images, tick)


class _Stopped(Exception):
    """The work is no longer wanted."""


class _Worker:
    """What a worker shares with the process that watches it: records and bytes done, and whether to stop.

    No locks: one that a killed worker held would never be free again. Each worker counts in a place of its own.
    """

    current: "_Worker"

    def __init__(self, job: Callable, counters, stop, begun):
        self._job, self._counters, self._stop, self._begun = job, counters, stop, begun
        self._place = 0

    def begin(self) -> None:
        """Takes the next place of the counters."""
        with self._begun.get_lock():  # asked for by workers alone, which end together where one of them dies
            self._place, self._begun.value = self._begun.value, self._begun.value + 1

    def run(self, task):
        """The job's result; once one has failed, no other is begun."""
        if self._stop.value:
            raise _Stopped
        try:
            return self._job(task, self.tick)
        except BaseException:
            self._stop.value = 1
            raise

    def tick(self, size: int) -> None:
        self._counters[2 * self._place] += 1
        self._counters[2 * self._place + 1] += size
        if self._stop.value:
            raise _Stopped


def _begin(worker: _Worker) -> None:
    _Worker.current = worker
    worker.begin()


def _begin_process(worker: _Worker) -> None:
    _begin(worker)
    end_with_parent()


def _work(task):
    return _Worker.current.run(task)


def _each(job: Callable, tasks: Iterable, workers: int, bar: tqdm) -> Iterator:
    """Results of job(task, tick) as they come, over processes; the bar moves with every record."""
    context = multiprocessing.get_context("spawn")  # forked copies of threads and locks may hang
    counters, stop = context.RawArray("q", 2 * workers), context.RawValue("b", 0)
    worker = _Worker(job, counters, stop, context.Value("i", 0))
    arguments = {"max_workers": workers, "initargs": (worker,)}
    if workers == 1:
        pool: Executor = ThreadPoolExecutor(**arguments, initializer=_begin)
    else:
        pool = ProcessPoolExecutor(**arguments, initializer=_begin_process, mp_context=context)
    start, tasks = bar.n, iter(tasks)
    try:
        with _interrupts_later() as interrupted:
            pending = {_submit(pool, task) for task in itertools.islice(tasks, 2 * workers)}
            while pending:
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                if interrupted:
                    raise KeyboardInterrupt
                pending |= {_submit(pool, task) for task in itertools.islice(tasks, len(done))}
                bar.set_postfix_str(f"{sum(counters[1::2]) / 1e9:.2f} GB", refresh=False)
                bar.update(start + sum(counters[::2]) - bar.n)
                for future in done:
                    if not isinstance(future.exception(), _Stopped):  # the failure that stopped it comes too
                        yield future.result()
    except BrokenProcessPool as e:
        raise OSError(
            "a worker process died (out of memory?): run the same command again to go on, with fewer --workers"
        ) from e
    finally:
        stop.value = 1
        pool.shutdown(cancel_futures=True)


def _submit(pool: Executor, task) -> Future:
    """Processes that this starts inherit the signals that are blocked: Ctrl-C is for the first process alone."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_work, task)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _interrupts_later() -> Iterator[list]:
    """Ctrl-C only fills the list: raised while a process is being started, it would leave half of one behind."""
    interrupted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = signal.signal(signal.SIGINT, lambda number, _: interrupted.append(number))
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
