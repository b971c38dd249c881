"""Effects of perturbations that were never measured, from features: pure numpy."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np

from virtualcell.models._closed_forms import unit_rows

logger = logging.getLogger(__name__)

NEIGHBOURS = (5, 10, 20, 50, 100)
PENALTIES = np.logspace(-3, 4, 29)


@dataclass(frozen=True, eq=False)
class RidgeFit:
    """`effect = count * intercept + features @ coefficients`.

    Parameters
    ----------
    coefficients, intercept
        (n_features, n_genes) and (n_genes,).
    penalty
        Ridge penalty, in units of the mean squared length of a row of features.
    leave_one_out
        Prediction for each row of the training data from the others, (n_rows, n_genes).
    """

    coefficients: np.ndarray
    intercept: np.ndarray
    penalty: float
    leave_one_out: np.ndarray

    def effect(self, features: np.ndarray, count: float = 1) -> np.ndarray:
        """Return the effects, (..., n_genes), of rows of features."""
        return count * self.intercept + features @ self.coefficients


def ridge(
    features: np.ndarray, effects: np.ndarray, count: np.ndarray | None = None, *, penalties: np.ndarray = PENALTIES
) -> RidgeFit:
    """Regress effects on features of perturbations, with the mean effect as intercept (Ahlmann-Eltze et al. 2025).

    The penalty of `penalties` with the smallest squared error, each row predicted from the others, is chosen; these
    predictions are exact, from the leverages (PRESS).

    Parameters
    ----------
    features
        (n_perturbations, n_features).
    effects
        (n_perturbations, n_genes).
    count
        How many perturbations each row combines, (n_perturbations,), each adding the intercept once; 1 by default.
    penalties
        Penalties to choose from, in units of the mean squared length of a row of features.
    """
    x, y = np.asarray(features, dtype=np.float64), np.asarray(effects, dtype=np.float64)
    one = np.ones(len(x)) if count is None else np.asarray(count, dtype=np.float64)
    one = one / np.linalg.norm(one)
    u, s, vt = np.linalg.svd(x - np.outer(one, one @ x), full_matrices=False)
    left = y - np.outer(one, one @ y)
    rotated = u.T @ left
    unit = float((s**2).sum()) / len(x) or 1.0
    # squared residuals of all genes need the products of effects alone, n x n
    products = left @ left.T
    corner = rotated @ rotated.T
    crossed = u * (products @ u)
    best, error = penalties[-1], np.inf
    for penalty in penalties:
        keep = s**2 / (s**2 + penalty * unit)
        squared = np.diag(products) - 2 * crossed @ keep + (((u * keep) @ corner) * (u * keep)).sum(axis=1)
        free = 1 - one**2 - u**2 @ keep
        # a row that nothing but itself determines has no prediction from the others
        score = float((squared / np.maximum(free, 1e-6) ** 2).sum())
        if score < error:
            best, error = penalty, score
    keep = s**2 / (s**2 + best * unit)
    coefficients = (vt.T * (s / (s**2 + best * unit))) @ rotated
    scale = np.linalg.norm(np.ones(len(x)) if count is None else count)
    intercept = one @ (y - x @ coefficients) / scale
    residual = left - (u * keep) @ rotated
    out = y - residual / np.maximum(1 - one**2 - u**2 @ keep, 1e-6)[:, None]
    return RidgeFit(coefficients.astype(np.float32), intercept.astype(np.float32), float(best), out.astype(np.float32))


@dataclass(frozen=True, eq=False)
class NeighboursFit:
    """Mean effect of the measured perturbations with the most similar features (cosine).

    Parameters
    ----------
    features, effects
        Those of the measured perturbations, (n_perturbations, n_features) and (n_perturbations, n_genes).
    k
        How many neighbours are averaged.
    """

    features: np.ndarray
    effects: np.ndarray
    k: int = 10

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k={self.k!r}: at least one neighbour is needed.")

    @cached_property
    def _unit(self) -> np.ndarray:
        return unit_rows(self.features)

    def effect(self, query: np.ndarray) -> np.ndarray:
        """Return the effects, (n_query, n_genes), of rows of features."""
        order = np.argsort(-(unit_rows(query) @ self._unit.T), axis=1, kind="stable")[:, : self.k]
        return self.effects[order].mean(axis=1)


def nearest_perturbations(features: np.ndarray, effects: np.ndarray, query: np.ndarray, *, k: int = 10) -> np.ndarray:
    """Return the mean effect, (n_query, n_genes), of the k perturbations with the most similar features (cosine)."""
    return NeighboursFit(features, effects, k).effect(query)


# -- the better one ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FeatureFit:
    """What features tell of effects: the mean of the nearest perturbations, or a ridge regression.

    Parameters
    ----------
    coefficients, intercept
        Of the regression, (n_features, n_outputs) and (n_outputs,); zeros where neighbours are taken.
    features, effects
        Those of the perturbations that can be neighbours, (n_perturbations, n_features) and (n_perturbations,
        n_outputs); no rows where the regression is taken.
    k
        How many neighbours are averaged.
    amplitude
        What effects are multiplied by: the least-squares slope of those of perturbations that were left out.
    error
        Root mean square of what that leaves of each output, (n_outputs,).
    """

    coefficients: np.ndarray
    intercept: np.ndarray
    features: np.ndarray
    effects: np.ndarray
    k: int = 10
    amplitude: float = 1.0
    error: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))

    @classmethod
    def none(cls) -> Self:
        """Without features."""
        return cls(*(np.zeros(shape, np.float32) for shape in ((0, 0), 0, (0, 0), (0, 0))))

    def on(self, axes: np.ndarray) -> Self:
        """Return the same fit with effects as scores on axes over genes."""
        return dataclasses.replace(
            self,
            coefficients=self.coefficients @ axes.T,
            intercept=axes @ self.intercept,
            effects=self.effects @ axes.T,
        )

    def effect(self, features: np.ndarray) -> np.ndarray:
        """Return the effects, (n, n_outputs), of rows of features of single perturbations."""
        if len(self.features):
            return NeighboursFit(self.features, self.effects, self.k).effect(features)
        return self.intercept + features @ self.coefficients


def fit_features(features: np.ndarray, effects: np.ndarray, count: np.ndarray) -> FeatureFit:
    """Fit neighbours and regression, and take the neighbours unless the regression is clearly better.

    Each perturbation is predicted from the others. Clearly better is by more than one standard error of the difference
    over perturbations: the regression extrapolates, which a mean of measured effects cannot.

    Parameters
    ----------
    features, effects, count
        As in :func:`ridge`.
    """
    single = np.flatnonzero(count == count.min())
    x, y = features[single], np.asarray(effects[single], np.float32)
    by_ridge = ridge(features, effects, count)
    k, left_out = _neighbours_left_out(x, y)
    errors = [np.square(p - y).sum(axis=1, dtype=np.float64) for p in (left_out, by_ridge.leave_one_out[single])]
    gain = errors[0] - errors[1]
    is_better = len(y) > 2 and gain.mean() > gain.std(ddof=1) / np.sqrt(len(y))
    predicted = by_ridge.leave_one_out[single] if is_better else left_out
    squares = np.square(predicted).sum(dtype=np.float64)
    amplitude = float(np.clip((predicted * y).sum(dtype=np.float64) / squares, 0, 1)) if squares > 0 else 1.0
    logger.info(
        "Perturbations that were never measured follow from features by %s, times %.2f.",
        *("ridge regression" if is_better else f"their {k} nearest neighbours", amplitude),
    )
    error = np.sqrt(np.square(amplitude * predicted - y).mean(axis=0))
    nothing = np.zeros((0, x.shape[1]), np.float32), np.zeros((0, y.shape[1]), np.float32)
    if is_better:
        return FeatureFit(by_ridge.coefficients, by_ridge.intercept, *nothing, amplitude=amplitude, error=error)
    zeros = np.zeros_like(by_ridge.coefficients), np.zeros_like(by_ridge.intercept)
    return FeatureFit(*zeros, x.astype(np.float32), y, k, amplitude, error)


def _neighbours_left_out(features: np.ndarray, effects: np.ndarray) -> tuple[int, np.ndarray]:
    """Return the best number of neighbours, and each perturbation's mean over so many of the others."""
    alike = unit_rows(features) @ unit_rows(features).T
    np.fill_diagonal(alike, -np.inf)
    order = np.argsort(-alike, axis=1, kind="stable")[:, :-1]  # the last is the perturbation itself
    if not order.shape[1]:
        return 1, np.zeros_like(effects)
    best, error, predicted = 1, np.inf, effects
    for k in sorted({min(k, order.shape[1]) for k in NEIGHBOURS}):
        means = np.stack([effects[near[:k]].mean(axis=0) for near in order])
        off = float(np.square(means - effects).sum(dtype=np.float64))
        if off < error:
            best, error, predicted = k, off, means
    return best, predicted
