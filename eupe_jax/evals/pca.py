"""Patch tokens as pictures: their first three principal components as red, green and blue (EUPE Fig. 4)."""

import numpy as np

from eupe_jax.distill.resize import resize


def pca_to_rgb(patches_NxHxWxD: np.ndarray, side: int = 0) -> np.ndarray:
    """[N, h, w, 3] (or [N, side, side, 3], bicubic) in [0, 1]; components are fitted on all N images together.

    Colours are stretched between the 2nd and 98th percentile of each component. Signs are fixed by the largest
    coefficient, so that the same tokens always give the same colours.
    """
    n, h, w, d = patches_NxHxWxD.shape
    x = patches_NxHxWxD.reshape(-1, d).astype(np.float64)
    x = x - x.mean(0)
    _, vectors = np.linalg.eigh(x.T @ x)
    components = vectors[:, ::-1][:, :3]
    components = components * np.sign(components[np.abs(components).argmax(0), np.arange(components.shape[1])])
    y = x @ components
    low, high = np.percentile(y, [2, 98], axis=0)
    y = ((y - low) / np.maximum(high - low, 1e-9)).reshape(n, h, w, -1)
    if y.shape[-1] < 3:
        y = np.concatenate([y, np.zeros((n, h, w, 3 - y.shape[-1]))], axis=-1)
    if side:
        y = np.asarray(resize(y, (side, side)))
    return np.clip(y, 0.0, 1.0)
