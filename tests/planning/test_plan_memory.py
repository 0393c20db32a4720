"""HBM by kind, and what is said of a step that does not fit."""

from types import SimpleNamespace

import jax
import pytest

from configs import stage2_vitb
from eupe_jax.planning import memory
from eupe_jax.sharding.mesh import make_mesh
from eupe_jax.training import program

GIB = 2**30

# The three ways in which compilers say it, as libtpu does.
BEFORE_ASSIGNMENT = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (24.45G) exceeds"
    " available HBM (15.75G)."
)
ASSIGNED = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. \
Used 30.50G of 15.75G hbm. Exceeded hbm capacity by 14.75G.

Total hbm usage >= 31.00G:
    reserved        258.00M
    program          30.50G
    arguments       256.00M

  Largest program allocations in hbm:

  1. Size: 4.50G
     Operator: op_name="jit(step)/jvp(VisionTransformer)/blocks/mlp/fc1" source_file="layers.py"
     Shape: bf16[12,32,261,3072]{3,2,1,0:T(8,128)(2,1)}
     Unpadded size: 4.40G
  2. Size: 512.00M
     Shape: f32[32,261,768]{2,1,0:T(8,128)}
"""
BOTH_CORES = (
    "RESOURCE_EXHAUSTED: TPU TensorCore Hbm usage: 134.50G, SparseCore Hbm usage 1.00M, "
    "exceeding available bytes: 95.74G"
)


@pytest.mark.parametrize(
    ("message", "needed", "capacity"),
    [(BEFORE_ASSIGNMENT, 24.45 + 1, 15.75), (ASSIGNED, 31.0, 15.75), (BOTH_CORES, 134.5, 95.74)],
)
def test_reads_how_much_is_missing(message, needed, capacity):
    found = memory.read_out_of_memory(message, arguments=GIB)
    assert found.needed == pytest.approx(needed * GIB) and found.capacity == pytest.approx(capacity * GIB)
    assert found.over == pytest.approx((needed - capacity) * GIB)


def test_reads_the_largest_tensors():
    largest = memory.read_out_of_memory(ASSIGNED, arguments=0).largest
    assert largest[0] == (
        4.5 * GIB, "bf16[12,32,261,3072]{3,2,1,0:T(8,128)(2,1)}", "jit(step)/jvp(VisionTransformer)/blocks/mlp/fc1"
    )  # fmt: skip
    assert largest[1][0] == GIB / 2 and largest[1][2] == ""


@pytest.mark.parametrize(
    "message", ["INVALID_ARGUMENT: no", "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem while allocating"]
)
def test_other_errors_are_not_taken_for_it(message):
    assert memory.read_out_of_memory(message, arguments=0) is None


def test_arguments_are_counted_by_kind_and_share():
    config = stage2_vitb.get_config("runlocal")
    config.mesh.fsdp = 4
    run = program.abstract_run(config, make_mesh(4, devices=jax.devices()[:4]))
    kinds = memory.argument_bytes(run.arguments)
    side = config.data.image_size
    assert kinds[memory.BATCH] == config.batch_size // 4 * (side * side * 3 + 4)
    # two moments for every parameter, and counters; buffers are parameters' companions
    assert kinds[memory.OPTIMIZER] == pytest.approx(2 * kinds[memory.STUDENTS], rel=0.01)
    analysis = SimpleNamespace(
        argument_size_in_bytes=sum(kinds.values()) + 100, output_size_in_bytes=70, alias_size_in_bytes=50,
        temp_size_in_bytes=1000, generated_code_size_in_bytes=10,
    )  # fmt: skip
    held = memory.hbm_by_kind(run.arguments, analysis)
    assert (held[memory.PADDING], held[memory.OUTPUTS], held[memory.TEMPORARIES]) == (100, 20, 1000)
    assert sum(held.values()) == sum(kinds.values()) + 100 + 20 + 1000 + 10


@pytest.mark.parametrize(
    ("kinds", "remat", "batch", "words"),
    [
        ({memory.TEACHERS: 9}, {"a": "none", "b": "full"}, 8, "--config.students.a.remat=names"),
        ({memory.TEMPORARIES: 9}, {"a": "names"}, 8, "--config.students.a.remat=full"),
        ({memory.TEMPORARIES: 9}, {"a": "full"}, 8, "--config.accumulate"),
        ({memory.TEMPORARIES: 9}, {"a": "full"}, 1, "--config.mesh.tensor=2"),
        ({memory.OPTIMIZER: 9, memory.TEMPORARIES: 3}, {"a": "none"}, 8, "optimizer state: cut parameters over more"),
        ({memory.TEACHERS: 9, memory.OPTIMIZER: 2}, {"a": "none"}, 8, "--config.mesh.fsdp=8"),
    ],
)
def test_advice(kinds, remat, batch, words):
    assert words in memory.first_change(kinds, remat, batch, capacity=20, fsdp=4, room=16)


def test_weights_that_are_cut_over_all_devices_are_not_cut_further():
    """Over half of the HBM, activations can still make room; over all of it, nothing but more chips can."""
    advice = [
        memory.first_change({memory.TEACHERS: size}, {"a": "names"}, 8, capacity=20, fsdp=16, room=16)
        for size in (15, 30)
    ]
    assert "remat=full" in advice[0] and "more chips" in advice[1]
