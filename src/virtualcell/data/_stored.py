"""A matrix as it is stored in an AnnData, and its rows as they are read: float32 CSR."""

from __future__ import annotations

import numpy as np
from anndata import AnnData
from scipy import sparse

from virtualcell._errors import unknown_name

BLOCK = 1024  # cells read at a time, few enough that copies of them are small beside any matrix


class StoredMatrix:
    """`X` or a layer, in memory; what is stored by columns is turned around when it is first read.

    Parameters
    ----------
    adata
        Cells x genes.
    layer
        Name of the layer, or `None` for `X`.
    where
        What to call the matrix in messages.
    """

    def __init__(self, adata: AnnData, layer: str | None, where: str) -> None:
        if adata.isbacked:
            raise ValueError("the AnnData is backed by its file, which is not supported. Load it: `adata.to_memory()`.")
        if layer is not None and layer not in adata.layers:
            raise unknown_name("layer", layer, adata.layers, "Leave it out to use X.")
        self._stored = adata.X if layer is None else adata.layers[layer]
        if self._stored is None:
            raise ValueError(f"{where} is empty.")
        if not (sparse.issparse(self._stored) or isinstance(self._stored, np.ndarray)):
            name = type(self._stored).__name__
            raise TypeError(
                f"{where} is a {name}; give a numpy array or a scipy sparse matrix. Load it: `adata.to_memory()`."
            )
        if np.ma.is_masked(self._stored):
            raise ValueError(
                f"{where} is an array with masked values, which are missing. Fill them, or drop the cells."
            )

    @property
    def entries_per_cell(self) -> float:
        """Mean number of stored entries of a row."""
        n_rows = self._stored.shape[0]
        n = self._stored.nnz if sparse.issparse(self._stored) else self._stored.size
        return n / max(n_rows, 1)

    def rows(self, index: np.ndarray | slice | None) -> sparse.csr_matrix:
        """Return rows, without entries that are stored twice; a slice or all of them may share memory."""
        if not sparse.issparse(self._stored):
            return _compressed(np.asarray(self._stored if index is None else self._stored[index]))
        self._stored = block = sparse.csr_matrix(self._stored)  # shares memory with what is CSR already
        if isinstance(index, slice):
            block = _section(block, *index.indices(block.shape[0]))
        elif index is not None:
            block = block[index]
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


def _compressed(dense: np.ndarray) -> sparse.csr_matrix:
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
