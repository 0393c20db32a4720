"""How much teachers' tokens have in common: linear CKA, mutual ridge predictability, spread of their coordinates.

Everything is computed from first and second moments, which are added up image by image, so nothing of size images x
patches is ever held. Class tokens are tokens of a grid of one place. Of every token the mean at its place is taken off
first: what a teacher says whatever the image shows would otherwise look like agreement.

Images fall into folds. Patches of one image are no independent samples, so the unbiased HSIC over pairs of samples
(Song et al. 2012) would still be biased; instead only cross-covariances of different folds are multiplied. Folds are
independent, so the expectation of such a product is the squared norm of the true cross-covariance, with however few
images and however many coordinates. The same folds serve as held-out images of the ridge regressions.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eupe_jax.distill.normalization import STD_FLOOR

ROUNDING = 1e-6  # relative; float32 tokens that vary less say nothing
PIECE = 64 << 20  # bytes of float64 tokens that are multiplied at once


class Moments:
    """Moments of the tokens of several teachers at the same places of the same images, fold by fold, in float64.

    With K folds, P places and D coordinates of all teachers side by side:

    Attributes:
      widths: {teacher: coordinates}.
      images: [K] images of each fold.
      sums: [K, P, D] sums of tokens over images.
      products: [K, D, D] sums over images and places of products of coordinates.
    """

    def __init__(self, widths: Mapping[str, int], places: int, folds: int) -> None:
        self.widths = dict(widths)
        ends = np.cumsum([0, *self.widths.values()])
        self._columns = {n: np.arange(a, b) for n, a, b in zip(self.widths, ends[:-1], ends[1:], strict=True)}
        self.images = np.zeros(folds, np.int64)
        self.sums = np.zeros((folds, places, ends[-1]))
        self.products = np.zeros((folds, ends[-1], ends[-1]))

    def columns(self, names: Iterable[str]) -> np.ndarray:
        """Where the coordinates of these teachers are."""
        return np.concatenate([self._columns[name] for name in names])

    def add(self, tokens: Mapping[str, np.ndarray], folds_B: np.ndarray) -> None:
        """Adds a batch: {teacher: [B, P, d]}, and the fold of every image."""
        _, places, width = self.sums.shape
        size = max(1, PIECE // (8 * places * width))
        for fold in np.unique(folds_B):
            chosen = np.flatnonzero(folds_B == fold)
            for piece in (chosen[i : i + size] for i in range(0, len(chosen), size)):
                z = np.concatenate([tokens[name][piece] for name in self.widths], axis=-1, dtype=np.float64)
                self.images[fold] += len(piece)
                self.sums[fold] += z.sum(axis=0)
                z = z.reshape(-1, width)
                self.products[fold] += z.T @ z

    def arrays(self) -> dict[str, np.ndarray]:
        """What a stopped run needs to go on."""
        return {"images": self.images, "sums": self.sums, "products": self.products}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Goes on from `arrays` of moments of the same teachers, places and folds."""
        for name, own in self.arrays().items():
            own[...] = arrays[name]

    def variances(self) -> tuple[np.ndarray, np.ndarray]:
        """([D], [D]): variance of every coordinate, pooled over images and places as training's statistics pool it,
        and the part of it that is the same in every image: the variance over places of the mean token."""
        images, places = self.images.sum(), self.sums.shape[1]
        mean_PxD = self.sums.sum(axis=0) / images
        mean = mean_PxD.mean(axis=0)
        squares = np.einsum("kdd->d", self.products) / (images * places)
        return np.maximum(squares - mean**2, 0.0), ((mean_PxD - mean) ** 2).mean(axis=0)

    def std(self) -> np.ndarray:
        """[D]: what training divides by."""
        return np.maximum(np.sqrt(self.variances()[0]), STD_FLOOR)

    def require_variation(self, what: str) -> None:
        """Raises ValueError, naming teacher and tokens (`what`), where those at a place differ by rounding only."""
        images, places = self.images.sum(), self.sums.shape[1]
        squares = np.einsum("kdd->d", self.products) / (images * places)
        constant = (self.sums.sum(axis=0) ** 2).mean(axis=0) / images**2
        for name in self.widths:
            own = self.columns([name])
            if squares[own].sum() - constant[own].sum() <= ROUNDING**2 * squares[own].sum():
                raise ValueError(f"the {what} of teacher {name!r} are the same for every image: leave it out")

    def covariance(self, fold: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Unbiased covariance at a place, averaged over places, of one fold: [rows, columns]."""
        images, sums = self.images[fold], self.sums[fold]
        centred = self.products[fold][np.ix_(rows, columns)] - sums[:, rows].T @ (sums[:, columns] / images)
        return centred / ((images - 1) * sums.shape[1])

    def split(self, fit: Sequence[int], held_out: int) -> tuple[np.ndarray, np.ndarray]:
        """Second moments [D, D] of normalised tokens: of the folds `fit` and of the fold `held_out`, a token.

        From both, the mean at every place of the images of `fit` is taken off.
        """
        std, places, fit = self.std(), self.sums.shape[1], list(fit)
        images, sums = self.images[fit].sum(), self.sums[fit].sum(axis=0) / std
        mean_PxD, scale = sums / images, np.outer(std, std)
        fitted = self.products[fit].sum(axis=0) / scale - images * mean_PxD.T @ mean_PxD
        own = self.images[held_out]
        cross = (self.sums[held_out] / std).T @ mean_PxD
        tested = self.products[held_out] / scale - cross - cross.T + own * mean_PxD.T @ mean_PxD
        return fitted / (images * places), tested / (own * places)


@dataclass(frozen=True)
class Estimate:
    """A figure and its spread: the standard error by the jackknife over folds (CKA), or the standard deviation over
    held-out folds (R2)."""

    value: float
    spread: float


def alignment(moments: Moments, *, normalized: bool = True) -> dict[tuple[str, str], Estimate]:
    """Linear CKA of every two teachers: {(one, other): estimate}, teachers in their order.

    1 for tokens that are the same up to rotation and scale, 0 on average for unrelated ones, of which it may be a
    little below zero. `normalized`: every coordinate divided by its standard deviation, as training does.

    Raises:
      ValueError: too few images to tell.
    """
    names = list(moments.widths)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i:]]
    inner = {pair: _fold_products(moments, *pair, normalized) for pair in pairs}
    folds = range(len(moments.images))

    def cka(a: str, b: str, left_out: int | None = None) -> float:
        aa, bb = (_own_square(inner[name, name], moments.images, name, left_out) for name in (a, b))
        return float(_between_folds(inner[a, b], moments.images, left_out) / np.sqrt(aa * bb))

    found = {}
    for a, b in pairs:
        if a != b:
            without = np.array([cka(a, b, fold) for fold in folds])
            error = np.sqrt((len(folds) - 1) * np.mean((without - without.mean()) ** 2))
            found[a, b] = Estimate(cka(a, b), float(error))
    return found


def _fold_products(moments: Moments, a: str, b: str, normalized: bool) -> np.ndarray:
    """[K, K]: inner products of the folds' cross-covariances of two teachers."""
    rows, columns = moments.columns([a]), moments.columns([b])
    scale = np.outer(moments.std()[rows], moments.std()[columns]) if normalized else 1.0
    flat = [(moments.covariance(k, rows, columns) / scale).ravel() for k in range(len(moments.images))]
    return np.array([[x @ y for y in flat] for x in flat])


def _between_folds(inner: np.ndarray, images: np.ndarray, left_out: int | None = None) -> float:
    """Mean of the products of different folds, weighted by the pairs of images in them."""
    weights = np.outer(images, images).astype(np.float64)
    np.fill_diagonal(weights, 0.0)
    if left_out is not None:
        weights[left_out], weights[:, left_out] = 0.0, 0.0
    return float((weights * inner).sum() / weights.sum())


def _own_square(inner: np.ndarray, images: np.ndarray, name: str, left_out: int | None = None) -> float:
    """Squared norm of a teacher's own covariance; raises ValueError where too few images tell no norm."""
    square = _between_folds(inner, images, left_out)
    if square <= 0:
        raise ValueError(f"the images are too few to tell how the tokens of teacher {name!r} vary")
    return square


def predictability(
    moments: Moments, questions: Sequence[tuple[tuple[str, ...], str]], penalties: Sequence[float]
) -> dict[tuple[tuple[str, ...], str], Estimate]:
    """R2 of a teacher's normalised tokens, predicted by ridge regression from those of others: {question: estimate}.

    A question is (teachers to predict from, teacher to predict). R2 is 1 - squared error / squared distance from the
    mean at the place, over all coordinates, of images that the regression has not seen: every fold is held out once,
    the penalty chosen on a second one, and the weights then fitted on all but the first. 0 is what the mean at every
    place gives, 1 a perfect prediction; below 0 where a regression is worse than that mean.

    Args:
      penalties: to choose from; added to the mean square of normalised coordinates, which is about 1.
    """
    folds = range(len(moments.images))
    targets: dict[tuple[str, ...], list[str]] = {}
    for sources, target in questions:
        targets.setdefault(sources, []).append(target)
    errors = {question: np.zeros((2, len(folds))) for question in questions}  # of the ridge, of the mean
    for fold in folds:
        chosen_on = (fold + 1) % len(folds)
        rest = [k for k in folds if k != fold]
        choice = moments.split([k for k in rest if k != chosen_on], chosen_on)
        final = moments.split(rest, fold)
        for sources, names in targets.items():
            a, bs = moments.columns(sources), [moments.columns([name]) for name in names]
            for name, b, penalty in zip(names, bs, _best_penalties(*choice, a, bs, penalties), strict=True):
                errors[sources, name][:, fold] = _errors(*final, a, b, penalty) * moments.images[fold]
    return {
        question: Estimate(float(1 - error.sum() / baseline.sum()), float(np.std(1 - error / baseline)))
        for question, (error, baseline) in errors.items()
    }


def _best_penalties(
    fit: np.ndarray, tested: np.ndarray, a: np.ndarray, bs: Sequence[np.ndarray], penalties: Sequence[float]
) -> list[float]:
    """Of every target the penalty with the smallest error on the tested fold; one eigendecomposition serves all."""
    values, vectors = np.linalg.eigh(fit[np.ix_(a, a)])
    inverse = 1.0 / (np.maximum(values, 0.0) + np.asarray(penalties, np.float64)[:, None])  # [penalties, Da]
    between = vectors.T @ tested[np.ix_(a, a)] @ vectors
    best = []
    for b in bs:
        weights, cross = vectors.T @ fit[np.ix_(a, b)], vectors.T @ tested[np.ix_(a, b)]
        square = (weights @ weights.T) * between
        error = np.einsum("li,ij,lj->l", inverse, square, inverse, optimize=True)
        best.append(penalties[int(np.argmin(error - 2 * inverse @ (weights * cross).sum(axis=1)))])
    return best


def _errors(fit: np.ndarray, tested: np.ndarray, a: np.ndarray, b: np.ndarray, penalty: float) -> np.ndarray:
    """Squared error a token on the tested fold: [of the ridge fitted on `fit`, of the mean at every place]."""
    weights = np.linalg.solve(fit[np.ix_(a, a)] + penalty * np.eye(len(a)), fit[np.ix_(a, b)])
    total = float(np.trace(tested[np.ix_(b, b)]))
    cross = np.sum(weights * tested[np.ix_(a, b)])
    return np.array([total - 2 * cross + np.sum(weights * (tested[np.ix_(a, a)] @ weights)), total])


def spread(moments: Moments, name: str) -> dict[str, float]:
    """How the variance of one teacher's tokens lies: over coordinates, directions and places.

    Returns:
      width: coordinates. std_median, std_largest: of their standard deviations, and std_ratio, the largest by the
      median. dead: coordinates that vary less than the floor of training's statistics, which holds them down.
      participation: (sum of eigenvalues)^2 / sum of their squares of the covariance of normalised tokens, with the
      unbiased sum of squares; the number of directions that share the variance. participation_raw: without
      normalising. effective_rank: exp(entropy of the normalised tokens' eigenvalues); too low with few images.
      place_share: part of the variance that the place alone explains, whatever the image.

    Raises:
      ValueError: too few images to tell.
    """
    columns, folds = moments.columns([name]), range(len(moments.images))
    variances, by_place = (x[columns] for x in moments.variances())
    std = np.sqrt(variances)
    floored = np.maximum(std, STD_FLOOR)
    weights = moments.images / moments.images.sum()
    raw = sum(w * moments.covariance(k, columns, columns) for k, w in zip(folds, weights, strict=True))
    eigenvalues = np.maximum(np.linalg.eigvalsh(raw / np.outer(floored, floored)), 0.0)
    shares = eigenvalues[eigenvalues > 0] / eigenvalues.sum()
    squares = {n: _own_square(_fold_products(moments, name, name, n), moments.images, name) for n in (True, False)}
    return {
        "width": len(columns),
        "std_median": float(np.median(std)),
        "std_largest": float(std.max()),
        "std_ratio": float(std.max() / max(np.median(std), np.finfo(np.float32).tiny)),
        "dead": int((std < STD_FLOOR).sum()),
        "participation": float(eigenvalues.sum() ** 2 / squares[True]),
        "participation_raw": float(np.trace(raw) ** 2 / squares[False]),
        "effective_rank": float(np.exp(-np.sum(shares * np.log(shares)))),
        "place_share": float(by_place.sum() / variances.sum()),
    }
