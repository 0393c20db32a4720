"""What chips send each other in a compiled stage-2 step: weights and their gradients in parts, no images."""

import importlib.util

import jax
import pytest

from configs import stage2_vitb
from eupe_jax.planning.collectives import whole_weight_all_reduces
from eupe_jax.planning.costs import estimate
from eupe_jax.sharding.chips import CHIPS, topology
from eupe_jax.sharding.mesh import make_mesh
from eupe_jax.training import pipeline, program

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu (the extra 'tpu') is not installed"),
]
SIDE, BATCH = 64, 6  # pixels; images a device: so many that no activations have as many elements as a weight
TOKENS = 5 + (SIDE // 16) ** 2


def small_stage_2(**axes):
    """Stage 2 with kernels as wide as a tile needs and few of them: it compiles in a minute."""
    config = stage2_vitb.get_config().unlock()
    config.students.vitb.overrides.update(embed_dim=256, depth=2, num_heads=4)
    config.teachers.proxy.overrides.update(embed_dim=512, depth=2, num_heads=8, ffn_ratio=4)
    config.teachers.proxy.resolutions = config.student_resolutions = (SIDE,)
    config.data.image_size, config.adapter.hidden_dim = SIDE, 3072
    config.mesh.update(axes)
    return config


@pytest.mark.parametrize(
    ("slice_", "axes"),
    [
        ("v5e:4x4", {"fsdp": 4}),
        pytest.param(
            "v5e:4x4",
            {"fsdp": 4, "tensor": 2},
            marks=pytest.mark.xfail(
                strict=True, reason="row kernels of tensor groups are cut on outputs over fsdp: 128 wide, summed whole"
            ),
        ),
        ("v5p:2x2x4", {"fsdp": 8}),
    ],
)
def test_no_whole_weights_are_summed_and_no_images_travel(slice_, axes):
    config = small_stage_2(**axes)
    devices = topology(slice_)
    mesh = make_mesh(**config.mesh, devices=devices)
    config.batch_size = BATCH * len(devices) // mesh.shape["tensor"]
    (chosen,) = pipeline.every_pair(config)
    with jax.default_matmul_precision("default"):  # tests on CPUs ask for more
        _, trace = program.trace_step(config, mesh, chosen)
        text = trace.lower(lowering_platforms=("tpu",)).compile().as_text()
    found = estimate(text, CHIPS[slice_.partition(":")[0]], mesh=dict(mesh.shape)).collectives
    state, _, teachers, _ = program.abstract_run(config, mesh).arguments
    weights = [x for x in jax.tree.leaves((state["students"], teachers)) if x.ndim > 1]
    cut = [x.shape for x in weights if not x.sharding.is_fully_replicated]
    held = [x.shape for x in weights if x.sharding.is_fully_replicated]
    assert len(cut) > 20
    gathered = [c for c in found if c.kind == "all-gather" and any(512 in shape for shape in c.shapes)]
    assert gathered, "teacher's and adapters' kernels are cut, so they have to be gathered"
    assert whole_weight_all_reduces(found, cut, held=held) == []
    images = [c for c in found if any(BATCH in shape and {TOKENS, SIDE // 16} & set(shape) for shape in c.shapes)]
    kinds = {c.kind for c in images}
    # a tensor group sums what its halves of a layer give; plain attention's gradient is gathered once a layer
    assert kinds <= ({"all-reduce", "all-gather"} if axes.get("tensor") else set()), images
