"""Weight files by other hands, read one tensor at a time: .safetensors, shards of it, and PyTorch's .pt / .pth.

Files are mapped into memory: opening one costs its header, and a tensor is read when it is asked for. Nothing in a file
is believed before it is checked, and no code in it is ever run.
"""

import argparse
import collections
import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

logger = logging.getLogger(__name__)

FORMAT = "eupe_jax.weights/1"
SUFFIXES = (".safetensors", ".pt", ".pth")
INDEX_SUFFIX = ".safetensors.index.json"
# What training scripts wrap a state_dict in.
WRAPPERS = ("state_dict", "weights", "model", "teacher")
_KINDS = {"F": ("float", (16, 32, 64)), "I": ("int", (8, 16, 32, 64)), "U": ("uint", (8, 16, 32, 64))}
_DTYPES = {f"{kind}{bits}": np.dtype(f"{name}{bits}") for kind, (name, sizes) in _KINDS.items() for bits in sizes}
_DTYPES |= {"BF16": np.dtype(ml_dtypes.bfloat16), "BOOL": np.dtype(bool)}
_UNREAD = np.dtype("V1")  # stands for what no encoder has: 8-bit floats, complex, quantised or repeated numbers


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a file, read by `np.asarray`. Values that are not finite are noted in the file's `non_finite`."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    _load: Callable[[], np.ndarray] = field(repr=False)
    _non_finite: list[str] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self._load()
        if self.name not in self._non_finite and not np.isfinite(array).all():
            self._non_finite.append(self.name)
        return array if dtype is None else array.astype(dtype, copy=False)


