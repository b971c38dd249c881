"""From expression on a continuous scale to whole counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy import sparse

from virtualcell.data._scales import smallest_counts

Sampling = Literal["systematic", "multinomial", "averaged"]
_ROWS = 1000  # drawn at a time, which bounds the memory
_AVERAGED = 4  # predicted cells that sampling="averaged" takes the mean of


class NoCountsError(ValueError):
    """Expression on a logarithmic scale that was not made of whole counts."""


def library_of(log_expression: sparse.csr_matrix, target_sum: float = 1e4) -> np.ndarray:
    """Find the library size of each cell, (n_cells,), from logarithms of normalised counts.

    The smallest value of a cell is one count, which tells what one count became. Where genes were left out it may be
    two or more: the fewest are taken with which all values of the cell are whole numbers of counts within 1 %. A cell
    that expresses nothing tells nothing, and is taken to be as deep as the median of the others.

    Raises
    ------
    NoCountsError
        If a cell has other values.
    """
    log = sparse.csr_matrix(log_expression, dtype=np.float64)
    width = np.diff(log.indptr)
    full = np.flatnonzero(width)
    # the method expm1 sorts the places of values, which belong to the caller's matrix too
    rates = sparse.csr_matrix((np.expm1(log.data), log.indices, log.indptr), shape=log.shape)
    smallest, n = smallest_counts(rates)
    fits = n > 0
    library = np.full(len(width), np.nan)
    library[fits] = n[fits] * target_sum / smallest[fits]
    lost = full[np.isnan(library[full])]
    if len(lost):
        raise NoCountsError(
            f"scale='log1p' was stated, and {len(lost)} of {len(full)} cells are not made of whole counts: their "
            "values are no multiples of the smallest one. Give raw counts with scale='counts', or say emit='mean' for "
            "mean profiles in place of cells."
        )
    if not len(full):
        return np.full(len(width), float(target_sum))
    near = np.rint(library)
    library = np.where(np.abs(library - near) < 0.01 + 1e-6 * library, near, library)
    return np.where(np.isnan(library), np.rint(np.nanmedian(library)), library)


def counts_of(log_expression: sparse.csr_matrix, library: np.ndarray, target_sum: float = 1e4) -> sparse.csr_matrix:
    """Undo the normalisation of whole counts: float32 CSR with the same entries."""
    size = np.repeat(library / target_sum, np.diff(log_expression.indptr))
    counts = np.rint(np.expm1(log_expression.data.astype(np.float64)) * size).astype(np.float32)
    return sparse.csr_matrix((counts, log_expression.indices, log_expression.indptr), shape=log_expression.shape)


def log_of(counts: sparse.csr_matrix, library: np.ndarray, target_sum: float = 1e4) -> sparse.csr_matrix:
    """Return log(1 + counts per `target_sum`), to the last bit as expression is read from counts."""
    log = counts.astype(np.float32)
    log.data *= np.repeat((target_sum / library).astype(np.float32), np.diff(log.indptr))
    np.log1p(log.data, out=log.data)
    return log


def averaged(log_expression: sparse.csr_matrix, groups: np.ndarray, *, seed: int = 0) -> sparse.csr_matrix:
    """Put the mean of four cells of its group, itself among them, in the place of each cell.

    Parameters
    ----------
    log_expression
        Cells x genes, log(1 + expression); means are taken of the expression.
    groups
        Code of each cell's group, (n_cells,): its perturbation and context.
    seed
        Seed of the draw of the other cells, which fewer than four in a group leave fewer.
    """
    rows, others = [], []
    rng = np.random.default_rng(seed)
    for group in np.unique(groups):
        cells = rng.permutation(np.flatnonzero(groups == group))
        for shift in range(min(_AVERAGED, len(cells))):
            rows.append(cells)
            others.append(np.roll(cells, shift))
    n, n_cells = len(groups), np.bincount(np.concatenate(rows), minlength=len(groups))
    at = np.concatenate(rows), np.concatenate(others)
    mean = sparse.csr_matrix((1 / n_cells[at[0]], at), shape=(n, n))
    return sparse.csr_matrix(
        (mean @ sparse.csr_matrix(log_expression, dtype=np.float64).expm1()).log1p(), dtype=np.float32
    )


def depth_matched_counts(
    log_expression: sparse.csr_matrix,
    depths: Sequence[int],
    *,
    genes: Sequence[str],
    sampling: Sampling = "systematic",
    seed: int = 0,
) -> sparse.csr_matrix:
    """Draw whole counts with the given total of each cell; :func:`virtualcell.tl.prepare_submission` says why and how.

    Parameters
    ----------
    log_expression
        Cells x genes, log(1 + expression) in any unit: only the shares within a cell enter.
    depths
        Total of each cell.
    genes
        Names of the columns. Draws go by them, so that the order of the columns does not matter.
    sampling
        "multinomial" counts molecules; otherwise each expected count is rounded up or down.
    seed
        Of the draws.

    Returns
    -------
    Counts as float32 CSR, without stored zeros.
    """
    by_name = np.argsort(np.asarray(genes, dtype=str))
    back = np.argsort(by_name)
    rng = np.random.default_rng(seed)
    draw = rng.multinomial if sampling == "multinomial" else lambda n, share: _round_at_random(n * share, rng)
    blocks = []
    for start in range(0, log_expression.shape[0], _ROWS):
        block = sparse.csr_matrix(log_expression[start : start + _ROWS][:, by_name], dtype=np.float64)
        block.sort_indices()
        block.eliminate_zeros()
        np.expm1(block.data, out=block.data)
        for i, (begin, end) in enumerate(zip(block.indptr[:-1], block.indptr[1:], strict=True)):
            rate = block.data[begin:end]
            if not rate.size:
                raise ValueError(f"cell {start + i} of predicted expresses nothing, so that it has no counts to draw.")
            rate[:] = draw(int(depths[start + i]), rate / rate.sum())
        block.eliminate_zeros()
        blocks.append(block[:, back].astype(np.float32))
    return sparse.vstack(blocks, format="csr")


def _round_at_random(expected: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Round to whole numbers, each up or down, with the same means and, as that is whole, the same sum."""
    # marks one apart, laid at a random place along the cumulated values; shuffled, so that no two genes are tied
    order = rng.permutation(len(expected))
    edges = np.floor(np.cumsum(expected[order]) + rng.random())
    edges[-1] = np.rint(expected.sum())
    rounded = np.empty_like(expected)
    rounded[order] = np.diff(edges, prepend=0)
    return rounded
