"""Which resolution each model sees at a step (EUPE §3.1, stage 3).

Student and teachers "randomly select one scale from the pyramid independently". The choice is a pure function of
seed and step, so every host agrees and a resumed run makes the same choices. One size each (stages 1 and 2) is the
same code with nothing to choose.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

STREAM = 0x5CA1E  # separates these draws from others made with the same seed


@dataclass(frozen=True)
class Resolutions:
    """Side lengths in pixels for one step: every student's, and each teacher's as sorted (name, side) pairs."""

    student: int
    teachers: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        sides = {side for _, side in self.teachers}
        teachers = str(sides.pop()) if len(sides) == 1 else ",".join(f"{name}={side}" for name, side in self.teachers)
        return f"s{self.student}_t{teachers}"


def choose(seed: int, step: int, student: Sequence[int], teachers: Mapping[str, Sequence[int]]) -> Resolutions:
    """The resolutions of `step`: uniform, independent for the students and for every teacher."""
    rng = np.random.Generator(np.random.Philox(key=[seed, STREAM], counter=[0, 0, 0, step]))
    draw = lambda sizes: int(sizes[rng.integers(len(sizes))])  # noqa: E731
    return Resolutions(draw(student), tuple((name, draw(teachers[name])) for name in sorted(teachers)))


def every(student: Sequence[int], teachers: Mapping[str, Sequence[int]]) -> list[Resolutions]:
    """Every combination that `choose` can return: what has to be compiled."""
    names = sorted(teachers)
    return [
        Resolutions(int(side), tuple(zip(names, map(int, sides), strict=True)))
        for side in student
        for sides in itertools.product(*(teachers[name] for name in names))
    ]