class WeightFile(Mapping[str, LazyTensor]):
    """The tensors of a file, or of the shards in a folder, by name. Close it, or use it as a context manager.

    Attributes:
      path: what was opened.
      files: the files the tensors are in.
      metadata: strings that a .safetensors file, or the index of shards, carries.
      non_finite: names of the tensors that were read and hold values that are not finite.
    """

    def __init__(self, path: Path, files: list[Path]) -> None:
        self.path = path
        self.files = files
        self.metadata: dict[str, Any] = {}
        self.non_finite: list[str] = []
        self._tensors: dict[str, LazyTensor] = {}
        self._open = contextlib.ExitStack()

    def __getitem__(self, name: str) -> LazyTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __enter__(self) -> "WeightFile":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files; tensors that were not read are gone."""
        self._tensors = {}
        self._open.close()

    @functools.cached_property
    def sha256(self) -> dict[str, str]:
        """SHA-256 of every file, by file name; reads them once, from start to end."""
        digests = {}
        for path in self.files:
            with path.open("rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        return digests

    def require_finite(self) -> None:
        """Raises ValueError when a tensor that was read holds NaN or infinity; names them all."""
        if self.non_finite:
            count, names = len(self.non_finite), ", ".join(self.non_finite)
            raise ValueError(f"{self.path}: {count} tensors are not all finite numbers: {names}")

    def _add(self, name: str, shape: tuple[int, ...], dtype: np.dtype, load: Callable[[], np.ndarray]) -> None:
        self._tensors[name] = LazyTensor(name, shape, dtype, load, self.non_finite)


def is_weights(path: str | os.PathLike) -> bool:
    """Whether `path` is to be opened by `open_weights`: named like a weights file, or a folder that holds some."""
    path = Path(path)
    return path.name.endswith((*SUFFIXES, INDEX_SUFFIX)) or (path.is_dir() and any(path.glob("*.safetensors")))


def open_weights(path: str | os.PathLike) -> WeightFile:
    """Opens weights for reading tensor by tensor.

    Args:
      path: .safetensors; .safetensors.index.json (shards beside it); .pt or .pth, where a state_dict may lie under one
        of `WRAPPERS`; or a folder with model.safetensors, an index, or one .safetensors file.

    Raises:
      FileNotFoundError: nothing there. ValueError: remote, broken, lying about itself, or no state_dict.
    """
    if "://" in os.fspath(path):
        raise ValueError(f"{path} is remote, but weight files are mapped into memory: copy it to this machine first")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no weights file at {path}")
    source = _of_folder(path) if path.is_dir() else path
    if source.name.endswith(INDEX_SUFFIX):
        return _open_shards(path, source)
    if source.suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected a checkpoint folder, .safetensors, .pt or .pth")
    weights = WeightFile(path, [source])
    with _closing_on_error(weights):
        if source.suffix == ".safetensors":
            weights.metadata = _add_safetensors(weights, source)
        else:
            _add_torch(weights, source)
    return weights


def sidecar(path: Path) -> Path:
    """Where the description of a .pt file lies."""
    return path.with_name(path.name + ".json")


def digest(tensors: Mapping[str, Any]) -> str:
    """SHA-256 over names, shapes and float32 values, whatever the container: equal weights, equal digest."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        array = np.asarray(tensors[name], np.float32, order="C")
        sha.update(f"{name} {list(array.shape)}\n".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def read_description(weights: WeightFile) -> dict[str, Any] | None:
    """What `convert/to_torch.py` wrote about the encoder and how to feed it; None for a file of other origin.

    Raises:
      ValueError: it is broken, or belongs to other weights.
    """
    header = weights.metadata.get("eupe_jax")
    if header is None and weights.path.is_file() and sidecar(weights.path).is_file():
        header = sidecar(weights.path).read_text(errors="replace")
    if header is None:
        return None
    try:
        description = json.loads(header)
        if description["format"] != FORMAT:
            raise ValueError(f"format {description['format']!r}, expected {FORMAT!r}")
        if not isinstance(description["model"], str) or not isinstance(description["overrides"], dict):
            raise ValueError("model must be a name and overrides a dict")
        side = description["resolution"]
        if not isinstance(side, int) or side <= 0:
            raise ValueError(f"resolution {side!r}")
        for name in ("mean", "std"):
            values = description[name]
            if len(values) != 3 or not all(math.isfinite(v) and (v > 0 or name == "mean") for v in values):
                raise ValueError(f"{name} {values!r}")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"metadata of {weights.path} is broken: {error}") from None
    if not all(np.issubdtype(t.dtype, np.floating) or t.dtype == ml_dtypes.bfloat16 for t in weights.values()):
        raise ValueError(f"{weights.path} holds tensors that are not floating-point numbers")
    found = digest(weights)
    weights.require_finite()
    if description.get("weights_sha256", "") != found:
        raise ValueError(
            f"{weights.path} was changed: its weights are not those whose weights_sha256 its metadata gives"
        )
    return description


def _of_folder(folder: Path) -> Path:
    """The one weights file, or index of shards, that a folder stands for."""
    if (folder / "model.safetensors").is_file():
        return folder / "model.safetensors"
    found = sorted(folder.glob("*" + INDEX_SUFFIX)) or sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "no .safetensors file"
        raise ValueError(f"{folder} holds {names}: name one weights file, or a folder with one or with an index")
    return found[0]


@contextlib.contextmanager
def _closing_on_error(weights: WeightFile) -> Iterator[None]:
    try:
        yield
    except BaseException:
        weights.close()
        raise


def _add_safetensors(weights: WeightFile, path: Path) -> dict[str, str]:
    """Adds the tensors of one file; returns its metadata. The library checks all that a header says but repeats."""
    try:
        file = weights._open.enter_context(safetensors.safe_open(path, framework="numpy"))
        names, metadata = list(file.keys()), file.metadata() or {}
        slices = {name: file.get_slice(name) for name in names}
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as weights: {_first_line(error)}") from None
    with path.open("rb") as header:
        _parse_json(header.read(int.from_bytes(header.read(8), "little")), path)
    for name, part in slices.items():
        if name in weights:
            raise ValueError(f"{path}: {name} is in another shard as well")
        load = functools.partial(file.get_tensor, name)
        weights._add(name, tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), _UNREAD), load)
    return metadata


