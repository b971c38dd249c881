"""Scores of one predicted mean profile."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def mae(predicted: ArrayLike, observed: ArrayLike) -> float:
    """Mean absolute error between two mean profiles.

    Parameters
    ----------
    predicted
        Predicted profile, (n_genes,).
    observed
        Real profile, (n_genes,).

    Returns
    -------
    The error, in the unit of the profiles; 0 is perfect.

    Examples
    --------
    >>> vc.metrics.mae([1.0, 2.0], [1.0, 2.5])
    0.25
    """
    predicted, observed = same_shape(predicted, observed)
    return float(np.abs(predicted - observed).mean())


def mse(predicted: ArrayLike, observed: ArrayLike) -> float:
    """Mean squared error between two mean profiles.

    Parameters
    ----------
    predicted
        Predicted profile, (n_genes,).
    observed
        Real profile, (n_genes,).

    Returns
    -------
    The error, in the squared unit of the profiles; 0 is perfect.

    Examples
    --------
    >>> vc.metrics.mse([1.0, 2.0], [1.0, 2.5])
    0.125
    """
    predicted, observed = same_shape(predicted, observed)
    return float(np.square(predicted - observed).mean())


def pearson_delta(predicted: ArrayLike, observed: ArrayLike, control: ArrayLike) -> float:
    """Correlation over genes between the predicted and the observed effect.

    Parameters
    ----------
    predicted
        Profile of the predicted cells, (n_genes,).
    observed
        Profile of the real perturbed cells, (n_genes,).
    control
        Profile of the real control cells, (n_genes,).

    Returns
    -------
    Pearson's r of `predicted - control` and `observed - control`; 0 for a prediction without any effect, for which r is
    not defined.

    Examples
    --------
    >>> control = [1.0, 1.0, 1.0]
    >>> half = vc.metrics.pearson_delta([1.0, 1.5, 2.0], [1.0, 2.0, 3.0], control)  # half of the size
    >>> round(half, 3)
    1.0
    """
    predicted, observed = same_shape(predicted, observed)
    _, control = same_shape(predicted, control)
    x, y = predicted - control, observed - control
    x, y = x - x.mean(), y - y.mean()
    if no_effect(x, control) or no_effect(y, control):
        return 0.0
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


def top_overlap(predicted: ArrayLike, observed: ArrayLike, control: ArrayLike, *, k: int = 50) -> float:
    """Share of the k genes with the largest real effect that are among the k with the largest predicted one.

    Effects are compared by size, whatever their sign. Genes without any predicted effect are not among the largest.

    Parameters
    ----------
    predicted
        Profile of the predicted cells, (n_genes,).
    observed
        Profile of the real perturbed cells, (n_genes,).
    control
        Profile of the real control cells, (n_genes,).
    k
        Number of genes that count as the largest; all genes where there are fewer.

    Returns
    -------
    The share; 1 is perfect, k / n_genes chance.

    Examples
    --------
    >>> control = [0.0, 0.0, 0.0, 0.0]
    >>> vc.metrics.top_overlap([3.0, 0.1, 2.0, 0.0], [3.0, 2.0, 0.1, 0.0], control, k=2)
    0.5
    """
    predicted, observed = same_shape(predicted, observed)
    _, control = same_shape(predicted, control)
    if k < 1:
        raise ValueError(f"k={k!r}: at least one gene is needed.")
    x, y = np.abs(predicted - control), np.abs(observed - control)
    if no_effect(x, control):
        return 0.0
    k = min(k, len(x))
    top = np.intersect1d(largest(x, k), largest(y, k))
    return float((x[top] > 0).sum() / k)


def no_effect(effect: np.ndarray, control: np.ndarray) -> bool:
    """Whether an effect is none: float32 means of the same cells differ in the seventh digit, in any direction."""
    return bool(np.linalg.norm(effect) <= 1e-5 * np.linalg.norm(control))


def largest(values: np.ndarray, k: int | None) -> np.ndarray:
    """Return the indices of the k largest values, ties in the order they stand in."""
    keys = -values
    if k is None or not 0 < k < len(keys):
        return np.argsort(keys, kind="stable")[:k]
    candidates = np.flatnonzero(~(keys > np.partition(keys, k - 1)[k - 1]))  # few to sort
    return candidates[np.argsort(keys[candidates], kind="stable")[:k]]


def same_shape(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return both as float64, and raise if their genes cannot be the same."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"profiles must have the same genes, got shapes {a.shape} and {b.shape}.")
    return a, b
