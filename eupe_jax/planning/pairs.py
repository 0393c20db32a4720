"""Which (student, teacher) resolutions are compiled, and the step time of those that are not."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from eupe_jax.distill.resolutions import Resolutions, every
from eupe_jax.training.model_flops import StepFlops
from eupe_jax.training.pipeline import teacher_sizes

FEW = 3  # up to so many pairs are all compiled


def every_pair(config: ConfigDict) -> list[Resolutions]:
    """Every choice of resolutions that a run of this recipe may draw."""
    return every(config.student_resolutions, teacher_sizes(config))


def choose(config: ConfigDict, wanted: Sequence[str] = ()) -> list[Resolutions]:
    """The pairs to compile: those `wanted`, "all"; by default all where there are few, else the smallest, the largest,
    and the smallest student with the largest teachers.

    wanted: as `label` writes them, or "STUDENT:TEACHER" sides in pixels, where a teacher with one resolution keeps it,
      whatever TEACHER says.

    Raises:
      ValueError: no pair of this config.
    """
    pairs = every_pair(config)
    if list(wanted) == ["all"] or (not wanted and len(pairs) <= FEW):
        return pairs
    if not wanted:
        return list(dict.fromkeys(_corner(config, *picks) for picks in ((min, min), (max, max), (min, max))))
    return list(dict.fromkeys(pair for text in wanted for pair in _parse(config, pairs, text)))


def _corner(config: ConfigDict, student: Callable, teacher: Callable) -> Resolutions:
    """The pair of the smallest or largest (`min`, `max`) resolutions."""
    sides = sorted(teacher_sizes(config).items())
    return Resolutions(
        int(student(config.student_resolutions)), tuple((name, int(teacher(sizes))) for name, sizes in sides)
    )


def _parse(config: ConfigDict, pairs: Sequence[Resolutions], text: str) -> list[Resolutions]:
    if found := [pair for pair in pairs if label(pair) == text]:
        return found
    student, _, teacher = text.partition(":")
    found = _find(config, pairs, int(student), int(teacher)) if student.isdigit() and teacher.isdigit() else None
    if found is None:
        known = ", ".join(dict.fromkeys(label(pair) for pair in pairs))
        raise ValueError(f"--pairs={text}: this config has the pairs {known}")
    return [found]


def _find(config: ConfigDict, pairs: Sequence[Resolutions], student: int, side: int) -> Resolutions | None:
    free = {name for name, sides in teacher_sizes(config).items() if len(sides) > 1}
    for pair in pairs:
        sides = {s for name, s in pair.teachers if name in free} or {s for _, s in pair.teachers}
        if pair.student == student and (sides == {side} or (not free and side in sides)):
            return pair
    return None


def label(pair: Resolutions) -> str:
    """ "256:512", student first; several teachers' sides as "256:448+256"."""
    return f"{pair.student}:{'+'.join(str(side) for side in dict.fromkeys(side for _, side in pair.teachers))}"


def fit_seconds(known: Mapping[Resolutions, float], work: Mapping[Resolutions, StepFlops]) -> dict[Resolutions, float]:
    """Step times of every pair in `work` from those of the `known` ones.

    Seconds are taken to be c + a x (teachers' FLOPs) + b x (trained FLOPs), through the known pairs where these fix the
    three figures and no FLOP takes less than no time; else in proportion to model FLOPs, at the mean rate of the known.
    """

    def terms(pair: Resolutions) -> list[float]:
        return [1.0, sum(work[pair].teachers.values()) / 1e12, work[pair].trained / 1e12]

    rate = sum(known.values()) / sum(work[pair].per_image for pair in known)
    rows = np.array([terms(pair) for pair in known])
    solution, _, rank, _ = np.linalg.lstsq(rows, np.array(list(known.values())), rcond=None)
    plane = {pair: float(np.dot(terms(pair), solution)) for pair in work}
    if rank < 3 or min(solution[1:]) < 0 or min(plane.values()) <= 0:
        plane = {pair: rate * work[pair].per_image for pair in work}
    return plane | dict(known)
