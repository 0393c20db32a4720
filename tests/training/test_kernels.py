"""Kernels by chip: the choices of `config.compute`, for devices that are here and for those that are not."""

import importlib.util
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from eupe_jax.models import zoo
from eupe_jax.models.fused_attention import FusedAttention
from eupe_jax.models.layers import exact_gelu, plain_attention, tanh_gelu
from eupe_jax.sharding.chips import topology
from eupe_jax.sharding.mesh import make_mesh
from eupe_jax.training import kernels

STUDENT, CONVOLUTIONAL, APPROXIMATE = "eupe_vitb16", "eupe_convnext_tiny", "siglip2_base_patch16_256"
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (the tpu extra)")


def compute(**changes) -> ConfigDict:
    return ConfigDict({"attention": "auto", "teacher_gelu": "auto", "async_collectives": "auto"} | changes)


def mesh_of(platform: str, kind: str, tensor: int = 1):
    """A mesh as kernels look at one: devices that this machine's JAX knows nothing of (GPUs)."""
    device = SimpleNamespace(platform=platform, device_kind=kind, memory_stats=dict)
    return SimpleNamespace(devices=np.array([device], dtype=object), shape={"tensor": tensor})


def test_cpu_computes_plainly():
    mesh = make_mesh(devices=jax.devices()[:1])
    fields = kernels.model_fields(compute(), mesh, STUDENT, frozen=True)
    assert "attention_fn" not in fields and "materialize" not in fields and fields["gelu"] is exact_gelu
    assert kernels.compiler_options(compute(), mesh) is None


def test_gpu_takes_cudnn_where_it_fits():
    fields = kernels.model_fields(compute(), mesh_of("gpu", "NVIDIA H100"), STUDENT, frozen=False)
    attend = fields["attention_fn"]
    assert attend is kernels.cudnn_where_it_fits
    q, k, v = jnp.asarray(np.random.default_rng(0).standard_normal((3, 1, 5, 2, 8)), jnp.float32)
    np.testing.assert_array_equal(attend(q, k, v), plain_attention(q, k, v))  # float32: not cuDNN's
    odd = [x[..., :6].astype(jnp.bfloat16) for x in (q, k, v)]
    np.testing.assert_array_equal(attend(*odd), plain_attention(*odd))


@pytest.mark.parametrize(
    "field, value", [("attention", "flash"), ("teacher_gelu", "erf"), ("async_collectives", "yes")]
)
def test_unknown_choices_name_the_field(field, value):
    with pytest.raises(ValueError, match=rf"compute\.{field} is '{value}': use one of auto"):
        kernels.model_fields(compute(**{field: value}), mesh_of("cpu", "cpu"), STUDENT, frozen=False)


@pytest.mark.parametrize("choice, mesh", [("fused", mesh_of("cpu", "cpu")), ("cudnn", mesh_of("tpu", "TPU v5"))])
def test_kernels_of_other_devices_are_refused(choice, mesh):
    with pytest.raises(ValueError, match=rf"compute.attention='{choice}' needs .*use 'auto'"):
        kernels.model_fields(compute(attention=choice), mesh, STUDENT, frozen=False)


@needs_libtpu
@pytest.mark.parametrize(
    "name, materialize, gelu, asynchronous",
    [("v5e:2x4", False, exact_gelu, False), ("v5p:2x2x1", True, exact_gelu, True), ("v6e:2x4", True, tanh_gelu, True)],
)
def test_tpus_by_generation(name, materialize, gelu, asynchronous):
    mesh = make_mesh(devices=topology(name))
    teacher = kernels.model_fields(compute(), mesh, STUDENT, frozen=True)
    assert teacher["attention_fn"] == FusedAttention(mesh) and teacher["gelu"] is gelu
    assert teacher.get("materialize", False) is materialize
    assert kernels.model_fields(compute(), mesh, STUDENT, frozen=False)["gelu"] is exact_gelu
    assert (kernels.compiler_options(compute(), mesh) is not None) is asynchronous
    assert kernels.compiler_options(compute(async_collectives="off"), mesh) is None
    assert kernels.compiler_options(compute(async_collectives="on"), mesh) == kernels.ASYNC_OPTIONS
    tanh = kernels.model_fields(compute(teacher_gelu="tanh"), mesh, STUDENT, frozen=True)
    assert tanh["gelu"] is tanh_gelu
    # what a model does not have it does not get; SigLIP's own GELU stays
    assert "attention_fn" not in kernels.model_fields(compute(), mesh, CONVOLUTIONAL, frozen=True)
    assert "gelu" not in kernels.model_fields(compute(), mesh, APPROXIMATE, frozen=True)


@needs_libtpu
def test_a_tensor_axis_computes_plainly():
    mesh = make_mesh(tensor=2, devices=topology("v5e:2x4"))
    assert "attention_fn" not in kernels.model_fields(compute(), mesh, STUDENT, frozen=True)
    with pytest.raises(ValueError, match="needs TPUs and mesh.tensor=1, not tpu devices and 2"):
        kernels.model_fields(compute(attention="fused"), mesh, STUDENT, frozen=True)


def test_exact_gelu_is_exact():
    x = jnp.linspace(-8, 8, 4001)
    np.testing.assert_allclose(exact_gelu(x), jax.nn.gelu(x, approximate=False), atol=1e-6)
    half = x.astype(jnp.bfloat16)
    truth = jax.nn.gelu(half.astype(jnp.float32), approximate=False)
    np.testing.assert_array_equal(exact_gelu(half), exact_gelu(half.astype(jnp.float32)).astype(jnp.bfloat16))
    assert jnp.abs(exact_gelu(half) - truth).max() <= jnp.abs(jax.nn.gelu(half, approximate=False) - truth).max()


@pytest.mark.parametrize("name", [STUDENT, CONVOLUTIONAL])
def test_writing_out_changes_no_result(name):
    small = {"depths": (1, 1), "dims": (8, 16)} if name == CONVOLUTIONAL else dict(embed_dim=32, depth=2, num_heads=2)
    images = jnp.asarray(np.random.default_rng(0).standard_normal((1, 32, 32, 3)), jnp.float32)
    variables = jax.jit(zoo.build(name, **small).init)(jax.random.key(0), images)

    def gradient(**options):
        module = zoo.build(name, **small, **options)
        rest = {k: v for k, v in variables.items() if k != "params"}
        return jax.jit(jax.grad(lambda p: module.apply({"params": p, **rest}, images)["patches"].std()))(
            variables["params"]
        )

    usual, written = gradient(), gradient(materialize=True, remat="names")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), usual, written)
