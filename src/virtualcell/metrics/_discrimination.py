"""Whether the predictions for different perturbations can be told apart."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial.distance import cdist

from virtualcell.metrics._profiles import no_effect, same_shape

_SCIPY_NAMES = {"l1": "cityblock", "l2": "euclidean", "cosine": "cosine"}


def discrimination_score(
    predicted: ArrayLike,
    observed: ArrayLike,
    control: ArrayLike,
    *,
    metric: Literal["l1", "l2", "cosine"] = "l1",
    target_genes: ArrayLike | None = None,
    ties: Literal["midrank", "rank"] = "midrank",
) -> np.ndarray:
    """Tell perturbations apart: share of the other real effects that lie farther from the predicted one than its own.

    `1 - PDisc` of the Virtual Cell Challenge, PDisc_p = r_p / n with r_p the number of perturbations whose real effect
    is nearer to the prediction for p than the real effect of p.

    Parameters
    ----------
    predicted
        Predicted profiles of the perturbations, (n_perturbations, n_genes).
    observed
        Real profiles of the perturbations in the same order, (n_perturbations, n_genes).
    control
        Profile of the real control cells, (n_genes,), or one per perturbation, (n_perturbations, n_genes).
    metric
        Distance between effects: "l1", "l2" or "cosine". The first two reward scaling the effect; cosine does not.
    target_genes
        Column of each perturbation's own target, which is left out of its comparison, or -1 where it has none;
        (n_perturbations,).
    ties
        What a real effect at the same distance as the right one counts in r_p: a half ("midrank"), or nothing ("rank",
        the letter of the definition, by which a prediction of no effect is perfect in cosine distance).

    Returns
    -------
    Score of each perturbation, (n_perturbations,); 1 is perfect, (n + 1) / (2 n) chance.

    Examples
    --------
    >>> observed = [[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]
    >>> predicted = [[0.9, 0.1], [0.2, 0.8], [0.9, 0.0]]  # the last resembles the first perturbation
    >>> scores = vc.metrics.discrimination_score(predicted, observed, control=[0.0, 0.0])
    >>> [round(float(score), 2) for score in scores]
    [1.0, 1.0, 0.33]
    """
    if metric not in _SCIPY_NAMES:
        raise ValueError(f"metric={metric!r} is unknown; valid are {list(_SCIPY_NAMES)}.")
    if ties not in ("midrank", "rank"):
        raise ValueError(f"ties={ties!r} is unknown; valid are ['midrank', 'rank'].")
    predicted, observed = same_shape(predicted, observed)
    control = np.broadcast_to(np.asarray(control, dtype=np.float64), predicted.shape)
    x, y = predicted - control, observed - control
    x[[no_effect(*pair) for pair in zip(x, control, strict=True)]] = 0
    n = len(x)
    targets = np.full(n, -1) if target_genes is None else np.asarray(target_genes)
    scores = np.empty(n)
    for p, gene in enumerate(targets):
        if gene >= 0:  # a gene that is zero on both sides adds nothing to any of the distances, and needs no copy
            kept = y[:, gene].copy()
            x[p, gene], y[:, gene] = 0, 0
        # a prediction without effect has no direction: it is equally far from all
        distance = np.nan_to_num(cdist(x[p : p + 1], y, metric=_SCIPY_NAMES[metric])[0], nan=1.0)
        if gene >= 0:
            y[:, gene] = kept
        nearer = (distance < distance[p]).sum()
        if ties == "midrank":
            nearer = nearer + ((distance == distance[p]).sum() - 1) / 2
        scores[p] = 1 - nearer / n
    return scores


def pdisc_norm(scores: ArrayLike) -> np.ndarray:
    """Put discrimination scores on the scale of the Virtual Cell Challenge 2025: PDiscNorm = 1 - 2 PDisc.

    Parameters
    ----------
    scores
        What :func:`discrimination_score` returned, which is 1 - PDisc.

    Returns
    -------
    `2 * scores - 1`; 1 is perfect, 1 / n_perturbations chance, and below 0 worse than chance.

    Examples
    --------
    >>> vc.metrics.pdisc_norm([1.0, 0.5]).tolist()
    [1.0, 0.0]
    """
    return 2 * np.asarray(scores, dtype=np.float64) - 1
