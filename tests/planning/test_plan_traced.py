"""FLOPs counted from a trace: exact for programs with known answers, and equal to the architecture's count."""

import jax
import jax.numpy as jnp
import pytest

from configs import stage2_vitb
from eupe_jax.models.fused_attention import FusedAttention
from eupe_jax.planning import plan, traced
from eupe_jax.planning.pairs import every_pair
from eupe_jax.planning.xla_count import block_ratio
from eupe_jax.sharding.mesh import make_mesh
from eupe_jax.training import program
from eupe_jax.training.model_flops import step_flops


def count(function, *args, devices=1):
    return traced.executed_flops(jax.jit(function).trace(*args), devices)


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_product_counts_two_for_every_multiply_add_and_what_is_unused_counts_nothing():
    def f(a, b):
        unused = b @ b.T  # noqa: F841
        return a @ b

    assert count(f, array(3, 5), array(5, 7)) == {traced.TEACHERS: 2 * 3 * 5 * 7}


def test_a_scan_counts_every_turn():
    def f(x, weights):
        return jax.lax.scan(lambda carry, w: (carry @ w, None), x, weights)[0]

    assert count(f, array(4, 8), array(10, 8, 8)) == {traced.TEACHERS: 10 * 2 * 4 * 8 * 8}


@pytest.mark.parametrize("groups", [1, 6])
def test_a_convolution_skips_the_padding(groups):
    def f(x, kernel):
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 1), "SAME", dimension_numbers=dimensions, feature_group_count=groups
        )

    images, kernel = array(2, 8, 5, 6), array(3, 3, 6 // groups, 12)
    ours = count(f, images, kernel)[traced.TEACHERS]
    assert ours == jax.jit(f).lower(images, kernel).cost_analysis()["flops"]


def test_a_loop_without_a_known_end_is_refused():
    with pytest.raises(ValueError, match="number of turns of a loop"):
        count(lambda x: jax.lax.while_loop(lambda y: y.sum() < 1, lambda y: y @ y, x), array(4, 4))


def test_backward_and_recomputed_products_are_told_apart():
    """Two layers: the backward pass takes both gradients of the second, one of the first."""

    def f(w, x):
        hidden = jnp.sin(x @ w[0])  # sin's gradient needs its input: with remat the product is made again
        return jnp.sum(jnp.sin(hidden @ w[1]))

    product = 2 * 16 * 8 * 8
    plain = count(jax.grad(f), array(2, 8, 8), array(16, 8))
    assert plain == {traced.STUDENTS: 2 * product, traced.BACKWARD: 3 * product}
    remat = count(jax.grad(jax.checkpoint(f)), array(2, 8, 8), array(16, 8))
    assert remat[traced.RECOMPUTED] == 2 * product and remat[traced.BACKWARD] == 3 * product


def test_the_attention_kernel_counts_its_grid_and_names_what_it_makes_again():
    batch, tokens, width = 2, 9, 256
    attend = FusedAttention(interpret=True)

    def f(qkv):
        return attend(qkv, jnp.zeros((4, 32)), jnp.ones((4, 32)), 4).sum()

    product = 2 * batch * tokens * tokens * width
    found = count(jax.grad(f), array(batch, tokens, 3 * width))
    assert found[traced.STUDENTS] == 2 * product
    assert found[traced.BACKWARD] == 4 * product and found[traced.KERNEL] == product


@pytest.fixture(scope="module")
def trace():
    config = stage2_vitb.get_config("runlocal")
    mesh = make_mesh(devices=jax.devices()[:1])
    run = program.abstract_run(config, mesh)
    steps = program.make_steps(config, run.students, run.teachers, mesh, run.state_shardings)
    (chosen,) = every_pair(config)
    return config, chosen, steps[chosen].trace(*run.arguments)


def test_a_real_steps_forward_passes_equal_the_count_from_the_architecture(trace):
    config, chosen, traced_step = trace
    work, found = step_flops(config, chosen), traced.executed_flops(traced_step, 1)
    images = config.batch_size
    assert found[traced.TEACHERS] == images * sum(work.teachers.values())
    assert found[traced.STUDENTS] == images * sum(work.students.values())
    assert found[traced.ADAPTERS] == images * sum(work.adapters.values())
    # the images need no gradient: the embedding has one product less in the backward pass than the usual two
    embedding = 2 * 4 * (16 * 16 * 3) * 32
    biases = 2 * (2 * 9 * 3 * 32)  # of the queries, keys and values of two blocks: their gradients are products
    assert found[traced.BACKWARD] == images * (2 * work.trained - embedding + biases)


def test_each_device_has_its_share(trace):
    _, _, traced_step = trace
    alone, shared = traced.executed_flops(traced_step, 1), traced.executed_flops(traced_step, 4)
    assert shared[traced.TEACHERS] == alone[traced.TEACHERS] / 4


def test_xlas_count_of_a_block_is_ours_and_a_little():
    ratio = block_ratio(stage2_vitb.get_config().students.vitb, 256)
    assert plan.XLA_RANGE[0] < ratio < plan.XLA_RANGE[1]


def test_the_largest_arrays_of_a_trace_are_named(trace):
    _, _, traced_step = trace
    largest = traced.largest_arrays(traced_step, 1, count=5)
    assert len(largest) == 5 and [size for size, _, _ in largest] == sorted((s for s, _, _ in largest), reverse=True)
    assert all("[" in shape for _, shape, _ in largest)
