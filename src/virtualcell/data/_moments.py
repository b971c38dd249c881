"""Means and variances of groups of cells, from sums over pieces of them in a fixed order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import sparse

from virtualcell.data._stored import BLOCK

_GROUPS = 256  # groups whose sums are held at a time

Piece = tuple[int, int, int]  # number of a group, and the first and last of its cells


class Moments(NamedTuple):
    """Mean and sample variance (n - 1) over the cells of each group, (n_groups, n_genes), and their number.

    Both are 0 where a group has no cells, and the variance where it has one.
    """

    mean: np.ndarray
    variance: np.ndarray
    n: np.ndarray


def pieces_of(lengths: Sequence[int]) -> list[list[Piece]]:
    """Cut groups into pieces of at most `BLOCK` cells, and put together as many as are read together."""
    together: list[list[Piece]] = []
    pieces: list[Piece] = []
    size = 0
    for g, length in enumerate(lengths):
        for start in range(0, length, BLOCK):
            stop = min(start + BLOCK, length)
            if pieces and (size + stop - start > BLOCK or len(pieces) == _GROUPS):
                together.append(pieces)
                pieces, size = [], 0
            pieces.append((g, start, stop))
            size += stop - start
    return [*together, pieces] if pieces else together


def sums_of(cells: sparse.csr_matrix, lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return sums and sums of squares over pieces of so many cells, (n_pieces, n_genes), in double precision."""
    ends = np.cumsum([0, *lengths])
    member = sparse.csr_matrix((np.ones(ends[-1]), np.arange(ends[-1]), ends), shape=(len(lengths), ends[-1]))
    cells = cells.astype(np.float64)
    sums = (member @ cells).toarray()
    cells.data **= 2
    return sums, (member @ cells).toarray()


def moments_of(lengths: Sequence[int], found: Iterable[tuple[np.ndarray, np.ndarray]], n_genes: int) -> Moments:
    """Add sums of pieces up in their order; a group may go on from some that were read together to the next."""
    n = np.array(lengths, dtype=np.int64)
    mean, variance = np.zeros((len(n), n_genes), np.float32), np.zeros((len(n), n_genes), np.float32)
    before = np.zeros((2, n_genes))  # sums of the group that goes on
    for pieces, (sums, squares) in zip(pieces_of(lengths), found, strict=True):
        group = np.array([g for g, _, _ in pieces])
        if pieces[0][1] > 0:
            sums[0] += before[0]
            squares[0] += before[1]
        before = np.stack([sums[-1], squares[-1]])
        size = n[group, None]
        m = sums / size
        mean[group] = m  # of a group that goes on, until its last piece
        variance[group] = np.maximum(squares - size * m**2, 0) / np.maximum(size - 1, 1)
    return Moments(mean, variance, n)
