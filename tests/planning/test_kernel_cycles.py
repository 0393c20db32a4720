"""Cycles of Pallas kernels: bundles of a schedule, tables that never give a stale figure, a kernel counted for real."""

import dataclasses
import importlib.util
import json

import pytest

from eupe_jax.planning import kernel_cycles
from eupe_jax.planning.costs import estimate
from eupe_jax.planning.hlo import HloError, parse
from eupe_jax.planning.kernel_calls import is_kernel, kernel_key, kernel_memory
from eupe_jax.planning.kernel_cycles import Schedule, count_bundles
from eupe_jax.sharding.chips import CHIPS
from tests.planning.programs import hlo_text

HEAD = """= control target key start
LH: loop header
= control target key end

     0   :  { %s21 = smov 0  ;;  %s0 = inlined_call_operand.vmem [shape: bf16[4,261,768], index: 0] /* { */ }
   0x1   :  { %s22 = smov 0 } /* Start region 9 */
"""
LOOP = """   0x2 LB: > { %s28 = sadd.s32 1, %s24 } /* Start region 313 :: Start region 17 */
   0x3   : > { %32 = sbr.rel (%p5) target = $region20 }
   0x4   : > {}
   0x5 PF: > { %s16 = sadd.s32 1, %s25 } /* Start/End empty region 20 :: End region 17 */
   0x6   : > { %p13 = scmp.ge.s32.totalorder %s16, 98 /* loop exit test */  ;;  %s22 = smov %s30 }
   0x7   :  { %15 = sbr.rel (!%p13) target = $region313 }
"""
INNER = """   0x5 LB: >> { %v1 = vld [vmem:[%s8451_s12] sm:$0xf] } /* Start region 40 */
   0x6   : >> { %p1 = scmp.ge.s32.totalorder %s1, 11 /* loop exit test */ }
   0x7   : >> { %41 = sbr.rel (!%p1) target = $region40 }
"""
TAIL = """   0x8   :  {} /* End region 313 */
   0x9   :  {} /* exit bundle: %ffi_call = custom-call(%copy) */
"""


def test_bundles_of_a_loop_and_around_it():
    assert count_bundles(HEAD + LOOP + TAIL) == (6, 98, 4)
    assert count_bundles(HEAD + TAIL) == (4, 0, 0)


def test_an_inner_loop_counts_with_its_trips():
    first, rest = LOOP.split("   0x5 PF", 1)
    assert count_bundles(HEAD + first + INNER + "   0x5 PF" + rest + TAIL) == (6 + 3 * 11, 98, 4)


def test_a_loop_of_unknown_length_is_an_error():
    with pytest.raises(HloError, match="without constant trips"):
        count_bundles(HEAD + LOOP.replace("%s16, 98", "%s16, %s99") + TAIL)
    with pytest.raises(HloError, match="several loops one after another"):
        count_bundles(HEAD + LOOP + LOOP.replace("313", "314") + TAIL)


SCHEDULE = Schedule("k", 1000, 2, 10, 1, "bf16[4]", "0.0", "2026-11-23")


def test_cycles_of_a_grid():
    assert SCHEDULE.cycles(96) == 10 + 98 * 1000
    assert dataclasses.replace(SCHEDULE, cores=2).cycles(96) == 10 + 50 * 1000
    assert dataclasses.replace(SCHEDULE, step_cycles=0, extra_trips=0).cycles(1) == 10


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """A cache of the test's own, an empty table, and no compiler but a list of what it was asked for."""
    monkeypatch.setattr(kernel_cycles, "TABLE", tmp_path / "table.json")
    monkeypatch.setattr(kernel_cycles, "CACHE", tmp_path / "cache" / "cache.json")
    monkeypatch.setattr(kernel_cycles, "libtpu_version", lambda: "0.0")
    asked = []

    def count(kernels, topology_name):
        asked.append((sorted(kernels), topology_name))
        return {key: SCHEDULE for key in kernels}

    monkeypatch.setattr(kernel_cycles, "count", count)
    return asked


def test_a_kernel_is_counted_once(tables):
    text = hlo_text("kernel_v5e")
    once = kernel_cycles.cycles_of(text, CHIPS["v5e"], "v5e:2x4")
    assert set(once) == {kernel_key(i) for i in parse(text).entry.instructions.values() if is_kernel(i)}
    assert set(once.values()) == {SCHEDULE.cycles(4)}
    assert kernel_cycles.cycles_of(text, CHIPS["v5e"], "v5e:2x4") == once and len(tables) == 1
    counted = {o.name: o.cycles for o in estimate(text, CHIPS["v5e"], kernels=once).operations if o.kind == "kernel"}
    assert set(counted.values()) == set(once.values()) and len(counted) == 2


