"""How good a prediction is: pure functions on arrays. Definitions follow the Virtual Cell Challenge and cell-eval.

Profiles are mean expression per gene, log(1 + counts per 10,000) unless said otherwise; effects are differences to the
mean of the **real** control cells.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial.distance import cdist

__all__ = ["discrimination_score", "energy_distance", "mae", "pearson_delta"]


def mae(predicted: ArrayLike, observed: ArrayLike) -> float:
    """Mean absolute error between two mean profiles.

    Parameters
    ----------
    predicted, observed
        Profiles, (n_genes,).

    Returns
    -------
    The error, in the unit of the profiles; 0 is perfect.
    """
    predicted, observed = _same_shape(predicted, observed)
    return float(np.abs(predicted - observed).mean())


def pearson_delta(predicted: ArrayLike, observed: ArrayLike, control: ArrayLike) -> float:
    """Correlation over genes between the predicted and the observed effect.

    Parameters
    ----------
    predicted, observed, control
        Profiles of the predicted, the real perturbed and the real control cells, (n_genes,).

    Returns
    -------
    Pearson's r of `predicted - control` and `observed - control`; 0 for a prediction without any effect, for which r is
    not defined.
    """
    predicted, observed = _same_shape(predicted, observed)
    _, control = _same_shape(predicted, control)
    x, y = predicted - control, observed - control
    x, y = x - x.mean(), y - y.mean()
    norms = np.linalg.norm(x), np.linalg.norm(y)
    # float32 means of the same cells differ in the seventh digit: that is no effect, and has no direction
    if min(norms) <= 1e-5 * np.linalg.norm(control):
        return 0.0
    return float(x @ y / (norms[0] * norms[1]))


def energy_distance(predicted: ArrayLike, observed: ArrayLike) -> float:
    """E|x-y| - E|x-x'| / 2 - E|y-y'| / 2 between two sets of cells, self-pairs included as zeros.

    It is the training loss of ST, half of the energy distance of Székely and Rizzo (2013).

    Parameters
    ----------
    predicted, observed
        Cells, (n, n_genes) and (m, n_genes).

    Returns
    -------
    The distance, in the unit of expression; 0 for the same set.
    """
    x, y = np.asarray(predicted, dtype=np.float64), np.asarray(observed, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"predicted {x.shape} and observed {y.shape} must be cells x the same genes.")
    return float(cdist(x, y).mean() - cdist(x, x).mean() / 2 - cdist(y, y).mean() / 2)


def discrimination_score(
    predicted: ArrayLike,
    observed: ArrayLike,
    control: ArrayLike,
    *,
    metric: str = "l1",
    target_genes: ArrayLike | None = None,
) -> np.ndarray:
    """Tell perturbations apart: share of the other real effects that lie farther from the predicted one than its own.

    `1 - PDisc` of the Virtual Cell Challenge, PDisc_p = r_p / n with r_p the number of perturbations whose real effect
    is nearer to the prediction for p than the real effect of p. Ties count half.

    Parameters
    ----------
    predicted, observed
        Profiles of the perturbations in the same order, (n_perturbations, n_genes).
    control
        Profile of the real control cells, (n_genes,), or one per perturbation, (n_perturbations, n_genes).
    metric
        "l1", "l2" or "cosine". The first two reward scaling the effect; cosine does not.
    target_genes
        Column of each perturbation's own target, which is left out of its comparison, or -1; (n_perturbations,).

    Returns
    -------
    Score of each perturbation, (n_perturbations,); 1 is perfect, 0.5 chance for many perturbations.
    """
    names = {"l1": "cityblock", "l2": "euclidean", "cosine": "cosine"}
    if metric not in names:
        raise ValueError(f"metric={metric!r} is unknown; valid are {list(names)}.")
    predicted, observed = _same_shape(predicted, observed)
    x, y = predicted - np.asarray(control), observed - np.asarray(control)
    n = len(x)
    targets = np.full(n, -1) if target_genes is None else np.asarray(target_genes)
    scores = np.empty(n)
    for p in range(n):
        genes = np.arange(x.shape[1]) != targets[p]
        # a prediction without effect has no direction: it is equally far from all
        distance = cdist(x[p : p + 1, genes], y[:, genes], metric=names[metric])[0]
        distance = np.nan_to_num(distance, nan=1.0)
        nearer = (distance < distance[p]).sum() + ((distance == distance[p]).sum() - 1) / 2
        scores[p] = 1 - nearer / n
    return scores


def _same_shape(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"profiles must have the same genes, got shapes {a.shape} and {b.shape}.")
    return a, b
