"""Predicted changes put onto real cells, in whole counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from scipy import sparse

_FEW = 32  # counts that are drawn one by one, so that a mean is met to within one count
_AT_ONCE = 0.8  # share of the counts still missing that is drawn together
_FEWEST_CELLS = 20  # with fewer, a variance says nothing
_GENES_PER_LEVEL, _MOST_LEVELS = 50, 20  # of which the trend of dispersions is made


def emit_counts(
    counts: sparse.csr_matrix,
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
    to, and then also move the genes without change.

    Parameters
    ----------
    counts
        Whole counts of the cells to start from, in the order of their names, (n_cells, n_genes).
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
    n, scale = counts.shape[0], target_sum / library
    dispersion = np.zeros(len(change)) if dispersion is None else dispersion
    columns = sparse.csc_matrix(counts)
    columns.sort_indices()
    rows, values = [], []
    for g, name in enumerate(genes):
        here = slice(columns.indptr[g], columns.indptr[g + 1])
        cells, x = columns.indices[here], columns.data[here]
        if change[g] < 0 and len(x):
            rng = _generator(seed, key, name)
            x = _thinned(x.astype(np.int64), scale[cells], -n * change[g], rng)
            cells, x = cells[x > 0], x[x > 0]
        elif change[g] > 0:
            dense = np.zeros(n, np.int64)
            dense[cells] = x
            dense = _raised(dense, library, scale, n * change[g], dispersion[g], _generator(seed, key, name))
            cells = np.flatnonzero(dense)
            x = dense[cells]
        rows.append(cells)
        values.append(x.astype(np.float32))
    indptr = np.cumsum([0, *map(len, rows)])
    out = sparse.csc_matrix((np.concatenate(values), np.concatenate(rows), indptr), shape=counts.shape).tocsr()
    if is_whole_library(counts, library):
        out = with_totals(out, library, genes=genes, instead=counts, key=key, seed=seed)
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
    by_name = np.argsort(np.asarray(genes, dtype=str))
    out = counts[:, by_name]
    out.sort_indices()
    sums = np.asarray(out.sum(axis=1, dtype=np.float64)).ravel().astype(np.int64)
    rng, off, empty = _generator(seed, key, ""), sums - np.rint(totals).astype(np.int64), []
    for i in np.flatnonzero(off):
        x = out.data[out.indptr[i] : out.indptr[i + 1]]
        if off[i] > 0:
            x -= rng.multivariate_hypergeometric(x.astype(np.int64), off[i], method="marginals")
        elif sums[i] > 0:
            x += rng.multinomial(-off[i], x.astype(np.float64) / sums[i])
        else:
            empty.append(i)
    if empty:
        out = _filled(out, empty, totals, instead if instead is None else instead[:, by_name], rng)
    out.eliminate_zeros()
    return sparse.csr_matrix(out[:, np.argsort(by_name)], dtype=np.float32)


def _filled(
    counts: sparse.csr_matrix,
    empty: list[int],
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


def _generator(seed: int, key: str, gene: str) -> np.random.Generator:
    """Random numbers of one gene."""
    words = "\0".join((str(seed), key, gene)).encode()
    return np.random.default_rng(int.from_bytes(blake2b(words, digest_size=16).digest(), "little"))


def _thinned(x: np.ndarray, scale: np.ndarray, need: float, rng: np.random.Generator) -> np.ndarray:
    """Take counts away until the sum of log(1 + x * scale) has fallen by `need`; each has the same chance to go."""
    y, log, share = x.copy(), np.log1p(x * scale), _AT_ONCE
    if need >= log.sum():
        return np.zeros_like(y)
    while need > 0 and y.any():  # the last counts may fall short of what is needed by a rounding error
        total = y.sum()
        each = y @ (log - np.log1p(np.maximum(y - 1, 0) * scale)) / total
        n = need / each
        if share * n < _FEW:
            y, need = _thin_singly(y, scale, need, rng, int(2 * n) + 8)
            log = np.log1p(y * scale)
            continue
        lost = rng.binomial(y, -np.expm1(-share * n / total))
        after = np.log1p((y - lost) * scale)
        fall = (log - after).sum()
        if fall > need:  # the last counts of a cell weigh more than the first
            share /= 2
            continue
        y, log, need, share = y - lost, after, need - fall, _AT_ONCE
    return y


def _thin_singly(
    y: np.ndarray, scale: np.ndarray, need: float, rng: np.random.Generator, n: int
) -> tuple[np.ndarray, float]:
    """Take up to `n` counts away one after the other, and return what is left and what the sum still has to fall."""
    ends = np.cumsum(y)
    drawn, first = np.unique(rng.integers(ends[-1], size=n), return_index=True)
    drawn = drawn[np.argsort(first)]  # a count goes once
    cell = np.searchsorted(ends, drawn, side="right")
    left = y[cell] - _nth(cell)
    return _as_far_as(y, cell, np.log1p(left * scale[cell]) - np.log1p((left - 1) * scale[cell]), need, -1)


def _raised(
    x: np.ndarray,
    library: np.ndarray,
    scale: np.ndarray,
    need: float,
    dispersion: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Add counts until the sum of log(1 + x * scale) has risen by `need`, at most up to the library size."""
    rate = library.astype(np.float64)
    if dispersion > 0:
        rate = rate * rng.standard_gamma(1 / dispersion, len(x))
    y, log, share = x, np.log1p(x * scale), _AT_ONCE
    while need > 0:
        rate = np.where(y < library, rate, 0)
        total = rate.sum()
        if total <= 0:
            return y
        each = rate @ (np.log1p((y + 1) * scale) - log) / total
        n = need / each
        if share * n < _FEW:
            y, need = _raise_singly(y, library, scale, need, rate, rng, int(2 * n) + 8)
            log = np.log1p(y * scale)
            continue
        more = np.minimum(y + rng.poisson(share * n / total * rate), np.floor(library).astype(np.int64))
        more = np.maximum(more, y)
        after = np.log1p(more * scale)
        rise = (after - log).sum()
        if rise > need:
            share /= 2
            continue
        y, log, need, share = more, after, need - rise, _AT_ONCE
    return y