def test_another_chip_compiler_or_kernel_is_counted_anew(tables, monkeypatch):
    text = hlo_text("kernel_v5e")
    kernel_cycles.cycles_of(text, CHIPS["v5e"], "v5e:2x4")
    kernel_cycles.cycles_of(text, CHIPS["v6e"], "v6e:2x4")
    assert [name for _, name in tables] == ["v5e:2x4", "v6e:2x4"]
    kernel_cycles.cycles_of(hlo_text("kernel_v6e"), CHIPS["v6e"], "v6e:2x4")  # the same code
    assert len(tables) == 2
    monkeypatch.setattr(kernel_cycles, "libtpu_version", lambda: "0.1")
    kernel_cycles.cycles_of(text, CHIPS["v5e"], "v5e:2x4")
    assert len(tables) == 3
    monkeypatch.setattr(kernel_cycles, "libtpu_version", lambda: None)  # nothing to compile with: what is known holds
    kernel_cycles.cycles_of(text, CHIPS["v5e"], "v5e:2x4")
    assert len(tables) == 3


def test_a_broken_cache_is_counted_anew_and_a_broken_table_is_an_error(tables):
    text = hlo_text("kernel_v5e")
    kernel_cycles.CACHE.parent.mkdir()
    kernel_cycles.CACHE.write_text('{"half')
    kernel_cycles.cycles_of(text, CHIPS["v5e"], "v5e:2x4")
    assert len(tables) == 1 and len(json.loads(kernel_cycles.CACHE.read_text())) == 2
    kernel_cycles.TABLE.write_text("[]")
    with pytest.raises(HloError, match="table of kernels' cycles cannot be read"):
        kernel_cycles.cycles_of(text, CHIPS["v5e"], "v5e:2x4")


def test_the_table_is_made_of_the_kernels_of_programs(tables, tmp_path, capsys):
    text = hlo_text("kernel_v5e")
    kernel_cycles.cycles_of(text, CHIPS["v5e"], "v5e:2x4")
    kernel_cycles.cycles_of(text, CHIPS["v6e"], "v6e:2x4")
    (tmp_path / "program.txt").write_text(text)
    kernel_cycles.main([str(tmp_path / "program.txt")])
    assert "4 schedules of 2 kernels" in capsys.readouterr().out
    kernel_cycles.CACHE.unlink()
    assert set(kernel_cycles.cycles_of(text, CHIPS["v6e"], "v6e:2x4").values()) == {SCHEDULE.cycles(4)}
    assert len(tables) == 2  # the table knows them


def _kernels(text):
    return [i for i in parse(text).entry.instructions.values() if is_kernel(i)]


def test_a_kernel_keeps_the_fast_memory_that_its_author_gave_it():
    kernels = _kernels(hlo_text("kernel_v5e"))
    assert [kernel_memory(i) for i in kernels] == 2 * [[{"memory_space": "1", "offset": "0", "size": "104857600"}]]


@pytest.mark.skipif(kernel_cycles.TABLE.exists() is False, reason="no table of cycles")
def test_the_table_that_comes_with_the_project_can_be_read():
    for key, schedule in kernel_cycles._read(kernel_cycles.TABLE).items():
        assert key.split("/")[0] in {f"{c.name}x{c.devices}" for c in CHIPS.values()}
        assert schedule.step_cycles > 0 and schedule.extra_trips >= 0 and schedule.cores in (1, 2)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install eupe_jax[tpu]")
@pytest.mark.parametrize("chip, topology", [("v5e", "v5e:2x4"), ("v5p", "v5p:2x2x1"), ("v6e", "v6e:2x4")])
def test_kernels_counted_for_real_take_longer_than_their_products_alone(chip, topology, tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_cycles, "CACHE", tmp_path / "cache.json")
    monkeypatch.setattr(kernel_cycles, "TABLE", tmp_path / "table.json")
    text = hlo_text(f"kernel_{chip}")
    cycles = kernel_cycles.cycles_of(text, CHIPS[chip], topology)
    kernels = [o for o in estimate(text, CHIPS[chip], kernels=cycles).operations if o.kind == "kernel"]
    for kernel in kernels:
        ideal = kernel.flops / CHIPS[chip].peak_flops * CHIPS[chip].clock_hz
        assert 1.5 * ideal < kernel.cycles < 25 * ideal
    assert kernels[1].cycles > 1.5 * kernels[0].cycles  # backward does more


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install eupe_jax[tpu]")
def test_the_limit_of_fast_memory_reaches_the_compiler():
    text = hlo_text("kernel_v5e")
    with pytest.raises(HloError, match="alone for v5e:2x4 failed.*CompileTimeScopedVmemOom"):
        kernel_cycles.count({0: _kernels(text.replace('"size":"104857600"', '"size":"65536"'))[0]}, "v5e:2x4")
