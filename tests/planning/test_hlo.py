"""Reading compiled programs: shapes in memory, instructions over several lines, trip counts."""

import pytest

from eupe_jax.planning.hlo import HloError, parse, parse_shapes, trip_count
from tests.planning.programs import hlo_text


@pytest.mark.parametrize(
    "text, elements, padded, space",
    [
        ("bf16[512,1024]{1,0:T(8,128)(2,1)}", 512 * 1024, 2 * 512 * 1024, 0),
        ("bf16[8,12,261,261]{2,3,1,0:T(8,128)(2,1)}", 96 * 261**2, 2 * 96 * 264 * 384, 0),
        ("f32[5,768]{1,0:T(8,128)}", 5 * 768, 4 * 8 * 768, 0),
        ("bf16[768]{0:T(1024)(128)(2,1)S(1)}", 768, 2 * 1024, 1),
        ("f32[4096,261]{0,1:T(8,128)}", 4096 * 261, 4 * 4096 * 264, 0),
        ("f32[300]{0:T(8,128)}", 300, 4 * 8 * 384, 0),
        ("s32[]{:T(128)S(6)}", 1, 4, 6),
        ("pred[3]", 3, 3, 0),
        ("s4[16]{0}", 16, 8, 0),
        ("f8e4m3fn[16,128]{1,0:T(8,128)(4,1)}", 2048, 2048, 0),
    ],
)
def test_shapes_take_the_memory_of_their_tiles(text, elements, padded, space):
    (shape,) = parse_shapes(text)
    assert (shape.elements, shape.padded_bytes(), shape.space) == (elements, padded, space)
    assert shape.hbm_bytes() == (padded if space == 0 else 0)


def test_tuples_are_flattened():
    shapes = parse_shapes("((bf16[2,3]{1,0}, token[]), s32[]{:S(2)}, u8[4]{0})")
    assert [(s.dtype, s.dims) for s in shapes] == [("bf16", (2, 3)), ("token", ()), ("s32", ()), ("u8", (4,))]


PROGRAM = """HloModule jit_f, is_scheduled=true, num_partitions=8

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %step = s32[] constant(STEP)
  %next = s32[]{:T(128)} add(%i, %step), metadata={op_name="a
%not an instruction = but a name over two lines"}
  %x = f32[4]{0:T(128)} get-tuple-element(%p), index=1
  ROOT %out = (s32[]{:T(128)}, /*index=1*/f32[4]{0:T(128)}) tuple(%next, %x)
}

%until (q: (s32[], f32[4])) -> pred[] {
  %q = (s32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %end = s32[] constant(END)
  ROOT %go = pred[] compare(%j, %end), direction=DIRECTION
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x.1 = f32[4]{0:T(128)} parameter(0)
  %start = s32[] constant(START)
  %copied = s32[]{:T(128)} copy(%start)
  %both = (s32[]{:T(128)}, f32[4]{0:T(128)}) tuple(%copied, %x.1)
  %w = (s32[]{:T(128)}, f32[4]{0:T(128)}) while(%both), condition=%until, body=%body
  ROOT %y = f32[4]{0:T(128)} get-tuple-element(%w), index=1
}
"""


def trips(start, end, step, direction):
    text = PROGRAM
    for name, value in (("START", start), ("END", end), ("STEP", step), ("DIRECTION", direction)):
        text = text.replace(name, str(value))
    module = parse(text)
    return trip_count(module, module.entry, module.entry.instructions["w"])


@pytest.mark.parametrize(
    "start, end, step, direction, expected",
    [(0, 12, 1, "LT", 12), (1, 6, 1, "LT", 5), (0, 12, 5, "LT", 3), (0, 12, 1, "LE", 13), (9, 0, -1, "GT", 9),
     (0, 7, 1, "NE", 7), (3, 3, 1, "LT", 0)],
)  # fmt: skip
def test_trips_count_from_start_to_bound(start, end, step, direction, expected):
    assert trips(start, end, step, direction) == expected


def test_attributes_may_run_over_several_lines():
    module = parse(PROGRAM.replace("STEP", "1"))
    body = module.computations["body"]
    assert list(body.instructions) == ["p", "i", "step", "next", "x", "out"]
    assert body.root.name == "out" and body.root.operands == ["next", "x"]
    assert module.partitions == 8 and module.entry.name == "main"


def test_a_loop_without_constant_bounds_is_an_error():
    text = PROGRAM.replace("STEP", "1").replace(
        "%end = s32[] constant(END)", "%end = s32[] get-tuple-element(%q), index=0"
    )
    module = parse(text.replace("DIRECTION", "LT").replace("START", "0"))
    with pytest.raises(HloError, match="'w'.*no constant trip count"):
        trip_count(module, module.entry, module.entry.instructions["w"])


def test_what_is_no_program_is_an_error():
    with pytest.raises(HloError, match="no ENTRY computation"):
        parse("module @jit_f { stablehlo.add }")


@pytest.mark.parametrize(
    "name, expected",
    [("scan_v5e", [12]), ("nested_scan_v5e", [5, 7]), ("scan_gradient_v5e", [6, 6]), ("fsdp_gradient_slices", [5, 6])],
)
def test_trips_of_compiled_loops(name, expected):
    """The loop over slices is peeled once by the compiler: five trips of six layers."""
    module = parse(hlo_text(name))
    counts = [
        trip_count(module, where, i)
        for where in module.computations.values()
        for i in where.instructions.values()
        if i.opcode == "while"
    ]
    assert sorted(counts) == expected
