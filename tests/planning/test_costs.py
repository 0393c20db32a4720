"""Costs of compiled programs against closed forms: FLOPs and trips exact, bytes exact but for scalars."""

import dataclasses
import importlib.util

import pytest

from eupe_jax.planning.costs import ASSUMPTIONS, UNKNOWN_FACTOR, UNKNOWN_KERNEL_FACTOR, estimate
from eupe_jax.planning.hlo import HloError, parse
from eupe_jax.planning.kernel_calls import is_kernel, kernel_key, kernel_name
from eupe_jax.sharding.chips import CHIPS
from tests.fixtures import make_hlo
from tests.planning.programs import chip, costs, hlo_text

V5E = CHIPS["v5e"]
SCALARS = 300  # bytes of loop counters and constants in the small programs

# 7 x 7 window over 16 x 16 with a border of 3: along each axis 16 positions x 7 taps, less 2 x (1 + 2 + 3) outside.
DEPTHWISE = 2 * 8 * 384 * (16 * 7 - 12) ** 2
# 3 x 3 window, stride 2, border 1 on one side: 16 positions x 3 taps, less 1 outside, along each axis.
CONVOLUTION = 2 * 8 * 128 * 256 * (16 * 3 - 1) ** 2
ATTENTION = 2 * 2 * 8 * 12 * 261**2 * 64
PRODUCT = 2 * 1024**3
ROW_PRODUCT = 2 * 64 * 1024**2
KERNEL = 2 * 4 * 261**2 * 256

FLOPS = {
    "matmul": 2 * 512 * 1024 * 768,
    "precise": PRODUCT,
    "attention": ATTENTION,
    "convolution": CONVOLUTION,
    "depthwise": DEPTHWISE,
    "depthwise_gradient": DEPTHWISE,
    "elementwise": 0,
    "branches": 3 * PRODUCT,  # the longer branch
    "scan": 12 * PRODUCT,
    "nested_scan": 35 * PRODUCT,
    "scan_gradient": 3 * 6 * PRODUCT,
    "kernel": 7 * KERNEL,  # two products forward, five backward
    "gather": 6 * ROW_PRODUCT,
    "fsdp_gradient": 3 * 6 * ROW_PRODUCT,
    "fsdp_gradient_whole": 3 * 6 * ROW_PRODUCT,
    "fsdp_gradient_hidden": 3 * 6 * ROW_PRODUCT,
    "replicated_gradients": (3 + 2 + 3) * ROW_PRODUCT,  # the first layer needs no gradient of its input
    "explicit_collectives": 0,
}


@pytest.mark.parametrize("name", make_hlo.PROGRAMS)
def test_flops_are_exact(name):
    assert costs(name).flops == FLOPS[name.rsplit("_", 1)[0]]