def _open_shards(path: Path, index: Path) -> WeightFile:
    """The shards that an index lists: files beside it that hold exactly the tensors it says they hold."""
    content = _parse_json(index.read_bytes(), index)
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shard_of, dict) or not shard_of or not all(isinstance(s, str) for s in shard_of.values()):
        raise ValueError(f"{index} is no index of shards: it needs a weight_map from tensor names to file names")
    shards = sorted(set(shard_of.values()))
    for shard in shards:
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{index} names {shard!r}: shards must be .safetensors files in the folder of the index")
        if not (index.parent / shard).is_file():
            raise FileNotFoundError(f"{index} names {shard!r}, which is not in its folder")
    weights = WeightFile(path, [index.parent / shard for shard in shards])
    weights.metadata = content["metadata"] if isinstance(content.get("metadata"), dict) else {}
    with _closing_on_error(weights):
        problems = []
        for shard in shards:
            before = set(weights)
            _add_safetensors(weights, index.parent / shard)
            held, listed = set(weights) - before, {name for name, s in shard_of.items() if s == shard}
            problems += [f"{shard} lacks {name}" for name in sorted(listed - held)]
            problems += [f"{shard} holds {name}, which the index does not say" for name in sorted(held - listed)]
        if problems:
            raise ValueError(f"{index} and its shards differ: {'; '.join(problems)}")
    return weights


def _add_torch(weights: WeightFile, path: Path) -> None:
    """Adds the tensors of a state_dict saved by PyTorch."""
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"reading {path} needs PyTorch: pip install 'eupe_jax[export]', or convert the file to .safetensors"
        ) from error
    mapped = zipfile.is_zipfile(path)
    try:
        if mapped:
            _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old ways to write the file, which its reader cannot change
            # Command-line arguments, which training scripts like to save along, are plain attributes.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        reason = _first_line(error)
        if "weights only" in reason.lower() or "weights_only" in reason:
            reason = "it is damaged, or holds more than tensors; code in a file is never run"
        raise ValueError(f"{path} cannot be read as weights: {reason}") from None
    if not mapped:
        logger.warning("%s is in PyTorch's format from before 1.6 and was read into memory whole", path)
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            logger.info("%s: the state_dict is its %r; the file also holds %s", path, key, sorted(set(content) - {key}))
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(t, torch.Tensor) for t in content.values()):
        raise ValueError(f"{path} is not a flat dict of tensors; save the bare state_dict of the backbone")
    for name, tensor in content.items():
        if not isinstance(name, str):
            raise ValueError(f"{path}: {name!r} is no name of a tensor")
        weights._add(name, tuple(tensor.shape), _torch_dtype(tensor), functools.partial(_torch_array, tensor))


def _check_archive(path: Path) -> None:
    """Refuses an archive that PyTorch did not write: it stores tensors as they are, to be mapped into memory.
    Compressed ones would be taken for numbers, or be larger than any memory.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if packed := [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]:
        raise ValueError(f"{packed[0]} is compressed in it, which PyTorch never does; save it again with torch.save")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("what it holds is said to be larger than the file")


def _torch_dtype(tensor: Any) -> np.dtype:
    import torch

    if tensor.dtype == torch.bfloat16:
        dtype = np.dtype(ml_dtypes.bfloat16)
    else:
        dtype = np.dtype(getattr(np, str(tensor.dtype).removeprefix("torch."), _UNREAD))
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    # A view may repeat a few numbers without end.
    whole = plain and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    return dtype if whole else _UNREAD


def _torch_array(tensor: Any) -> np.ndarray:
    """A view of a tensor: no copy."""
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # numpy has no such type of its own
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _parse_json(content: bytes, path: Path) -> Any:
    """JSON in which no object says the same thing twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated = [name for name, times in collections.Counter(name for name, _ in pairs).items() if times > 1]
        if repeated:
            raise ValueError(f"it repeats {', '.join(repeated)}")
        return dict(pairs)

    try:
        return json.loads(content, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as weights: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
