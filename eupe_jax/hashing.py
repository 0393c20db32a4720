"""Digests of files, for whatever records what it was made from."""

import hashlib
import os

from etils import epath


def sha256_file(path: str | os.PathLike) -> str:
    """Hex sha256 of a file's bytes, local or in a bucket."""
    with epath.Path(path).open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