def _raise_singly(
    y: np.ndarray,
    library: np.ndarray,
    scale: np.ndarray,
    need: float,
    rate: np.ndarray,
    rng: np.random.Generator,
    n: int,
) -> tuple[np.ndarray, float]:
    """Add up to `n` counts one after the other, and return what there is then and what the sum still has to rise."""
    ends = np.cumsum(rate)
    cell = np.minimum(np.searchsorted(ends, rng.random(n) * ends[-1], side="right"), len(y) - 1)
    before = y[cell] + _nth(cell)
    fits = before < library[cell]
    cell, before = cell[fits], before[fits]
    return _as_far_as(y, cell, np.log1p((before + 1) * scale[cell]) - np.log1p(before * scale[cell]), need, 1)


def _as_far_as(y: np.ndarray, cell: np.ndarray, step: np.ndarray, need: float, sign: int) -> tuple[np.ndarray, float]:
    """Take as many steps as come nearest to what is needed; what is still needed is 0 where they reach it."""
    reached = np.cumsum(step)
    n = int(np.searchsorted(reached, need))
    left = 0.0
    if n == len(step):
        left = need - (reached[-1] if n else 0)
    elif reached[n] - need < need - (reached[n - 1] if n else 0):
        n += 1
    return y + sign * np.bincount(cell[:n], minlength=len(y)), left


def _nth(cell: np.ndarray) -> np.ndarray:
    """How often each entry occurred before."""
    order = np.argsort(cell, kind="stable")
    ordered = cell[order]
    start = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(cell) else []
    nth = np.empty(len(cell), np.int64)
    nth[order] = np.arange(len(cell)) - np.repeat(start, np.diff([*start, len(cell)]))
    return nth
