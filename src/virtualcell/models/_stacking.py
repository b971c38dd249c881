"""How much networks are worth beside the transferred effect: one weight, chosen on cells that were left out."""

from __future__ import annotations

import numpy as np

from virtualcell.models._effects import group_sums

WEIGHTS = (0.0, 0.25, 0.5, 2 / 3, 1.0)


def errors_of_weights(networks: np.ndarray, transferred: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Return the squared error of the weighted mean of two predicted profiles for each of `WEIGHTS`, (n_weights,)."""
    w = np.array(WEIGHTS)[:, None]
    return np.square(w * networks + (1 - w) * transferred - observed).sum(axis=1, dtype=np.float64)


def choose_weight(errors: np.ndarray, fold: np.ndarray) -> float:
    """Choose the smallest weight of the networks that is as good as the best one, within one standard error.

    Networks have to earn their weight: few left-out contexts tell little, and the transferred effect, which has nothing
    to learn, fails less badly. The standard error is that of the difference to the best weight: over predictions, and
    not less than over the folds, since the predictions of a fold come from one fit and err together.

    Parameters
    ----------
    errors
        Squared error of every prediction with each of `WEIGHTS`, (n_predictions, n_weights).
    fold
        What was left out together, a code for each prediction, (n_predictions,).
    """
    best = int(np.argmin(errors.mean(axis=0)))
    if len(errors) < 2:
        return WEIGHTS[best]
    worse = errors - errors[:, [best]]
    deviation = worse - worse.mean(axis=0)
    folds = np.unique(fold, return_inverse=True)[1]
    by_fold = group_sums(deviation, folds, folds.max() + 1)  # their sum is that over predictions
    tolerance = _standard_error_of_sum(deviation)
    if len(by_fold) > 1:
        tolerance = np.maximum(tolerance, _standard_error_of_sum(by_fold))
    within = worse.sum(axis=0) <= tolerance
    return WEIGHTS[int(np.flatnonzero(within)[0])]


def _standard_error_of_sum(parts: np.ndarray) -> np.ndarray:
    """Return the standard error of the sum of independent parts whose mean is 0, (n_parts, n) -> (n,)."""
    n = len(parts)
    return np.sqrt(np.square(parts).sum(axis=0) * n / (n - 1))
