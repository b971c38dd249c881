"""Wilcoxon's rank-sum test of many groups of cells, each against the same control cells."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numba
import numpy as np
from scipy import sparse, special, stats

from virtualcell._threads import count_threads

# Numbers of a dense block: genes are tested as many at a time as fit, so that control cells may be many.
_AT_A_TIME = 1 << 25
# Control cells that are compared with a value at once.
_NEAR = 16


def rank_sum_test(
    matrix: sparse.csr_matrix | np.ndarray, codes: np.ndarray, *, n_jobs: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Return p-values and adjusted p-values, (n_groups, n_genes), of groups 1, 2, ... against group 0.

    Two-sided, by the normal approximation with correction for ties and continuity: with U the number of pairs in which
    the cell of the group has the higher value, ties counted half, and t the number of cells that share a value,
    z = (|U - n_0 n_1 / 2| - 1/2) / s, s² = n_0 n_1 / 12 (n + 1 - sum of (t³ - t) / (n (n - 1))), n = n_0 + n_1.
    Control cells are sorted once, not once for each group.
    """
    values = matrix.data if sparse.issparse(matrix) else matrix
    if not np.isfinite(values).all():
        raise ValueError("cells holds NaN or infinite values: they have no rank. Set them to a number or drop them.")
    u, ties = _compared(matrix, codes, count_threads(n_jobs))
    sizes = np.bincount(codes).astype(np.float64)
    n_0, n_1 = sizes[0], sizes[1:, None]
    n, centre = n_0 + n_1, n_0 * n_1 / 2
    deviation = np.sqrt(centre / 6 * np.maximum(n + 1 - ties / (n * (n - 1)), 0))
    excess = np.maximum(np.abs(u - centre) - 0.5, 0)  # the correction for continuity must not overshoot
    z = np.divide(excess, deviation, out=np.zeros_like(u), where=deviation > 0)
    p = special.erfc(z / np.sqrt(2))
    return p, stats.false_discovery_control(p, axis=1)


def _compared(
    matrix: sparse.csr_matrix | np.ndarray, codes: np.ndarray, n_threads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return U and the sum of t³ - t, (n_groups, n_genes) each."""
    sizes, n_genes = np.bincount(codes), matrix.shape[1]
    rows = np.split(np.argsort(codes, kind="stable"), np.cumsum(sizes)[:-1])
    u, ties = np.empty((2, len(rows) - 1, n_genes))
    step = max(1, _AT_A_TIME // int(sizes.max()))
    with ThreadPoolExecutor(n_threads) as pool:
        for start in range(0, n_genes, step):
            genes = slice(start, min(start + step, n_genes))
            control = _sorted(matrix, rows[0], genes)
            own_ties = _ties(control)
            control = np.pad(control, ((0, 0), (0, _NEAR)), constant_values=np.inf)
            compare = partial(_compare_group, matrix, genes, control, own_ties)
            list(pool.map(compare, rows[1:], u[:, genes], ties[:, genes]))
    return u, ties


def _compare_group(matrix, genes: slice, control, own_ties, rows: np.ndarray, u: np.ndarray, ties: np.ndarray) -> None:
    _compare(control, own_ties, _sorted(matrix, rows, genes), u, ties)


def _sorted(matrix: sparse.csr_matrix | np.ndarray, rows: np.ndarray, genes: slice) -> np.ndarray:
    """Values of some cells in rising order for every gene, (n_genes, n_cells)."""
    block = matrix[rows]
    if block.shape[1] != genes.stop - genes.start:
        block = block[:, genes]
    dense = block.toarray() if sparse.issparse(block) else block
    kind = np.float32 if dense.dtype == np.float32 else np.float64
    out = np.array(dense.T, dtype=kind, order="C")
    out.sort(axis=1)
    return out


@numba.njit(nogil=True, cache=True)
def _end_of_run(row: np.ndarray, i: int) -> int:
    """Place after the last value that is the same as row[i], with steps that grow and shrink."""
    value, n, step = row[i], len(row), 1
    while i + step < n and row[i + step] == value:
        i += step
        step *= 2
    while step > 1:
        step //= 2
        if i + step < n and row[i + step] == value:
            i += step
    return i + 1


@numba.njit(nogil=True, cache=True)
def _ties(rows: np.ndarray) -> np.ndarray:
    """Sum of t³ - t over the values of each sorted row."""
    out = np.zeros(len(rows))
    for gene in range(len(rows)):
        i = 0
        while i < rows.shape[1]:
            end = _end_of_run(rows[gene], i)
            t = float(end - i)
            out[gene] += t * t * t - t
            i = end
    return out


@numba.njit(nogil=True, cache=True)
def _compare(control: np.ndarray, own_ties: np.ndarray, group: np.ndarray, u: np.ndarray, ties: np.ndarray) -> None:
    """Fill in U and the sum of t³ - t over both sets of cells, for each gene, from sorted rows.

    Those of the control have infinities behind the last cell, so that any _NEAR values from a cell on can be read.
    """
    n_control, n_group = control.shape[1] - _NEAR, group.shape[1]
    for gene in range(len(group)):
        a, b = control[gene], group[gene]
        total, tied, below, i = 0.0, own_ties[gene], 0, 0
        while i < n_group:
            value, step = b[i], _NEAR
            while below + step <= n_control and a[below + step - 1] < value:
                below += step
                step *= 2
            while step > _NEAR:
                step //= 2
                if below + step <= n_control and a[below + step - 1] < value:
                    below += step
            lower = 0
            for k in range(_NEAR):  # all of them, which takes a processor less time than to guess where to stop
                lower += a[below + k] < value
            below += lower
            end = i + 1
            if end < n_group and b[end] == value:
                end = _end_of_run(b, i)
            t, same = float(end - i), 0.0
            if below < n_control and a[below] == value:
                same = float(_end_of_run(a, below) - below)
            total += t * (below + same / 2)
            if t + same > 1:
                tied += (t + same) ** 3 - same**3 - t
            i = end
        u[gene], ties[gene] = total, tied
