"""The cells of one side of a comparison and one context, in memory or read group by group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
from scipy import sparse

from virtualcell._settings import settings
from virtualcell.data._expression import Expression
from virtualcell.metrics._cells import sums_over_cells

_ENTRY = 8  # bytes of a column and a value


class Cells:
    """Cells of one side and context, the groups one after another, `size` of each."""

    def __init__(self, matrix: sparse.csr_matrix, size: dict[str, int]) -> None:
        self._matrix, self.n_genes = matrix, matrix.shape[1]
        self._count(size)

    def _count(self, size: dict[str, int]) -> None:
        self.size, self.names = size, list(size)
        ends = np.cumsum(list(size.values()))
        self.span = {n: (end - size[n], end) for n, end in zip(size, ends, strict=True)}
        self.n_cells = int(ends[-1]) if len(ends) else 0

    @classmethod
    def read(cls, expression: Expression, rows: dict[str, np.ndarray]) -> Cells:
        """Read the rows of each group; of what is not in memory, and more than may be, when each is asked for."""
        size, joined = {n: len(r) for n, r in rows.items()}, np.concatenate(list(rows.values()))
        if expression.in_memory or len(joined) * expression.entries_per_cell * _ENTRY < settings.max_memory * 1e9:
            return cls(expression.rows(joined), size)
        return CellsOnDisk(expression.at_hand(), joined, size)

    def rows(self, index: np.ndarray) -> sparse.csr_matrix:
        """Return some of the cells, by their number."""
        return self._matrix[index]

    def take(self, rows: dict[str, np.ndarray]) -> Cells:
        """Return some of the cells, by their number."""
        return Cells(self._matrix[np.concatenate(list(rows.values()))], {n: len(r) for n, r in rows.items()})

    def group(self, name: str) -> sparse.csr_matrix:
        """Cells of one group; shares memory."""
        start, end = self.span[name]
        ends = self._matrix.indptr[start : end + 1]
        kept = slice(ends[0], ends[-1])
        cells = sparse.csr_matrix((len(ends) - 1, self.n_genes), dtype=self._matrix.dtype)
        # one by one, because the constructor copies what is a small part of a larger array
        cells.data, cells.indices, cells.indptr = self._matrix.data[kept], self._matrix.indices[kept], ends - ends[0]
        return cells

    def portions(self, names: Sequence[str]) -> Iterator[list[str]]:
        """Cut groups into portions of which the cells can be in memory together."""
        yield list(names)

    def together(self, names: Sequence[str]) -> sparse.csr_matrix:
        """Cells of some groups, one group after another; shares memory where these are all."""
        if list(names) == self.names:
            return self._matrix
        return sparse.vstack([self.group(name) for name in names], format="csr")

    @cached_property
    def moments(self) -> dict[str, np.ndarray]:
        """Mean and mean square of each group, (2, n_genes)."""
        return {name: sums_over_cells(self.group(name)) / self.size[name] for name in self.names}


class CellsOnDisk(Cells):
    """The same of expression that is not in memory: `number` says which of its rows the cells are."""

    def __init__(self, expression: Expression, number: np.ndarray, size: dict[str, int]) -> None:
        self._expression, self._number, self.n_genes = expression, number, len(expression.genes)
        self._count(size)

    def rows(self, index: np.ndarray) -> sparse.csr_matrix:
        """Return some of the cells, by their number."""
        return self._expression.rows(self._number[index])

    def take(self, rows: dict[str, np.ndarray]) -> Cells:
        """Return some of the cells, by their number."""
        number = self._number[np.concatenate(list(rows.values()))]
        return CellsOnDisk(self._expression, number, {n: len(r) for n, r in rows.items()})

    def group(self, name: str) -> sparse.csr_matrix:
        """Cells of one group."""
        return self.rows(np.arange(*self.span[name]))

    def portions(self, names: Sequence[str]) -> Iterator[list[str]]:
        """Cut groups into portions of which the cells can be in memory together, at least one group in each."""
        most = settings.max_memory * 1e9 / (4 * _ENTRY * max(self._expression.entries_per_cell, 1))
        portion: list[str] = []
        for name in names:
            if portion and sum(self.size[n] for n in [*portion, name]) > most:
                yield portion
                portion = []
            portion.append(name)
        yield portion

    def together(self, names: Sequence[str]) -> sparse.csr_matrix:
        """Cells of some groups, one group after another."""
        return self.rows(np.concatenate([np.arange(*self.span[name]) for name in names]))
