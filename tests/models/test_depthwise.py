import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eupe_jax.models import zoo
from eupe_jax.models.depthwise import depthwise_conv, depthwise_matmul


@pytest.mark.parametrize("size", [(8, 8), (3, 5), (16, 12), (9, 33)])
def test_both_formulations_agree_in_value_and_gradient(size):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, *size, 6))
    kernel = jax.random.normal(keys[1], (7, 7, 1, 6))
    weight = jax.random.normal(keys[2], x.shape)
    results = [
        jax.value_and_grad(lambda x, k, f=f: jnp.sum(jnp.sin(f(x, k)) * weight), argnums=(0, 1))(x, kernel)
        for f in (depthwise_conv, depthwise_matmul)
    ]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4)


def test_whole_encoder_agrees_and_takes_three_stages():
    sizes = {"dims": (8, 16, 24), "depths": (1, 2, 1), "layerscale_init": 0.5}
    images = jax.random.normal(jax.random.key(1), (2, 64, 48, 3))
    conv = zoo.build("eupe_convnext_tiny", **sizes)
    variables = conv.init(jax.random.key(0), images)
    matmul = zoo.build("eupe_convnext_tiny", depthwise="matmul", **sizes)
    a, b = conv.apply(variables, images), matmul.apply(variables, images)
    assert a["patches"].shape == (2, 4, 3, 24) and zoo.spec("eupe_convnext_tiny", **sizes).patch_size == 16
    for kind in ("cls", "patches"):
        np.testing.assert_allclose(a[kind], b[kind], atol=2e-5)


def test_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="depthwise is 'fft'"):
        zoo.build("eupe_convnext_tiny", depthwise="fft").init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
