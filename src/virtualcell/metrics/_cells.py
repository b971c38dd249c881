"""Scores of the distribution of predicted cells."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

# Rows whose distances to the other set are in memory at one time.
_CHUNK = 1024
# Squared distances below this share of the squared norms have lost too many digits, and are computed again.
_CANCELLED = {"float32": 1e-3, "float64": 1e-8}
# Numbers in the differences between pairs of cells that are in memory at one time.
_AT_A_TIME = 2**20


def energy_distance(predicted: ArrayLike, observed: ArrayLike) -> float:
    """E|x-y| - E|x-x'| / 2 - E|y-y'| / 2 between two sets of cells, self-pairs included as zeros.

    It is the training loss of ST, half of the energy distance of Székely and Rizzo (2013).

    Parameters
    ----------
    predicted
        Predicted cells, (n, n_genes).
    observed
        Real cells, (m, n_genes).

    Returns
    -------
    The distance, in the unit of expression; 0 for the same set.

    Examples
    --------
    >>> cells = [[0.0, 0.0], [0.0, 2.0]]
    >>> vc.metrics.energy_distance(cells, cells)
    0.0
    >>> shifted = [[1.0, 0.0], [1.0, 2.0]]
    >>> round(vc.metrics.energy_distance(shifted, cells), 3)
    0.618
    """
    x, y = _two_sets(predicted, observed)
    within_x, within_y, between = mean_distances(np.concatenate([x, y]), len(x))
    return between - within_x / 2 - within_y / 2


def mmd(predicted: ArrayLike, observed: ArrayLike, *, bandwidths: ArrayLike = (0.5, 1.0, 2.0)) -> float:
    """Squared maximum mean discrepancy with Gaussian kernels (Gretton et al. 2012), self-pairs left out.

    `k(x, y) = mean over b of exp(-|x-y|² / (2 (b s)²))`, with s the median distance between observed cells.

    Parameters
    ----------
    predicted
        Predicted cells, (n, n_genes); principal components serve better than genes.
    observed
        Real cells, (m, n_genes).
    bandwidths
        Widths b of the kernels, as multiples of s.

    Returns
    -------
    The unbiased estimate; 0 is expected, and values below it occur, for two samples of one distribution. NaN with fewer
    than two cells on a side, or where most observed cells are identical.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> cells, others = rng.normal(size=(100, 5)), rng.normal(size=(100, 5))
    >>> vc.metrics.mmd(others, cells) < 0.01 < vc.metrics.mmd(others + 1, cells)
    True
    """
    x, y = _two_sets(predicted, observed)
    n, m = len(x), len(y)
    yy = _squared_distances(y, y)
    scale = np.median(yy[np.tri(m, k=-1, dtype=bool)]) if min(n, m) > 1 else 0.0
    if scale == 0:
        return float("nan")

    def kernel(squared: np.ndarray) -> float:
        return sum(np.exp(-squared / (2 * b**2 * scale)).sum() for b in np.ravel(bandwidths)) / np.size(bandwidths)

    own = (kernel(_squared_distances(x, x)) - n) / (n * (n - 1)) + (kernel(yy) - m) / (m * (m - 1))
    return float(own - 2 * kernel(_squared_distances(x, y)) / (n * m))


def variance_ratio(predicted_variance: ArrayLike, observed_variance: ArrayLike) -> float:
    """Variance over predicted cells against that over real ones: mode collapse shows as less than 1.

    Parameters
    ----------
    predicted_variance
        Variance over predicted cells of each gene, (n_genes,).
    observed_variance
        Variance over real cells of each gene, (n_genes,).

    Returns
    -------
    Mean over genes of predicted / real, each gene weighted by its real variance, which is the ratio of the sums; NaN
    where real cells do not vary.

    Examples
    --------
    >>> vc.metrics.variance_ratio([0.5, 1.0], [1.0, 2.0])  # predicted cells vary half as much as real ones
    0.5
    """
    predicted, observed = np.asarray(predicted_variance, np.float64), np.asarray(observed_variance, np.float64)
    if predicted.shape != observed.shape:
        raise ValueError(f"variances must be of the same genes, got shapes {predicted.shape} and {observed.shape}.")
    return float(predicted.sum() / observed.sum()) if observed.any() else float("nan")


def mean_distances(both: np.ndarray, n: int) -> tuple[float, float, float]:
    """Mean distance within the first n rows, within the others, and from one to the other."""
    if len(both) > 4 * _CHUNK:
        x, y = both[:n], both[n:]
        return mean_distance(x, x), mean_distance(y, y), mean_distance(x, y)
    distances = np.sqrt(_squared_distances(both, both))  # one product of a matrix with itself costs half
    parts = distances[:n, :n], distances[n:, n:], distances[:n, n:]
    first, second, between = (float(d.mean(dtype=np.float64)) for d in parts)
    return first, second, between


def mean_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Mean Euclidean distance over all pairs of rows of two matrices, both float32 or float64."""
    chunks = (_squared_distances(x[i : i + _CHUNK], y) for i in range(0, len(x), _CHUNK))
    total = sum(np.sqrt(c, out=c).sum(dtype=np.float64) for c in chunks)
    return float(total / (len(x) * len(y)))


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """|x-y|² of all pairs through one matrix product, many times faster than pair by pair."""
    squared = x @ y.T
    if x is y:
        xx = yy = squared.diagonal().copy()
    else:
        xx, yy = np.einsum("ij,ij->i", x, x), np.einsum("ij,ij->i", y, y)
    squared *= -2
    squared += xx[:, None]
    squared += yy
    if x is y:
        np.fill_diagonal(squared, np.inf)
    least = _CANCELLED[str(x.dtype)]
    if squared.min(initial=np.inf) < least * min(xx.max(initial=0), yy.max(initial=0)):  # seldom
        _compute_again(squared, squared < least * np.minimum.outer(xx, yy), x, y)
    if x is y:
        np.fill_diagonal(squared, 0)
    return squared


