"""Tables of effects in few numbers: scores on axes over genes that effects share, and what single genes do beyond."""

from __future__ import annotations

import logging

import numpy as np
from sklearn.utils.extmath import randomized_svd

from virtualcell.models._effects import Effects, group_means, group_sums, sum_of_squares

logger = logging.getLogger(__name__)

_EXACT = 512  # rows or genes up to which all axes are kept
_FEWEST, _MOST = 128, 256
_POWER_ITERATIONS = 2
_CLEAR = 4.0  # standard errors, beyond which what the axes miss of a gene is its own effect


def leading_axes(table: np.ndarray, noise: float, *, what: str = "measured effects") -> np.ndarray:
    """Orthonormal axes over genes, (n_axes, n_genes): `table @ axes.T @ axes` is the table, or close to it.

    With at most 512 rows or genes these are all axes there are, and nothing is lost. Otherwise the 128 leading
    principal axes are taken (without centring), and further ones until what is left out is less than the noise, but
    at most 256.

    Parameters
    ----------
    table
        Effects, or what is left of them, (n_rows, n_genes).
    noise
        Sum of the squared errors of all entries.
    what
        What the rows are, for the log.
    """
    n = min(table.shape)
    if n <= _EXACT:
        return np.linalg.svd(table.astype(np.float64), full_matrices=False)[2].astype(np.float32, order="C")
    _, sizes, axes = randomized_svd(table, min(n, _MOST), n_iter=_POWER_ITERATIONS, random_state=0)
    total = max(sum_of_squares(table), 1e-30)
    left_out = np.maximum(1 - np.cumsum(sizes.astype(np.float64) ** 2) / total, 0)
    n_axes = min(max(_FEWEST, 1 + int((left_out > noise / total).sum())), len(axes))
    logger.info(
        "%d %s are stored as %d components, which hold %.1f %% of their variance; measurement noise is %.1f %% of it.",
        *(len(table), what, n_axes, 100 * (1 - left_out[n_axes - 1]), 100 * min(noise / total, 1)),
    )
    # in the order of a file: products of arrays in another order differ in the last digit
    return np.ascontiguousarray(axes[:n_axes])


def single_genes(effects: Effects, scores: np.ndarray, axes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find genes that a perturbation clearly moves beyond what the axes tell, as a knockdown moves its target.

    What few axes leave out of an effect is mostly noise, but a gene that only one perturbation moves has no axis of its
    own. Clear is a mean over contexts of four standard errors.

    Returns
    -------
    Where the genes of each perturbation start in what follows, (n_perturbations + 1,); columns of these genes; and what
    the axes miss there, mean over contexts.
    """
    n_perturbations = len(effects.perturbations)
    missed = effects.perturbation_means() - group_means(scores, effects.perturbation, n_perturbations) @ axes
    n_contexts = np.bincount(effects.perturbation, minlength=n_perturbations)
    squared_error = group_sums(effects.variance, effects.perturbation, n_perturbations) / n_contexts[:, None] ** 2
    clear = (squared_error > 0) & (missed**2 > _CLEAR**2 * squared_error)
    start = np.concatenate([[0], np.cumsum(clear.sum(axis=1))])
    return start, np.nonzero(clear)[1].astype(np.int32), missed[clear]