# What each program reads and writes in HBM. Inputs that the compiler copies to VMEM ahead are read once, by the copy.
BYTES = {
    "matmul_v5e": 2 * (512 * 1024 + 1024 * 768 + 512 * 768),
    "precise_v5e": 4 * 3 * 1024**2,
    "elementwise_v5e": 2 * 4 * 64 * 261 * 384,  # 261 lanes lie in 384
    "attention_v5e": 4 * 2 * 8 * 12 * 64 * 384,  # q, k, v and the result; logits stay in VMEM
    "convolution_v5e": 2 * (8 * 32 * 32 * 128 + 9 * 128 * 256 + 8 * 16 * 16 * 256),
    "scan_v5e": 2 * (12 + 2) * 1024**2,  # every layer's weight once, its slice of the stack; activations in VMEM
    "nested_scan_v5e": 2 * (35 + 2) * 1024**2,
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_are_exact_but_for_scalars(name):
    assert BYTES[name] <= costs(name).hbm_bytes <= BYTES[name] + SCALARS * 35


def test_stacked_arrays_are_read_and_written_a_slice_a_time():
    """Six trips write six slices of activations and gradients: each stack once, not six times."""
    estimated = costs("scan_gradient_v5e")
    weights_twice = 2 * 2 * 6 * 1024**2
    assert weights_twice <= estimated.hbm_bytes <= weights_twice + 4 * 2 * 6 * 1024**2
    assert {o.trips for o in estimated.operations if o.kind == "matmul"} == {6}


def test_trips_and_paths():
    inner = [o for o in costs("nested_scan_v5e").operations if o.kind == "matmul"]
    assert [(o.trips, o.path, o.flops) for o in inner] == [(35, "5x/7x", PRODUCT)]


def test_time_of_an_operation_is_its_roofline_or_its_cycles():
    (add,) = costs("elementwise_v5e").operations
    assert add.roofline_seconds == pytest.approx(BYTES["elementwise_v5e"] / V5E.hbm_bandwidth)
    assert add.compiler_seconds == pytest.approx(add.cycles / V5E.clock_hz)
    assert add.compiler_seconds > add.roofline_seconds
    (product,) = costs("matmul_v5e").operations
    assert product.roofline_seconds == pytest.approx(FLOPS["matmul"] / V5E.peak_flops)
    (precise,) = costs("precise_v5e").operations
    assert precise.roofline_seconds == pytest.approx(6 * PRODUCT / V5E.peak_flops)
    assert precise.roofline_seconds < precise.cycles / V5E.clock_hz < 1.2 * precise.roofline_seconds


def test_the_conservative_estimate_is_the_longer():
    for name in make_hlo.PROGRAMS:
        estimated = costs(name)
        assert estimated.step_seconds == max(estimated.roofline_step_seconds, estimated.compiler_step_seconds)
        assert estimated.compiler_seconds >= estimated.roofline_seconds
        whole = estimated.compiler_seconds + estimated.exposed_seconds + estimated.copy_seconds
        assert estimated.compiler_step_seconds == pytest.approx(whole)


def test_a_faster_clock_and_memory_shorten_the_estimate():
    twice = dataclasses.replace(
        V5E, clock_hz=2 * V5E.clock_hz, peak_flops=2 * V5E.peak_flops, hbm_bandwidth=2 * V5E.hbm_bandwidth
    )
    once = costs("scan_gradient_v5e")
    assert estimate(hlo_text("scan_gradient_v5e"), twice).step_seconds == pytest.approx(once.step_seconds / 2)


@pytest.mark.parametrize("name", ["kernel_v5e", "kernel_v5p", "kernel_v6e"])
def test_pallas_kernels_cost_what_the_caller_counted(name):
    module = parse(hlo_text(name))
    calls = [i for i in module.entry.instructions.values() if is_kernel(i)]
    assert [kernel_name(call) for call in calls] == ["rope_attention", "rope_attention_backward"]
    cycles = {kernel_key(call): 1e6 * (1 + n) for n, call in enumerate(calls)}
    assert len(cycles) == 2
    counted = {o.name: o for o in estimate(hlo_text(name), chip(name), kernels=cycles).operations if o.kind == "kernel"}
    assert counted["rope_attention"].compiler_seconds == pytest.approx(1e6 / chip(name).clock_hz)
    assert counted["rope_attention_backward"].compiler_seconds == pytest.approx(2e6 / chip(name).clock_hz)
    uncounted = {o.name: o for o in costs(name).operations if o.kind == "kernel"}
    for kernel, seconds in ((k, o.roofline_seconds) for k, o in uncounted.items()):
        assert uncounted[kernel].compiler_seconds == pytest.approx(UNKNOWN_KERNEL_FACTOR * seconds)
        assert kernel in costs(name).uncounted


def test_the_key_of_a_kernel_does_not_depend_on_where_it_was_written():
    """The same kernel on another chip is the same code; forward and backward are not."""
    keys = [
        {kernel_key(i) for i in parse(hlo_text(f"kernel_{c}")).entry.instructions.values() if is_kernel(i)}
        for c in ("v5e", "v6e")
    ]
    assert keys[0] == keys[1] and all(key.endswith("x4") for key in keys[0])  # four images, one group of heads


def test_a_kernel_that_states_no_flops_is_an_error():
    text = hlo_text("kernel_v5e").replace('"cost_estimate":{"flops"', '"cost_estimate":{"operations"')
    with pytest.raises(HloError, match="'rope_attention' states no FLOPs"):
        estimate(text, V5E)


def test_operations_without_cycles_are_named_and_cost_more():
    text = hlo_text("elementwise_v5e").replace('"estimated_cycles"', '"unknown"')
    estimated = estimate(text, V5E)
    (add,) = estimated.operations
    assert estimated.uncounted == (add.name,)
    assert estimated.uncounted_seconds == add.compiler_seconds == pytest.approx(UNKNOWN_FACTOR * add.roofline_seconds)


def test_assumptions_are_sentences():
    assert len(ASSUMPTIONS) >= 8 and all(sentence.endswith(".") for sentence in ASSUMPTIONS)


BY_HAND = """HloModule by_hand, is_scheduled=true

%apart (a: bf16[64,128], b: bf16[128,256]) -> bf16[64,256] {
  %a = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[128,256]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %d = bf16[64,256]{1,0:T(8,128)(2,1)} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: bf16[64,128], w: bf16[12,128,256], i: s32[]) -> bf16[64,256] {
  %x = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[12,128,256]{2,1,0:T(8,128)(2,1)} parameter(1)
  %early = ((bf16[12,128,256]{2,1,0:T(8,128)(2,1)}), bf16[1,128,256]{2,1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)})
    slice-start(%w), slice={[3:4], [0:128], [0:256]}
  %slice = bf16[1,128,256]{2,1,0:T(8,128)(2,1)S(1)} slice-done(%early)
  %w1 = bf16[128,256]{1,0:T(8,128)(2,1)S(1)} bitcast(%slice)
  %begin = ((bf16[64,128]{1,0}, bf16[128,256]{1,0}), bf16[64,256]{1,0}, u32[]) async-start(%x, %w1), calls=%apart
  ROOT %end = bf16[64,256]{1,0:T(8,128)(2,1)} async-done(%begin)
}
"""


def test_products_in_asynchronous_computations_and_early_slices_count():
    estimated = estimate(BY_HAND, V5E)
    assert estimated.flops == 2 * 64 * 128 * 256
    early = 2 * 128 * 256 / V5E.hbm_bandwidth
    assert estimated.copy_seconds == pytest.approx(early)
    (product,) = estimated.operations
    assert estimated.compiler_step_seconds == pytest.approx(early + product.compiler_seconds)


def test_a_product_in_one_fusion_with_a_collective_counts_beside_it():
    """As if the compiler summed a product over devices in the fusion that makes it."""
    text = """HloModule sum_of_products, num_partitions=4
%both (a: bf16[512,512], b: bf16[512,512]) -> bf16[512,512] {
  %a = bf16[512,512]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[512,512]{1,0:T(8,128)(2,1)} parameter(1)
  %d = bf16[512,512]{1,0:T(8,128)(2,1)} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %r = bf16[512,512]{1,0:T(8,128)(2,1)} all-reduce(%d), channel_id=1, replica_groups=[1,4]<=[4]
}
ENTRY %main (x: bf16[512,512]) -> bf16[512,512] {
  %x = bf16[512,512]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %f = bf16[512,512]{1,0:T(8,128)(2,1)} fusion(%x, %x), kind=kOutput, calls=%both
}
"""
    estimated = estimate(text, V5E)
    assert estimated.flops == 2 * 512**3
    (reduce,) = estimated.collectives
    assert (reduce.kind, reduce.bytes, reduce.group_size) == ("all-reduce", 2 * 512**2, 4)
    (product,) = estimated.operations
    assert estimated.compiler_step_seconds == pytest.approx(product.compiler_seconds + reduce.seconds)


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu: pip install eupe_jax[tpu]"
)


@needs_libtpu
@pytest.mark.parametrize("name", ["attention_v5e"])
def test_flops_of_a_program_compiled_now(name):
    assert estimate(make_hlo.compiled_text(name), chip(name)).flops == FLOPS[name.rsplit("_", 1)[0]]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", make_hlo.PROGRAMS)
def test_every_program_compiled_now_costs_what_its_fixture_does(name):
    fresh, kept = estimate(make_hlo.compiled_text(name), chip(name)), costs(name)
    assert fresh.flops == kept.flops
    assert fresh.step_seconds == pytest.approx(kept.step_seconds, rel=0.05)
    assert sum(c.bytes * c.trips for c in fresh.collectives) == sum(c.bytes * c.trips for c in kept.collectives)
