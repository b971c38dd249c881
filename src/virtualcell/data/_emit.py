"""Predicted changes put onto real cells, in whole counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from virtualcell.data._draws import by_name, moved, seed_of, seeds_of, to_totals

_FEWEST_CELLS = 20  # with fewer, a variance says nothing
_GENES_PER_LEVEL, _MOST_LEVELS = 50, 20  # of which the trend of dispersions is made


def emit_counts(
    counts: sparse.csr_matrix | sparse.csc_matrix,
    library: np.ndarray,
    change: np.ndarray,
    *,
    genes: Sequence[str],
    dispersion: np.ndarray | None = None,
    target_sum: float = 1e4,
    key: str = "",
    seed: int = 0,
) -> sparse.csr_matrix:
    """Change the mean of log(1 + counts per `target_sum`) of each gene over some cells by adding and removing counts.

    Counts of a gene that falls are lost with the same probability each (binomial thinning); to one that rises, negative
    binomial counts in proportion to library size are added. Counts go or come one after the other until the mean is as
    wanted, so that the mean is met to within one count while the numbers in single cells stay binomial and negative
    binomial. A gene without change keeps its counts, and zeros of a gene that does not rise stay zeros.

    Where `counts` is the whole library, each cell keeps its total: what it has too much or too little is taken from or
    given to all its genes in proportion, see :func:`with_totals`. Changes that do not add up to none are thereby made
    to, and then also move the genes without change. Where it is a part, no cell gets more than its library.

    Parameters
    ----------
    counts
        Whole counts of the cells to start from, in the order of their names, (n_cells, n_genes); soonest as CSC.
    library
        Library size of each cell, (n_cells,), which it keeps.
    change
        Wanted change of each gene's mean, (n_genes,), natural logarithm.
    genes
        Names of the genes. Draws go by them, so that the order of the columns does not matter.
    dispersion
        Of what is added, (n_genes,): variance = mean + dispersion * mean². Poisson by default.
    target_sum
        Counts per cell after normalisation.
    key
        What else tells the draws apart, such as context and perturbation.
    seed
        Seed of the draws.

    Returns
    -------
    Whole counts as float32 CSR, without stored zeros.
    """
    columns = sparse.csc_matrix(counts)  # itself, where it is one
    columns.sort_indices()
    indptr, cells, values = moved(
        columns.indptr.astype(np.int64),
        columns.indices,
        columns.data,
        np.asarray(change, dtype=np.float64) * counts.shape[0],
        np.zeros(len(change)) if dispersion is None else dispersion,
        np.asarray(library, dtype=np.float64),
        target_sum / library,
        seeds_of(genes, seed, key),
    )
    out = sparse.csc_matrix((values, cells, indptr), shape=counts.shape).tocsr()
    if is_whole_library(counts, library):
        return with_totals(out, library, genes=genes, instead=counts, key=key, seed=seed)
    sums = np.asarray(out.sum(axis=1, dtype=np.float64)).ravel()
    if (sums > library).any():
        out = with_totals(out, np.minimum(sums, np.floor(library)), genes=genes, key=key, seed=seed)
    return out


def is_whole_library(counts: sparse.csr_matrix, library: np.ndarray) -> bool:
    """Tell whether the genes are all that library sizes were summed over."""
    return bool(np.array_equal(np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel(), library))


@dataclass(frozen=True, eq=False)
class Dispersions:
    """Dispersion of each gene over cells, and its trend with expression.

    Parameters
    ----------
    own
        Dispersion of each gene, (n_genes,); infinite where it was not expressed, so that nothing is known.
    mean
        Mean of log(1 + normalised counts) of each gene, (n_genes,).
    levels, trend
        Median dispersion of genes with a similar mean, and that mean, (n_levels,) each.
    """

    own: np.ndarray
    mean: np.ndarray
    levels: np.ndarray
    trend: np.ndarray

    @classmethod
    def measure(cls, counts: sparse.csr_matrix, library: np.ndarray, target_sum: float = 1e4) -> Dispersions:
        """Estimate dispersions by the method of moments.

        Of counts x of cells with size factors f (library size over its mean), the variance of x / f is
        mean * E[1 / f] + dispersion * mean².
        """
        n, n_genes = counts.shape
        if n < _FEWEST_CELLS:
            return cls(np.zeros(n_genes), np.zeros(n_genes), np.zeros(1), np.zeros(1))
        factor = library / library.mean()
        x = sparse.csr_matrix(counts, dtype=np.float64).multiply(1 / factor[:, None]).tocsc()
        mean = np.asarray(x.mean(axis=0)).ravel()
        variance = (np.asarray(x.multiply(x).mean(axis=0)).ravel() - mean**2) * n / (n - 1)
        own, is_on = np.full(n_genes, np.inf), mean > 0
        own[is_on] = np.maximum((variance - mean * np.mean(1 / factor))[is_on] / mean[is_on] ** 2, 0)
        x.data = np.log1p(x.data * target_sum / library.mean())
        log_mean = np.asarray(x.mean(axis=0)).ravel()
        order = np.flatnonzero(is_on)[np.argsort(log_mean[is_on], kind="stable")]
        if not len(order):
            return cls(own, log_mean, np.zeros(1), np.zeros(1))
        groups = np.array_split(order, min(_MOST_LEVELS, max(1, len(order) // _GENES_PER_LEVEL)))
        levels, trend = ([float(np.median(of[g])) for g in groups] for of in (log_mean, own))
        return cls(own, log_mean, np.array(levels), np.array(trend))

    def after(self, change: np.ndarray) -> np.ndarray:
        """Dispersion of what is added to each gene, (n_genes,), where its mean changes by so much.

        That of the gene, but at most what genes have at the mean that it comes to: a gene that is silent in all but a
        few cells has a large dispersion, which it loses when most cells express it.
        """
        return np.minimum(self.own, np.interp(self.mean + change, self.levels, self.trend))


def with_totals(
    counts: sparse.csr_matrix,
    totals: np.ndarray,
    *,
    genes: Sequence[str],
    instead: sparse.csr_matrix | None = None,
    key: str = "",
    seed: int = 0,
) -> sparse.csr_matrix:
    """Give cells other totals: counts are lost at random, or come to genes in proportion to what the cell has of them.

    Parameters
    ----------
    counts
        Whole counts, (n_cells, n_genes).
    totals
        Whole number of counts that each cell is to have, (n_cells,).
    genes
        Names of the genes, by which the draws go.
    instead
        Counts whose genes a cell that has none is given, (n_cells, n_genes).
    key, seed
        As in :func:`emit_counts`.

    Raises
    ------
    ValueError
        For a cell without counts that is to have some.
    """
    order = by_name(tuple(genes))
    in_order = np.array_equal(order, np.arange(len(order)))
    out = counts.copy() if in_order else counts[:, order]
    out.sort_indices()
    wanted = np.rint(totals).astype(np.int64)
    sums = np.asarray(out.sum(axis=1, dtype=np.float64)).ravel()
    to_totals(out.indptr, out.data, wanted, seed_of(seed, key))
    empty = np.flatnonzero((sums == 0) & (wanted > 0))
    if len(empty):
        rng = np.random.default_rng(seed_of(seed, key, "empty"))
        out = _filled(out, empty, totals, instead if instead is None else instead[:, order], rng)
    out.eliminate_zeros()
    return sparse.csr_matrix(out if in_order else out[:, np.argsort(order)], dtype=np.float32)


def _filled(
    counts: sparse.csr_matrix,
    empty: np.ndarray,
    totals: np.ndarray,
    instead: sparse.csr_matrix | None,
    rng: np.random.Generator,
) -> sparse.csr_matrix:
    """Draw the counts of cells that have none from what other cells in their place have."""
    filled = counts.tolil()
    for i in empty:
        share = np.zeros(counts.shape[1]) if instead is None else instead[[i]].toarray().ravel().astype(np.float64)
        if not share.any():
            raise ValueError(f"cell {i} of predicted expresses nothing, so that it has no counts to draw.")
        filled[i] = rng.multinomial(int(totals[i]), share / share.sum())
    return filled.tocsr()
