"""What a bucket's folder holds, listed once: a million objects take a thousand calls, one after another."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from eupe_jax.data.sources.base import Refused
from eupe_jax.data.sources.index_cache import IndexCache, default_folder
from eupe_jax.data.sources.storage import File, forget_listings, list_files, stat

log = logging.getLogger(__name__)

_CHECKED = 16


def list_bucket(path: str, wanted: Callable[[str], bool], index_dir: str | None, relist: bool) -> list[File]:
    """`list_files` of a bucket's folder, kept in `index_dir` (default $XDG_CACHE_HOME/eupe_jax/listings).

    A listing that was kept counts while 16 of its objects, spread over it, have the size and etag they had; new objects
    alone do not show that way: `relist` lists again.
    """
    cache = IndexCache(partial(_listing, wanted=wanted), "listing of images", index_dir or default_folder("listings"))
    root = File(path, 0, "")  # the folder itself has no version
    if relist:
        cache.forget(root)
    files = _files(path, cache.table(cache.indices([root])[0]))
    if not _unchanged(files):
        log.info("%s: not as it was listed; listing it again", path)
        cache.forget(root)
        files = _files(path, cache.table(cache.indices([root])[0]))
    log.info("%s: %d objects as listed in %s; relist=True looks for new ones", path, len(files), cache.folder)
    return files


def _listing(root: File, wanted: Callable[[str], bool]) -> np.ndarray:
    rows = [
        (f.path[len(root.path) :].encode("utf-8", "surrogateescape"), f.size, f.version.encode())
        for f in list_files(root.path, wanted)
    ]
    widths = [max((len(r[i]) for r in rows), default=1) or 1 for i in (0, 2)]
    return np.array(rows, [("name", f"S{widths[0]}"), ("size", "<u8"), ("version", f"S{widths[1]}")])


def _files(path: str, table: np.ndarray) -> list[File]:
    return [
        File(path + name.decode("utf-8", "surrogateescape"), int(size), version.decode())
        for name, size, version in table
    ]


def _unchanged(files: list[File]) -> bool:
    def same(file: File) -> bool:
        try:
            return stat(file.path) == file
        except Refused:
            return False

    if files:
        forget_listings(files[0].path)
    chosen = [files[i] for i in sorted(set(np.linspace(0, len(files) - 1, min(_CHECKED, len(files))).astype(int)))]
    with ThreadPoolExecutor(_CHECKED) as pool:
        return all(pool.map(same, chosen))
