"""A matrix as it is stored in an AnnData, and its rows as they are read: float32 CSR."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from virtualcell._errors import unknown_name
from virtualcell._tasks import Workers

BLOCK = 1024  # cells read at a time, few enough that copies of them are small beside any matrix


class StoredMatrix(ABC):
    """A matrix of cells x genes, whatever holds it; :func:`virtualcell.data._lazy.stored_matrix` finds the right kind.

    Attributes
    ----------
    shape
        Number of cells and genes.
    is_lazy
        Whether values are read from elsewhere when they are asked for, so that reading is slow but for one pass.
    in_memory
        Whether it is all in the memory of the process.
    is_sparse
        Whether zeros are left out where the matrix is stored.
    """

    shape: tuple[int, int]
    is_lazy = False
    in_memory = True
    is_sparse = True

    @abstractmethod
    def rows(self, index: np.ndarray | slice | None) -> sparse.csr_matrix:
        """Return rows, float32, without entries that are stored twice; a slice or all of them may share memory."""

    @property
    @abstractmethod
    def entries_per_cell(self) -> float:
        """Mean number of stored entries of a row; of a lazy matrix, an estimate."""

    @property
    def key(self) -> str | None:
        """What tells the matrix from any other, in any process; `None` where nothing does."""
        return None

    @property
    def edges(self) -> np.ndarray:
        """First rows of the blocks that a pass over the matrix reads, and the number of rows: (n_blocks + 1,)."""
        return np.append(np.arange(0, self.shape[0], BLOCK), self.shape[0])

    @property
    def files(self) -> list[Path]:
        """What another process opens to read this matrix, where that is known."""
        return []

    def copied(self, *, make: bool = True, workers: Workers | None = None) -> StoredMatrix:
        """Return the same matrix where rows are quick to read in any order.

        A lazy one is copied to the cache folder for that, perhaps by workers, or, unless one is to be made, read from
        where it is.
        """
        return self


class InMemory(StoredMatrix):
    """A numpy array or a scipy matrix; what is stored by columns is turned around when it is first read."""

    def __init__(self, stored: np.ndarray | sparse.spmatrix) -> None:
        self.shape, self.is_sparse = stored.shape, sparse.issparse(stored)
        if self.is_sparse and not stored.dtype.isnative:  # as some files have it: scipy takes no rows of such
            stored = stored.astype(stored.dtype.newbyteorder("="))
        self._stored = stored

    @property
    def entries_per_cell(self) -> float:
        """Mean number of stored entries of a row."""
        n = self._stored.nnz if self.is_sparse else self._stored.size
        return n / max(self.shape[0], 1)

    def rows(self, index: np.ndarray | slice | None) -> sparse.csr_matrix:
        """Return rows, without entries that are stored twice; a slice or all of them may share memory."""
        if not self.is_sparse:
            return compressed(np.asarray(self._stored if index is None else self._stored[index]))
        self._stored = block = sparse.csr_matrix(self._stored)  # shares memory with what is CSR already
        if block.indptr.dtype != block.indices.dtype and block.nnz < 1 << 31:
            # as some files have it: scipy would go through all indices whenever rows are taken
            block.indptr, block.indices = block.indptr.astype(np.int32), block.indices.astype(np.int32, copy=False)
        if isinstance(index, slice):
            block = _section(block, *index.indices(block.shape[0]))
        elif index is not None:
            block = block[index]
        return canonical_rows(block)


def canonical_rows(block: sparse.csr_matrix) -> sparse.csr_matrix:
    """Return rows as float32, without entries that are stored twice; in memory of their own where there are any."""
    if not block.has_canonical_format:
        block = block.astype(np.float64)  # in memory of its own, and where small integers do not overflow
        block.sum_duplicates()  # before any logarithm
    return block.astype(np.float32, copy=False)


def _section(matrix: sparse.csr_matrix, start: int, stop: int, step: int) -> sparse.csr_matrix:
    """Return rows in one piece, as `matrix[start:stop]` does in twice the time."""
    if step != 1 or stop < start:
        return matrix[start:stop:step]
    first, last = matrix.indptr[[start, stop]]
    arrays = matrix.data[first:last], matrix.indices[first:last], matrix.indptr[start : stop + 1] - first
    return sparse.csr_matrix(arrays, shape=(stop - start, matrix.shape[1]))


def compressed(dense: np.ndarray) -> sparse.csr_matrix:
    """Turn rows into CSR, some at a time: scipy holds five times as much on the way."""
    parts = [dense[i : i + BLOCK].astype(np.float32, copy=False) for i in range(0, max(len(dense), 1), BLOCK)]
    return sparse.vstack([sparse.csr_matrix(part) for part in parts], format="csr")


def row_sums(block: sparse.csr_matrix) -> np.ndarray:
    """Sum up each row in double precision, (n,); scipy's own `sum` adds float32 up as float32."""
    sums, full = np.zeros(block.shape[0]), np.flatnonzero(np.diff(block.indptr))
    if len(full):
        sums[full] = np.add.reduceat(block.data, block.indptr[full], dtype=np.float64)
    return sums


def row_numbers(rows: np.ndarray, n_rows: int) -> np.ndarray:
    """Return the numbers of some of `n_rows` rows, given as such or as a mask."""
    rows = np.asarray(rows)
    return np.arange(n_rows)[rows if rows.size else rows.astype(np.intp)]


def ranges(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Return the numbers start, start + 1, ... of every stretch of some length, one stretch after another."""
    before = np.cumsum(length) - length
    return np.repeat(start - before, length) + np.arange(int(length.sum()))


def columns_of(names: pd.Index, genes: Sequence[str]) -> np.ndarray | None:
    """Return the columns of genes by name, `None` where they are all columns as they stand."""
    index = pd.Index(names)
    if not index.is_unique:
        raise ValueError(
            f"var_names repeats {list(index[index.duplicated()][:3])}. Run `adata.var_names_make_unique()` first."
        )
    where = index.get_indexer(pd.Index(genes))
    if (where < 0).any():
        missing = [g for g, w in zip(genes, where, strict=True) if w < 0]
        remedy = f"{len(missing)} of {len(genes)} genes are missing; they are matched by name."
        raise unknown_name("genes", missing[0], index, remedy)
    return None if len(where) == len(index) and (where == np.arange(len(index))).all() else where
