"""Collectives of compiled programs: kind, payload, group, network, overlap; and what they should not be."""

import collections
import dataclasses

import pytest

from eupe_jax.planning.collectives import (
    DCN_SECONDS,
    HOP_SECONDS,
    mesh_axes,
    replica_group,
    ring_seconds,
    whole_weight_all_reduces,
)
from eupe_jax.planning.costs import estimate
from eupe_jax.sharding.chips import CHIPS, on_slice
from tests.planning.programs import costs, hlo_text

WEIGHT = 1024 * 1024
V5E = CHIPS["v5e"]


def summary(name):
    """{(kind, network, overlapped): [(bytes, group, trips), ...]}"""
    found = collections.defaultdict(list)
    for c in costs(name).collectives:
        found[c.kind, c.network, c.overlapped].append((c.bytes, c.group_size, c.trips))
    return {key: sorted(values) for key, values in found.items()}


@pytest.mark.parametrize(
    "attributes, expected",
    [
        ("replica_groups={{0,4},{1,5}}, dimensions={0}", (0, 4)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}, dimensions={2}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'a','c'}", (0, 4)),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0','axis_1'}, to_apply=%add", tuple(range(8))),
        ("source_target_pairs={{0,4},{4,0}}", (0, 4)),
        ("replica_groups={}, to_apply=%add", tuple(range(8))),
    ],
)
def test_replica_groups_in_every_form(attributes, expected):
    assert replica_group(f"channel_id=3, {attributes}, use_global_device_ids=true", 8) == expected


def test_axes_of_a_group():
    mesh = {"data": 2, "fsdp": 4, "tensor": 1}
    assert mesh_axes((0, 1, 2, 3), mesh) == ("fsdp",)
    assert mesh_axes((0, 4), mesh) == ("data",)
    assert mesh_axes(range(8), mesh) == ("data", "fsdp")
    assert mesh_axes((0,), mesh) == () and mesh_axes((0, 8), mesh) == ()
    named = estimate(hlo_text("fsdp_gradient_v5e"), V5E, mesh=mesh).collectives
    assert {(c.kind, c.axes) for c in named} == {
        ("all-gather", ("fsdp",)), ("reduce-scatter", ("fsdp",)), ("all-reduce", ("data",))
    }  # fmt: skip


def test_seconds_of_a_ring():
    assert ring_seconds("all-gather", 8e9, 8, 1e9) == pytest.approx(7.0)
    assert ring_seconds("reduce-scatter", 8e9, 8, 1e9) == pytest.approx(7.0)
    assert ring_seconds("all-reduce", 8e9, 8, 1e9) == pytest.approx(14.0)
    # Eight pieces of 1 GB over 0, 1, 2, 3, 4, 3, 2 and 1 links of 0.5 GB/s, two at a device.
    assert ring_seconds("all-to-all", 8e9, 8, 1e9) == pytest.approx(16.0)
    assert ring_seconds("all-to-all", 8e9, 2, 1e9) == pytest.approx(4.0)
    assert ring_seconds("collective-permute", 8e9, 8, 1e9) == pytest.approx(16.0)  # one of the two links
    assert ring_seconds("all-gather", 8e9, 1, 1e9) == 0.0


def test_a_gather_that_the_compiler_gave_up_hiding_is_exposed():
    """It still carries the name that it had as an asynchronous one."""
    assert "async_collective_name" in hlo_text("gather_v5e")
    assert summary("gather_v5e") == {("all-gather", "ici", False): [(2 * WEIGHT, 4, 6)]}
    (gather,) = costs("gather_v5e").collectives
    seconds = 6 * (0.75 * 2 * WEIGHT / V5E.ici_bandwidth + 2 * HOP_SECONDS)
    assert gather.seconds == gather.exposed_seconds == pytest.approx(seconds)
    assert costs("gather_v5e").exposed_seconds == pytest.approx(seconds)


def test_fsdp_gathers_scatters_and_sums():
    """One gather forward and one backward, one scatter a layer; an asynchronous one is one, though three fusions."""
    assert summary("fsdp_gradient_v5e") == {
        ("all-gather", "ici", False): [(2 * WEIGHT, 4, 6)],
        ("all-gather", "ici", True): [(2 * WEIGHT, 4, 6)],
        ("reduce-scatter", "ici", False): [(2 * WEIGHT, 4, 6)],
        ("all-reduce", "ici", False): [(2 * WEIGHT / 4, 2, 6)],
    }
    for chip, fsdp in (("v5p", 2), ("v6e", 4)):  # nothing is asynchronous unasked
        assert summary(f"fsdp_gradient_{chip}") == {
            ("all-gather", "ici", False): [(2 * WEIGHT, fsdp, 6)] * 2,
            ("reduce-scatter", "ici", False): [(2 * WEIGHT, fsdp, 6)],
            ("all-reduce", "ici", False): [(2 * WEIGHT / fsdp, 2, 6)],
        }


@pytest.mark.parametrize("chip, fsdp", [("v5p", 2), ("v6e", 4)])
def test_collectives_that_were_asked_to_hide_are_overlapped(chip, fsdp):
    """The compiler hides the gather of the backward pass; nothing covers the one that the forward pass waits for."""
    assert summary(f"fsdp_gradient_hidden_{chip}") == {
        ("all-gather", "ici", False): [(2 * WEIGHT, fsdp, 6)],
        ("all-gather", "ici", True): [(2 * WEIGHT, fsdp, 6)],
        ("reduce-scatter", "ici", False): [(2 * WEIGHT, fsdp, 6)],
        ("all-reduce", "ici", False): [(2 * WEIGHT / fsdp, 2, 6)],
    }
    hidden, plain = costs(f"fsdp_gradient_hidden_{chip}"), costs(f"fsdp_gradient_{chip}")
    assert hidden.exposed_seconds < plain.exposed_seconds


