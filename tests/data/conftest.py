import io

import numpy as np
import pytest
from PIL import Image

from eupe_jax.data.sources import PackagedPhotos


@pytest.fixture(scope="session")
def photos():
    try:
        return PackagedPhotos(everyday=True)
    except ImportError as e:
        pytest.skip(str(e))


@pytest.fixture(scope="session")
def numbered():
    """40 images of 24x20, each of one colour that tells its number: 16 grey levels a channel."""
    from eupe_jax.data.sources import ArraySource

    colours = [(16 * (i % 8) + 8, 16 * (i // 8) + 8, 200) for i in range(40)]
    return ArraySource([np.full((20, 24, 3), c, np.uint8) for c in colours])


def encode(image: np.ndarray | Image.Image, format: str = "PNG", **options) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session", name="encode")
def encode_fixture():
    return encode
