"""Which checkpoints are the best, by a scalar of the evaluations inside training."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence

import jax
from etils import epath
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers

from eupe_jax.files import write_whole

BETTER = {"max": 1.0, "min": -1.0}


def check_settings(settings: ConfigDict, evaluations: Iterable[str]) -> None:
    """What can be seen to be wrong with which checkpoints `config.checkpoint` keeps, before training.

    Args:
      evaluations: names of the evaluations inside training.

    Raises:
      ValueError: names the field and the fix.
    """
    for field, least in (("keep", 1), ("keep_every", 0), ("keep_best", 0)):
        if settings[field] < least:
            raise ValueError(f"checkpoint.{field} must be at least {least}, got {settings[field]}")
    if not settings.keep_best:
        return
    if settings.best_mode not in BETTER:
        raise ValueError(f"checkpoint.best_mode is {settings.best_mode!r}: use one of {', '.join(BETTER)}")
    names = sorted(evaluations)
    if not names:
        raise ValueError(
            "checkpoint.keep_best needs evaluations inside training (config.evals) to tell what is best: add one, "
            "or set keep_best to 0"
        )
    name, _, scalar = settings.best_metric.partition("/")
    if name not in names or not scalar:
        raise ValueError(
            f"checkpoint.best_metric is {settings.best_metric!r}: it must be EVALUATION/SCALAR, as metrics.jsonl has "
            f"it, with EVALUATION one of {', '.join(names)}"
        )


class Best(checkpoint_managers.PreservationPolicy):
    """Preserves the checkpoints whose evaluation gave the best values of one scalar; of equal ones, the newer.

    Values stand in a file beside the checkpoints, so that a run that resumes knows them. The first host, which alone
    evaluates and deletes, keeps it.
    """

    def __init__(self, path: epath.Path, settings: ConfigDict) -> None:
        """Raises ValueError where the file, of this run so far, is damaged."""
        self._path, self._count, self._metric = path, settings.keep_best, settings.best_metric
        self._sign = BETTER[settings.best_mode]
        self._values = _read(path)

    def note(self, step: int, scalars: Mapping[str, float]) -> bool:
        """Takes the scalars {"EVALUATION/SCALAR": value} of the checkpoint of `step`; whether it is the best so far.

        Raises:
          ValueError: the evaluation of `best_metric` gives no such scalar; names what it gives.
          OSError: the file cannot be written.
        """
        evaluation = self._metric.partition("/")[0] + "/"
        given = sorted(name for name in scalars if name.startswith(evaluation))
        if given and self._metric not in given:
            raise ValueError(
                f"checkpoint.best_metric is {self._metric!r}, which the evaluation does not give: "
                f"use one of {', '.join(given)}"
            )
        if not given or jax.process_index() != 0:
            return False
        values = self._values.setdefault(self._metric, {})
        values[step] = float(scalars[self._metric])
        finite = {name: {s: v for s, v in held.items() if math.isfinite(v)} for name, held in self._values.items()}
        write_whole(self._path, json.dumps(finite, indent=1) + "\n")
        return self._ranked(values)[:1] == [step]

    def should_preserve(
        self, checkpoints: Sequence, *, context: checkpoint_managers.PreservationContext
    ) -> Sequence[bool]:
        """For every checkpoint, oldest first; called by Orbax."""
        there = {checkpoint.step for checkpoint in checkpoints}
        values = self._values.get(self._metric, {})
        best = self._ranked({step: value for step, value in values.items() if step in there})[: self._count]
        return [checkpoint.step in best for checkpoint in checkpoints]

    def _ranked(self, values: Mapping[int, float]) -> list[int]:
        """Steps, the best first; a value that is not finite is none."""
        finite = {step: value for step, value in values.items() if math.isfinite(value)}
        return sorted(finite, key=lambda step: (self._sign * finite[step], step), reverse=True)


def _read(path: epath.Path) -> dict[str, dict[int, float]]:
    try:
        found = json.loads(path.read_text())
        return {str(name): {int(step): float(v) for step, v in held.items()} for name, held in found.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): remove it; the best checkpoints are then told by evaluations to come"
        ) from None
