"""The compiled programs that tests of the estimator read: tests/fixtures/hlo, made by tests/fixtures/make_hlo.py."""

import functools
import gzip

from eupe_jax.planning.costs import Estimate, estimate
from eupe_jax.sharding.chips import CHIPS, Chip
from tests.fixtures.make_hlo import FOLDER


@functools.cache
def hlo_text(name: str) -> str:
    return gzip.decompress((FOLDER / f"{name}.txt.gz").read_bytes()).decode()


def chip(name: str) -> Chip:
    return CHIPS.get(name.rsplit("_", 1)[-1], CHIPS["v5e"])


@functools.cache
def costs(name: str) -> Estimate:
    return estimate(hlo_text(name), chip(name))
