"""Effects of perturbations that were never measured, from features: pure numpy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from virtualcell.models._closed_forms import unit_rows

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
