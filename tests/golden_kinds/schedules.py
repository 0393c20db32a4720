"""The fixture of the dense heads' schedules, at the authors' settings."""

from pathlib import Path

import numpy as np

from eupe_jax.evals import depth, segmentation
from tests.golden_kinds.common import Fixture


def check_schedules(path: Path) -> None:
    """Learning rate and beta1 at the iterations given, the sum of all rates and the place of the highest: 1e-9."""
    fixture = Fixture(path)
    schedules = {"ade20k": segmentation.Settings().schedule(), "nyuv2": depth.Settings().schedule()}
    for name in fixture.meta["steps"]:
        schedule, iterations = schedules[name], fixture.outputs[f"{name}/iteration"]
        fixture.check(f"{name}/iteration", sorted(set(fixture.meta["steps"][name])), 0.0)
        rates = np.array([schedule.learning_rate(i) for i in range(schedule.total)])
        # relative: far into the decay the rates are tiny
        np.testing.assert_allclose(rates[iterations], fixture.outputs[f"{name}/lr"], rtol=1e-9, atol=0)
        fixture.check(f"{name}/lr", rates[iterations], 1e-12)
        fixture.check(f"{name}/beta1", [schedule.beta1(int(i)) for i in iterations], 1e-9)
        fixture.check(f"{name}/sum_of_lr", rates.sum(), 1e-9 * rates.sum())
        fixture.check(f"{name}/argmax_lr_iteration", rates.argmax(), 0.0)
    fixture.assert_all_checked()


KINDS = {"schedules": check_schedules}