def _compute_again(squared: np.ndarray, cancelled: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
    """Fill in |x-y|² of the cancelled pairs, whose cells are nearly the same.

    A few are computed one by one. Many mean that a set repeats a cell, as a prediction of one profile does: cells close
    to one another are then compared by their differences to one of them, again in one matrix product.
    """
    i, j = np.nonzero(cancelled)
    if len(i) <= 2 * sum(squared.shape):
        step = max(1, _AT_A_TIME // x.shape[1])
        for pairs in np.split(np.arange(len(i)), range(step, len(i), step)):
            squared[i[pairs], j[pairs]] = np.square(x[i[pairs]] - y[j[pairs]]).sum(axis=1)
        return
    for centre in np.unique(i):
        columns = np.flatnonzero(cancelled[centre])
        if not len(columns):  # computed along with an earlier cell
            continue
        rows = np.flatnonzero(cancelled[:, columns].any(axis=1))
        near = _squared_distances(x[rows] - x[centre], y[columns] - x[centre])
        block = np.ix_(rows, columns)
        squared[block] = np.where(cancelled[block], near, squared[block])
        cancelled[block] = False


def _two_sets(predicted: ArrayLike, observed: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(predicted, dtype=np.float64), np.asarray(observed, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"predicted {x.shape} and observed {y.shape} must be cells x the same genes.")
    return x, y


def sums_over_cells(matrix: sparse.csr_matrix) -> np.ndarray:
    """Sum and sum of squares of each gene over cells, in float64, (2, n_genes)."""
    out = np.zeros((2, matrix.shape[1]))
    _add(matrix.indices, matrix.data, out)
    return out


@numba.njit(nogil=True, cache=True)
def _add(genes: np.ndarray, values: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(genes)):
        x, gene = np.float64(values[i]), genes[i]
        out[0, gene] += x
        out[1, gene] += x * x
