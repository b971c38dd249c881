"""Counts that come and go one by one, compiled: what :mod:`virtualcell.data._emit` draws."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numba
import numpy as np

_compiled = numba.njit(nogil=True, cache=True)


def seed_of(*words: object) -> int:
    """Return a seed of numba's generator, 32 bits, that differs with any of the words."""
    return int.from_bytes(blake2b("\0".join(map(str, words)).encode(), digest_size=4).digest(), "little")


def seeds_of(genes: Sequence[str], *words: object) -> np.ndarray:
    """Return such a seed for each gene, (n_genes,), uint32."""
    seeds = _hashes(tuple(genes)) + np.uint64(seed_of(*words) * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # SplitMix64: Steele et al. 2014
        seeds = (seeds ^ (seeds >> np.uint64(shift))) * np.uint64(factor)
    return (seeds >> np.uint64(32)).astype(np.uint32)


@lru_cache(maxsize=8)
def _hashes(genes: tuple[str, ...]) -> np.ndarray:
    digests = b"".join(blake2b(str(gene).encode(), digest_size=8).digest() for gene in genes)
    return np.frombuffer(digests, dtype=np.uint64)


@_compiled
def moved(
    indptr: np.ndarray,
    cells: np.ndarray,
    counts: np.ndarray,
    need: np.ndarray,
    dispersion: np.ndarray,
    library: np.ndarray,
    scale: np.ndarray,
    seeds: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Take counts from each gene, or add some, until the sum of log(1 + count * scale) over its cells is as wanted.

    Parameters
    ----------
    indptr, cells, counts
        Whole counts by gene: CSC, with sorted cells.
    need
        How far the sum of each gene is to rise, or, below 0, to fall, (n_genes,).
    dispersion
        Of what is added, (n_genes,).
    library, scale
        Library size of each cell, which no gene of it exceeds, and what one count becomes, (n_cells,).
    seeds
        Seed of each gene, (n_genes,): its draws do not depend on other genes.

    Returns
    -------
    The same three arrays of the result, without zeros.
    """
    n_cells, n_genes = len(library), len(need)
    ends = np.zeros(n_genes + 1, np.int64)
    out_cells, out_counts = np.empty(len(cells) + n_cells, np.int32), np.empty(len(cells) + n_cells, np.float32)
    y, added = np.empty(n_cells, np.int64), np.empty(n_cells, np.int64)
    sums, more = np.empty(n_cells), np.empty(n_cells)
    at = 0
    for g in range(n_genes):
        if at + n_cells > len(out_cells):
            out_cells = np.concatenate((out_cells, np.empty(len(out_cells), np.int32)))
            out_counts = np.concatenate((out_counts, np.empty(len(out_counts), np.float32)))
        begin, end = indptr[g], indptr[g + 1]
        if need[g] <= 0:
            n = end - begin
            y[:n] = counts[begin:end]
            if need[g] < 0 and n:
                np.random.seed(seeds[g])  # noqa: NPY002 - numba's generator of this thread
                _thin(y[:n], scale[cells[begin:end]], -need[g], sums, more)
            for i in range(n):
                if y[i] > 0:
                    out_cells[at], out_counts[at] = cells[begin + i], y[i]
                    at += 1
        else:
            y[:] = 0
            for i in range(begin, end):
                y[cells[i]] = np.int64(counts[i])
            np.random.seed(seeds[g])  # noqa: NPY002
            _raise(y, library, scale, need[g], dispersion[g], sums, added, more)
            for i in range(n_cells):
                if y[i] > 0:
                    out_cells[at], out_counts[at] = i, y[i]
                    at += 1
        ends[g + 1] = at
    return ends, out_cells[:at].copy(), out_counts[:at].copy()


@_compiled
def _place(sums: np.ndarray, n: int, value: float) -> int:
    """Return the first of `n` sums above a value, or the last one; numba's `searchsorted` takes twice as long."""
    low, high = 0, n - 1
    while low < high:
        middle = (low + high) >> 1
        if sums[middle] > value:
            high = middle
        else:
            low = middle + 1
    return low


@_compiled
def _thin(y: np.ndarray, scale: np.ndarray, need: float, sums: np.ndarray, logs: np.ndarray) -> None:
    """Take counts away, each as likely as any other, until the sum of logarithms has come as near as one count can."""
    total, left, drawn_from = 0.0, 0, 0
    for i in range(len(y)):
        logs[i] = np.log1p(y[i] * scale[i])
        total += logs[i]
        left += y[i]
    if need >= total:
        y[:] = 0
        return
    while left > 0:
        if 2 * left <= drawn_from or drawn_from == 0:  # most of what would be drawn is gone
            drawn_from = left
            so_far = 0
            for i in range(len(y)):
                so_far += y[i]
                sums[i] = so_far
        count = np.floor(np.random.random() * drawn_from)  # noqa: NPY002
        i = _place(sums, len(y), count)
        if sums[i] - count > y[i]:  # it went before
            continue
        after = np.log1p((y[i] - 1) * scale[i])
        fall = logs[i] - after
        if fall >= need:
            if fall - need < need:
                y[i] -= 1
            return
        y[i] -= 1
        logs[i] = after
        left -= 1
        need -= fall


@_compiled
def _raise(
    y: np.ndarray,
    library: np.ndarray,
    scale: np.ndarray,
    need: float,
    dispersion: float,
    sums: np.ndarray,
    added: np.ndarray,
    more: np.ndarray,
) -> None:
    """Add negative binomial counts, until the sum of logarithms has come as near as one count can.

    A cell's counts come as a process in time t whose rate, given the n that came, is
    library * (1 + dispersion * n) / (1 + dispersion * library * t): Poisson with a rate that is gamma distributed over
    cells. Times are drawn from higher rates, those of an earlier time, and kept with the ratio of both (thinning).
    """
    n_cells, before, t = len(y), y.copy(), 0.0
    base, rise_of_base, n_added, missed = 0.0, 0.0, n_cells, 0
    while True:
        if n_added == n_cells or missed > n_cells or t > 2 * base + rise_of_base:  # rates of now
            n_added, missed, base, total = 0, 0, t, 0.0
            for i in range(n_cells):
                if y[i] + 1 <= library[i]:
                    came = y[i] - before[i]
                    total += library[i] * (1 + dispersion * came) / (1 + dispersion * library[i] * t)
                sums[i] = total
            if total <= 0:
                return
            rise_of_base = n_cells / (dispersion * library.sum()) if dispersion > 0 else np.inf
        reinforced = more[n_added - 1] if n_added else 0.0
        if dispersion > 0:
            t -= np.log(1 - np.random.random()) / (sums[-1] + reinforced)  # noqa: NPY002
        u = np.random.random() * (sums[-1] + reinforced)  # noqa: NPY002
        i = _place(sums, n_cells, u) if u < sums[-1] else added[_place(more, n_added, u - sums[-1])]
        if y[i] + 1 > library[i]:
            missed += 1
            continue
        if dispersion > 0:
            kept = (1 + dispersion * library[i] * base) / (1 + dispersion * library[i] * t)
            if np.random.random() >= kept:  # noqa: NPY002
                continue
        rise = np.log1p((y[i] + 1) * scale[i]) - np.log1p(y[i] * scale[i])
        if rise >= need:
            if rise - need < need:
                y[i] += 1
            return
        y[i] += 1
        need -= rise
        if dispersion > 0:
            added[n_added] = i
            more[n_added] = reinforced + dispersion * library[i] / (1 + dispersion * library[i] * base)
            n_added += 1


@_compiled
def to_totals(indptr: np.ndarray, counts: np.ndarray, totals: np.ndarray, seed: int) -> None:
    """Give each cell another total, in place: counts are lost at random, or come in proportion to what the cell has.

    Parameters
    ----------
    indptr, counts
        Whole counts by cell: CSR, with genes in an order that does not depend on the file. Cells without any stay so.
    totals
        Whole number of counts that each cell is to have, (n_cells,).
    seed
        Seed of the draws.
    """
    np.random.seed(seed)  # noqa: NPY002
    for cell in range(len(totals)):
        x = counts[indptr[cell] : indptr[cell + 1]]
        sums = np.cumsum(x.astype(np.float64))
        if not len(x) or sums[-1] == 0:
            continue
        off = np.int64(sums[-1]) - totals[cell]
        if off < 0:
            for _ in range(-off):
                u = np.random.random() * sums[-1]  # noqa: NPY002
                x[_place(sums, len(x), u)] += 1
        while off > 0:
            if totals[cell] + off <= sums[-1] / 2:  # most of what would be drawn is gone
                sums = np.cumsum(x.astype(np.float64))
            count = np.floor(np.random.random() * sums[-1])  # noqa: NPY002
            gene = _place(sums, len(x), count)
            if sums[gene] - count <= x[gene]:
                x[gene] -= 1
                off -= 1
