"""Counts that come and go one by one, compiled: what :mod:`virtualcell.data._emit` draws."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numba
import numpy as np

_compiled = numba.njit(nogil=True, cache=True)
_STEP = 0x9E3779B97F4A7C15


def seed_of(*words: object) -> int:
    """Return a seed, 32 bits, that differs with any of the words."""
    return int.from_bytes(blake2b("\0".join(map(str, words)).encode(), digest_size=4).digest(), "little")


def seeds_of(genes: Sequence[str], *words: object) -> np.ndarray:
    """Return such a seed for each gene, (n_genes,), uint64."""
    return _mixed(_hashes(tuple(genes)) + np.uint64(seed_of(*words) * _STEP % 2**64))


@lru_cache(maxsize=8)
def by_name(genes: tuple[str, ...]) -> np.ndarray:
    """Return the order of genes by their names, (n_genes,)."""
    return np.argsort(np.asarray(genes, dtype=str))


@lru_cache(maxsize=8)
def _hashes(genes: tuple[str, ...]) -> np.ndarray:
    digests = b"".join(blake2b(str(gene).encode(), digest_size=8).digest() for gene in genes)
    return np.frombuffer(digests, dtype=np.uint64)


@_compiled
def _mixed(z: np.ndarray | np.uint64) -> np.ndarray | np.uint64:
    """Scatter whole numbers over all 64 bits."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@_compiled
def _uniform(state: np.ndarray) -> float:
    """Draw from 0 to below 1: SplitMix64 of Steele et al. 2014, which is seeded by setting its state, (1,), uint64.

    There is a seed for each gene, and to seed and fill numba's own generator takes longer than a gene's draws.
    """
    state[0] += np.uint64(_STEP)
    return (_mixed(state[0]) >> np.uint64(11)) * 2.0**-53


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
    y, before, added = np.empty(n_cells, np.int64), np.empty(n_cells, np.int64), np.empty(n_cells, np.int64)
    sums, more, rates = np.empty(n_cells), np.empty(n_cells), np.cumsum(library)
    smallest, state = library.min() if n_cells else 0.0, np.empty(1, np.uint64)
    at = 0
    for g in range(n_genes):
        if at + n_cells > len(out_cells):
            out_cells = np.concatenate((out_cells, np.empty(len(out_cells), np.int32)))
            out_counts = np.concatenate((out_counts, np.empty(len(out_counts), np.float32)))
        begin, end = indptr[g], indptr[g + 1]
        state[0] = seeds[g]
        # what is kept is written, and what is not is written over: a guess of which would often be wrong
        if need[g] <= 0:
            n = end - begin
            y[:n] = counts[begin:end]
            if need[g] < 0 and n:
                _thin(y[:n], cells[begin:end], scale, -need[g], sums, state)
            for i in range(n):
                out_cells[at], out_counts[at] = cells[begin + i], y[i]
                at += y[i] > 0
        else:
            y[:], most = 0, 0
            for i in range(begin, end):
                y[cells[i]] = np.int64(counts[i])
                most = max(most, y[cells[i]])
            has_room = most + 1 <= smallest
            _raise(y, library, scale, need[g], dispersion[g], rates, has_room, sums, before, added, more, state)
            for i in range(n_cells):
                out_cells[at], out_counts[at] = i, y[i]
                at += y[i] > 0
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
def _thin(
    y: np.ndarray, cells: np.ndarray, scale: np.ndarray, need: float, sums: np.ndarray, state: np.ndarray
) -> None:
    """Take counts away, each as likely as any other, until the sum of logarithms has come as near as one count can."""
    n, left, drawn_from, expression = len(y), 0, 0, 0.0
    for i in range(n):
        left += y[i]
        expression += y[i] * scale[cells[i]]
    if need > n * np.log1p(expression / n) / 2:  # at most twice that can be taken: perhaps all of it
        total = 0.0
        for i in range(n):
            total += np.log1p(y[i] * scale[cells[i]])
        if need >= total:
            y[:] = 0
            return
    while left > 0:
        if 2 * left <= drawn_from or drawn_from == 0:  # most of what would be drawn is gone
            drawn_from = left
            so_far = 0
            for i in range(n):
                so_far += y[i]
                sums[i] = so_far
        count = np.floor(_uniform(state) * drawn_from)
        i = _place(sums, n, count)
        if sums[i] - count > y[i]:  # it went before
            continue
        one = scale[cells[i]]
        fall = np.log1p(one / (1 + (y[i] - 1) * one))
        if fall >= need:
            if fall - need < need:
                y[i] -= 1
            return
        y[i] -= 1
        left -= 1
        need -= fall


@_compiled
def _raise(
    y: np.ndarray,
    library: np.ndarray,
    scale: np.ndarray,
    need: float,
    dispersion: float,
    rates: np.ndarray,
    has_room: bool,
    sums: np.ndarray,
    before: np.ndarray,
    added: np.ndarray,
    more: np.ndarray,
    state: np.ndarray,
) -> None:
    """Add negative binomial counts, until the sum of logarithms has come as near as one count can.

    A cell's counts come as a process in time t whose rate, given the n that came, is
    library * (1 + dispersion * n) / (1 + dispersion * library * t): Poisson with a rate that is gamma distributed over
    cells. Times are drawn from higher rates, those of an earlier time, and kept with the ratio of both (thinning). The
    sums of the first rates are `rates`, where all cells have room for a count.
    """
    n_cells, t = len(y), 0.0
    base, missed = 0.0, 0
    n_added = 0 if has_room else n_cells
    rise_of_base = n_cells / (dispersion * rates[-1]) if dispersion > 0 and rates[-1] > 0 else np.inf
    sums[:], before[:] = rates, y
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
        reinforced = more[n_added - 1] if n_added else 0.0
        if dispersion > 0:
            t -= np.log(1 - _uniform(state)) / (sums[-1] + reinforced)
        u = _uniform(state) * (sums[-1] + reinforced)
        i = _place(sums, n_cells, u) if u < sums[-1] else added[_place(more, n_added, u - sums[-1])]
        if y[i] + 1 > library[i]:
            missed += 1
            continue
        if dispersion > 0:
            kept = (1 + dispersion * library[i] * base) / (1 + dispersion * library[i] * t)
            if _uniform(state) >= kept:
                continue
        rise = np.log1p(scale[i] / (1 + y[i] * scale[i]))
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
    state = np.full(1, seed, np.uint64)
    for cell in range(len(totals)):
        x = counts[indptr[cell] : indptr[cell + 1]]
        sums = np.cumsum(x.astype(np.float64))
        if not len(x) or sums[-1] == 0:
            continue
        off = np.int64(sums[-1]) - totals[cell]
        if off < 0:
            for _ in range(-off):
                u = _uniform(state) * sums[-1]
                x[_place(sums, len(x), u)] += 1
        while off > 0:
            if totals[cell] + off <= sums[-1] / 2:  # most of what would be drawn is gone
                sums = np.cumsum(x.astype(np.float64))
            count = np.floor(_uniform(state) * sums[-1])
            gene = _place(sums, len(x), count)
            if sums[gene] - count <= x[gene]:
                x[gene] -= 1
                off -= 1
