"""How much networks are worth beside the transferred effect: one weight, chosen on cells that were left out."""

from __future__ import annotations

import numpy as np

WEIGHTS = (0.0, 0.25, 0.5, 2 / 3, 1.0)


def errors_of_weights(networks: np.ndarray, transferred: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Return the squared error of the weighted mean of two predicted profiles for each of `WEIGHTS`, (n_weights,)."""
    w = np.array(WEIGHTS)[:, None]
    return np.square(w * networks + (1 - w) * transferred - observed).sum(axis=1, dtype=np.float64)


def choose_weight(errors: np.ndarray) -> float:
    """Choose the smallest weight of the networks that is as good as the best one, within one standard error.

    Networks have to earn their weight: few left-out contexts tell little, and the transferred effect, which has nothing
    to learn, fails less badly. The standard error is that of the difference to the best weight, over predictions.

    Parameters
    ----------
    errors
        Squared error of every prediction with each of `WEIGHTS`, (n_predictions, n_weights).
    """
    best = int(np.argmin(errors.mean(axis=0)))
    if len(errors) < 2:
        return WEIGHTS[best]
    worse = errors - errors[:, [best]]
    within = worse.mean(axis=0) <= worse.std(axis=0, ddof=1) / np.sqrt(len(errors))
    return WEIGHTS[int(np.flatnonzero(within)[0])]
