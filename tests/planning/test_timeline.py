"""Transfers beside operations: what is waited for, and nothing else, costs time."""

import pytest

from eupe_jax.planning.timeline import Done, Loop, Run, Start, simulate


def run(*steps):
    outcome = simulate(steps, lambda seconds: seconds)
    return outcome.seconds, outcome.exposed


def test_a_transfer_hides_behind_operations_between_its_start_and_its_done():
    assert run(Start("a", "ici", 3.0, 0), Run(5.0), Done("a")) == (5.0, {})
    assert run(Start("a", "ici", 3.0, 0), Run(1.0), Done("a"), Run(1.0)) == (4.0, {0: 2.0})
    assert run(Run(1.0), Start("a", "ici", 3.0, 0), Done("a")) == (4.0, {0: 3.0})


def test_transfers_of_one_network_queue_and_those_of_two_do_not():
    both = lambda other: run(Start("a", "ici", 3.0, 0), Start("b", other, 3.0, 1), Run(2.0), Done("a"), Done("b"))  # noqa: E731
    assert both("ici") == (6.0, {0: 1.0, 1: 3.0})
    assert both("dcn") == (3.0, {0: 1.0})


def test_what_is_still_under_way_at_the_end_is_waited_for():
    assert run(Start("a", "copy", 3.0), Run(1.0)) == (3.0, {"copy": 2.0})


def test_a_loop_costs_its_trips():
    body = (Start("a", "ici", 3.0, 0), Run(1.0), Done("a"))
    assert run(Loop(body, 10), Run(1.0)) == (31.0, {0: 20.0})
    assert run(Loop((), 4)) == (0.0, {}) and run(Loop(body, 0)) == (0.0, {})
    assert run(Loop((Loop(body, 4), Run(2.0)), 5)) == (70.0, {0: 40.0})


def test_a_transfer_that_a_trip_starts_for_the_next_hides_behind_the_whole_trip():
    """Pipelined by the compiler: the first waits for a transfer from before the loop, the last leaves one behind."""
    body = (Done("a"), Start("a", "ici", 3.0, 0), Run(2.0))
    seconds, exposed = run(Start("a", "ici", 3.0, 0), Loop(body, 10), Done("a"))
    assert seconds == pytest.approx(33.0) and exposed == {0: pytest.approx(13.0)}
