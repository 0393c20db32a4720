"""What the delegate takes is counted right where it does not take everything."""

import logging
import warnings

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("executorch", reason="the phone export needs `pip install eupe_jax[export]`")

from torch import nn  # noqa: E402

from convert import delegation, lowering  # noqa: E402
from eupe_jax.evals.pte import PteProgram  # noqa: E402


@pytest.fixture(scope="module")
def mixed() -> lowering.Lowered:
    """Two linear layers in two partitions: the native LayerNorm between them is never delegated."""
    network = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)).eval()
    return lowering.lower({"run": (network, (torch.zeros(5, 8),))}, constants={"words": ["a", "b"], "number": 2.5})


def test_operators_outside_are_listed_with_their_cost(mixed):
    found = mixed.delegation["run"]
    assert found["partitions"] == 2 and found["nodes_outside"] == 1
    ((name, cost),) = found["outside"].items()
    assert "native_layer_norm" in name
    written = 5 * 16 + 5 + 5  # the output, mean and reciprocal deviation of every row
    assert cost == {"count": 1, "flops": 0, "bytes": 4 * (5 * 16 + 2 * 16 + written)}
    assert found["flops"] == 2 * 5 * (8 * 16 + 16 * 4) and found["share_of_flops"] == 1
    assert 0 < found["share_of_nodes"] < 1
    assert mixed.planned_bytes["run"] >= 4 * (5 * 8 + 5 * 4)
    printed = delegation.lines(found)
    assert "2 partitions" in printed[0] and "native_layer_norm" in printed[1] and len(printed) == 2
    many = {f"aten.op{i}": cost for i in range(30)}
    assert len(delegation.lines(found | {"outside": many})) == 31  # every one


def test_too_few_flops_inside_are_refused(mixed):
    found = mixed.delegation["run"] | {"share_of_flops": 0.989, "outside": {"aten.bmm": {"flops": 7, "bytes": 8}}}
    with pytest.raises(delegation.DelegationError, match=r"run: .* only 98.9% .* less than 99%; outside are aten.bmm"):
        delegation.require(found, "run")
    with pytest.raises(delegation.DelegationError):
        delegation.require(found | {"share_of_flops": float("nan")}, "run")
    delegation.require(found | {"share_of_flops": 0.99}, "run")


def test_a_program_without_a_contract_says_so(mixed):
    with pytest.raises(ValueError, match="x.pte does not say how to feed it"):
        PteProgram(mixed.pte, "x.pte")


def test_only_the_exporter_is_silenced():
    logger = logging.getLogger("torch")
    before = logger.level
    with lowering.quiet():
        warnings.warn("from the exporter", stacklevel=1)
        assert logger.level == logging.ERROR
    assert logger.level == before
    with pytest.warns(UserWarning, match="ours"):
        warnings.warn("ours", stacklevel=1)