def test_one_of_each_kind():
    """The compiler pads what it scatters to whole tiles and puts the pieces right with a small permutation."""
    found = summary("explicit_collectives_v5e")
    assert found["all-gather", "ici", False] == [(4 * 4096 * 1024, 4, 1)]
    assert found["all-reduce", "ici", False] == [(4 * 1024 * 1024, 2, 1)]
    ((payload, group, trips),) = found["reduce-scatter", "ici", False]
    assert 4 * 4096 * 1024 <= payload <= 1.01 * 4 * 4096 * 1024 and (group, trips) == (4, 1)


def test_several_gradients_in_one_all_reduce():
    assert summary("replicated_gradients_v5e") == {("all-reduce", "ici", False): [(3 * 2 * WEIGHT, 8, 1)]}
    (reduce,) = costs("replicated_gradients_v5e").collectives
    assert len(reduce.shapes) == 3


def test_between_slices_each_device_sends_its_part():
    """Scatter inside a slice, sum between slices, gather inside."""
    assert summary("replicated_gradients_slices") == {
        ("reduce-scatter", "ici", False): [(2 * WEIGHT, 8, 1)] * 3,
        ("all-reduce", "dcn", True): [(2 * WEIGHT / 8, 2, 1)] * 3,
        ("all-gather", "ici", False): [(2 * WEIGHT, 8, 1)] * 3,
    }
    between = [c for c in costs("replicated_gradients_slices").collectives if c.network == "dcn"]
    for c in between:
        assert c.seconds == pytest.approx(2 * WEIGHT / 8 / V5E.dcn_bandwidth + DCN_SECONDS)
        assert 0 < c.exposed_seconds <= c.seconds
    total = summary("fsdp_gradient_slices")["all-reduce", "dcn", True]
    assert sum(bytes_ * trips for bytes_, _, trips in total) == 6 * 2 * WEIGHT / 8


def test_all_reduces_of_whole_weights_are_found():
    """Cut over every device of a slice, weights are gathered but their gradients are not scattered."""
    weights = [(6, 1024, 1024)]
    for name in ("fsdp_gradient_v5e", "fsdp_gradient_v5p", "fsdp_gradient_v6e", "fsdp_gradient_slices"):
        assert whole_weight_all_reduces(costs(name).collectives, weights) == []
    (found,) = whole_weight_all_reduces(costs("fsdp_gradient_whole_v5e").collectives, weights)
    assert (found.kind, found.bytes, found.trips, found.group_size) == ("all-reduce", 2 * WEIGHT, 6, 8)
    assert whole_weight_all_reduces([found], [(1024, 512), (1024,)]) == []
    (several,) = whole_weight_all_reduces(costs("replicated_gradients_v5e").collectives, weights)
    assert len(several.shapes) == 3


@pytest.mark.parametrize(
    "dims, found",
    [
        ((768, 2304), True), ((2304, 768), True), ((12, 768, 2304), True), ((1, 768, 2304), True),
        ((768, 3, 12, 64), True), ((768 * 2304,), True), ((11, 768, 2304), True), ((11, 768, 3, 768), True),
        ((13, 768, 2304), False), ((768, 144), False), ((768, 768), False), ((2304,), False), ((), False),
    ],
)  # fmt: skip
def test_a_whole_weight_is_found_however_it_was_reshaped(dims, found):
    (reduce,) = whole_weight_all_reduces(costs("fsdp_gradient_whole_v5e").collectives, [(6, 1024, 1024)])
    reduce = dataclasses.replace(reduce, shapes=(dims,))
    assert bool(whole_weight_all_reduces([reduce], [(12, 768, 2304)])) is found
    small = dataclasses.replace(reduce, shapes=((64, 16),))
    assert whole_weight_all_reduces([small], [(32, 32)]) == []  # as many elements, and nothing else in common


def test_a_parameter_that_every_device_holds_is_not_taken_for_another_of_as_many_elements():
    (reduce,) = whole_weight_all_reduces(costs("fsdp_gradient_whole_v5e").collectives, [(6, 1024, 1024)])
    embedding = dataclasses.replace(reduce, shapes=((768,), (16, 16, 3, 768)))
    assert whole_weight_all_reduces([embedding], [(12, 768, 768)]) == [embedding]
    assert whole_weight_all_reduces([embedding], [(12, 768, 768)], held=[(16, 16, 3, 768)]) == []


def test_an_axis_that_is_no_ring_halves_the_bandwidth():
    for name, share in (
        ("v5e:16x16", 1), ("v5e:8x16", 0.5), ("v6e:4x4", 0.5), ("v5p:4x4x8", 1), ("v5p:2x4x4", 0.5), ("v5e:1x1", 1),
    ):  # fmt: skip
        chip = CHIPS[name.split(":")[0]]
        assert on_slice(chip, name).ici_bandwidth == share * chip.ici_bandwidth


def test_a_sum_of_shards_is_no_whole_weight_although_another_has_its_shape():
    """1024 x 256 is what a device keeps of 1024 x 1024, summed over data; another weight may be as large whole."""
    shards = [(1024, 256)]
    mesh = {"data": 2, "fsdp": 4}
    assert len(whole_weight_all_reduces(costs("fsdp_gradient_v5e").collectives, shards)) == 1  # axes unknown
    named = estimate(hlo_text("fsdp_gradient_v5e"), V5E, mesh=mesh).collectives
    assert whole_weight_all_reduces(named, shards) == []
    named = estimate(hlo_text("fsdp_gradient_whole_v5e"), V5E, mesh={"data": 1, "fsdp": 8}).collectives
    assert len(whole_weight_all_reduces(named, [(6, 1024, 1024)])) == 1
