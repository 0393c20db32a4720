"""Ridge read-out: how much of an expert can be read linearly from frozen patch tokens.

Needs no adapters, so encoders that never saw the expert (an untrained one, say) are measured in the same way.
"""

from dataclasses import dataclass

import numpy as np

from eupe_jax.models.resize import resize


@dataclass(frozen=True)
class Readout:
    """A fitted ridge regression from standardised tokens [.., D] to targets [.., E]."""

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray  # [D + 1, E], the last row is the intercept

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        x = (tokens - self.mean) / self.scale
        return x @ self.weights[:-1] + self.weights[-1]


def fit(tokens_MxD: np.ndarray, targets_MxE: np.ndarray, penalty: float = 1e-2) -> Readout:
    """Ridge in closed form. `penalty` is relative to the number of tokens, so that it means the same for any count.

    Raises:
      ValueError: token and target counts differ.
    """
    if len(tokens_MxD) != len(targets_MxE):
        raise ValueError(f"{len(tokens_MxD)} tokens for {len(targets_MxE)} targets")
    mean, scale = tokens_MxD.mean(0), tokens_MxD.std(0) + 1e-6
    x = ((tokens_MxD - mean) / scale).astype(np.float64)
    offset = targets_MxE.mean(0)
    gram = x.T @ x + penalty * len(x) * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, x.T @ (targets_MxE - offset).astype(np.float64))
    return Readout(mean, scale, np.concatenate([weights, offset[None]]).astype(np.float32))


def patch_readout(
    train_tokens: np.ndarray, train_targets: np.ndarray, test_tokens: np.ndarray, test_targets: np.ndarray,
    penalty: float = 1e-2,
) -> float:  # fmt: skip
    """Held-out mean cosine of the expert's patch tokens, read from an encoder's: all [N, h, w, D], any grids.

    Tokens are resized to the expert's grid, fitted on the training images and scored on the others.
    """
    grid = train_targets.shape[1:3]
    at_grid = lambda x: np.asarray(resize(x, grid)).reshape(-1, x.shape[-1])  # noqa: E731
    flat = lambda y: y.reshape(-1, y.shape[-1])  # noqa: E731
    predicted = fit(at_grid(train_tokens), flat(train_targets), penalty)(at_grid(test_tokens))
    wanted = flat(test_targets)
    norms = np.linalg.norm(predicted, axis=1) * np.linalg.norm(wanted, axis=1)
    return float(np.mean(np.sum(predicted * wanted, axis=1) / np.maximum(norms, 1e-8)))
