"""What an evaluation leaves in its folder: metrics.json, one CSV a table, PNG pictures, TensorBoard events.

metrics.json is written last and renamed into place: where it exists, the evaluation is complete.
"""

import contextlib
import csv
import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from eupe_jax.evals.interface import Result
from eupe_jax.files import write_whole
from eupe_jax.training.events import Events

METRICS = "metrics.json"
# Two results that agree in these are one.
IDENTITY = ("eval", "fingerprint", "data", "settings", "teachers")


def write(folder: epath.PathLike, result: Result, header: Mapping[str, Any], step: int = 0) -> None:
    """Writes a result; `header` says what was measured on what and goes into metrics.json beside the figures."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "metrics.csv", _csv([{"metric": k, "value": v} for k, v in result.metrics.items()]))
    for name, rows in result.tables.items():
        write_whole(folder / f"{name}.csv", _csv(rows))
    for name, picture in result.images.items():
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(picture, np.uint8)).save(buffer, format="PNG")
        write_whole(folder / f"{name}.png", buffer.getvalue())
    events = folder / "tensorboard"
    if events.exists():
        events.rmtree()
    with contextlib.closing(Events(events, step)) as writer:
        writer.write(step, {f"{header['eval']}/{name}": value for name, value in result.metrics.items()})
        for name, picture in result.images.items():
            writer.image(step, f"{header['eval']}/{name}", picture)
    content = {**header, "metrics": result.metrics, "details": result.details}
    write_whole(folder / METRICS, json.dumps(content, indent=2, default=_plain).encode())


def read(folder: epath.PathLike) -> dict[str, Any] | None:
    """What `write` left in metrics.json, None where nothing complete is there.

    Raises:
      ValueError: the file is damaged.
    """
    path = epath.Path(folder) / METRICS
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        if not {"eval", "encoder", "metrics"} <= content.keys():
            raise ValueError("no eval, encoder or metrics in it")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not the result of an evaluation: {error}") from None
    return content


def pictures(folder: epath.PathLike) -> dict[str, np.ndarray]:
    """The pictures that `write` left, uint8 RGB [H, W, 3] by name."""
    found = {}
    for path in sorted(epath.Path(folder).glob("*.png")):
        with Image.open(io.BytesIO(path.read_bytes()), formats=("PNG",)) as picture:
            found[path.stem] = np.asarray(picture.convert("RGB"))
    return found


def same(found: Mapping[str, Any], header: Mapping[str, Any]) -> bool:
    """Whether a result is of the very evaluation that `header` describes."""
    wanted = json.loads(json.dumps({key: header[key] for key in IDENTITY}, default=_plain))
    return wanted == {key: found.get(key) for key in IDENTITY}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} in a result cannot be written as JSON")


def _csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue().encode()
