"""Matrices that are not in memory: in files of h5ad and zarr, as dask arrays, and in views of these."""

from __future__ import annotations

import hashlib
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from anndata import AnnData, abc
from scipy import sparse

from virtualcell._errors import unknown_name
from virtualcell.data._dask import DaskColumns, DaskRows
from virtualcell.data._on_disk import CSCOnDisk, CSROnDisk, DenseOnDisk, LazyMatrix
from virtualcell.data._stored import InMemory, StoredMatrix, canonical_rows


def stored_matrix(adata: AnnData, layer: str | None, where: str) -> StoredMatrix:
    """Return `X` or a layer, wherever it is; nothing of a lazy matrix is read yet.

    Parameters
    ----------
    adata
        Cells x genes.
    layer
        Name of the layer, or `None` for `X`.
    where
        What to call the matrix in messages.
    """
    if layer is not None and layer not in adata.layers:
        raise unknown_name("layer", layer, adata.layers, "Leave it out to use X.")
    # the matrix of a view would be read as a whole by asking for it; of what it is a view, anndata tells nowhere else
    whole = adata._adata_ref if adata.is_view else adata
    stored = whole.X if layer is None else whole.layers[layer]
    if stored is None:
        remedy = f" Name the layer with the expression, of {list(whole.layers)}." if len(whole.layers) else ""
        raise ValueError(f"{where} is empty.{remedy}")
    if getattr(stored, "dtype", np.dtype(float)).kind not in "biufO":
        raise ValueError(f"{where} is of the type {stored.dtype}, which are no real numbers.")
    lazy = lazy_matrix(stored, where)
    if lazy is not None:
        return PartOf(lazy, adata._oidx, adata._vidx) if adata.is_view else lazy
    stored = adata.X if layer is None else adata.layers[layer]
    if not (sparse.issparse(stored) or isinstance(stored, np.ndarray)):
        name = type(stored).__name__
        raise TypeError(
            f"{where} is a {name}; give a numpy array, a scipy sparse matrix, a dask array of these, or a matrix of an "
            "h5ad or zarr file. Load it: `adata.to_memory()`."
        )
    if np.ma.is_masked(stored):
        raise ValueError(f"{where} is an array with masked values, which are missing. Fill them, or drop the cells.")
    if stored.dtype == object:
        try:
            stored = stored.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where} is of the type object and holds what is no number: {error}.") from error
    return InMemory(stored)


def is_lazy(adata: AnnData) -> bool:
    """Tell whether `X` or a layer of data, or of what it is a view of, is not in memory."""
    whole = adata._adata_ref if adata.is_view else adata
    return any(
        lazy_matrix(matrix, "") is not None for matrix in (whole.X, *whole.layers.values()) if matrix is not None
    )


def lazy_matrix(stored: Any, where: str) -> LazyMatrix | None:
    """Return what reads a lazy matrix, `None` where it is in memory."""
    if isinstance(stored, abc.CSRDataset):
        return CSROnDisk(stored)
    if isinstance(stored, abc.CSCDataset):
        return CSCOnDisk(stored)
    if isinstance(stored, h5py.Dataset) or _is_of(stored, "zarr", "Array"):
        return DenseOnDisk(stored)
    if _is_of(stored, "dask.array", "Array"):
        if np.isnan(stored.shape[0]) or np.isnan(sum(stored.chunks[0])):
            raise ValueError(f"{where} is a dask array of unknown chunks: `X.compute_chunk_sizes()` finds them out.")
        meta = stored._meta
        by_columns = sparse.issparse(meta) and meta.format == "csc" and stored.numblocks[1] > 1
        return DaskColumns(stored) if by_columns else DaskRows(stored)
    return None


def _is_of(stored: Any, module: str, name: str) -> bool:
    """Tell whether something is of a class of a module that nobody needs to import for that."""
    return module in sys.modules and isinstance(stored, getattr(sys.modules[module], name))


class PartOf(LazyMatrix):
    """Some rows and columns of a lazy matrix."""

    def __init__(self, whole: LazyMatrix, rows: Any, columns: Any) -> None:
        self._whole, self.is_sparse = whole, whole.is_sparse
        self._rows, self._columns = (np.arange(n)[i] for n, i in zip(whole.shape, (rows, columns), strict=True))
        self._rows, self._columns = np.atleast_1d(self._rows), np.atleast_1d(self._columns)
        self._all_columns = np.array_equal(self._columns, np.arange(whole.shape[1]))
        self.shape = len(self._rows), len(self._columns)

    @property
    def entries_per_cell(self) -> float:
        """Mean number of stored entries of a row, as if these columns were like all others."""
        return self._whole.entries_per_cell * self.shape[1] / max(self._whole.shape[1], 1)

    @property
    def bytes_per_cell(self) -> float:
        """Memory that a row takes while it is read."""
        return self._whole.bytes_per_cell

    @cached_property
    def edges(self) -> np.ndarray:
        """Where blocks of the whole begin among these rows, if they are in its order."""
        if not (np.diff(self._rows) > 0).all():
            return super().edges
        return np.unique([0, *np.searchsorted(self._rows, self._whole.edges), self.shape[0]])

    @property
    def source(self) -> tuple | None:
        """That of the whole, and which part it is."""
        return None if self._whole.source is None else (*self._whole.source, self._part)

    @property
    def here(self) -> tuple:
        """That of the whole, and which part it is."""
        return *self._whole.here, self._part

    @property
    def _part(self) -> str:
        return hashlib.sha256(self._rows.tobytes() + b"|" + self._columns.tobytes()).hexdigest()

    @property
    def files(self) -> list[Path]:
        """Those of the whole."""
        return self._whole.files

    def read(self, start: int, stop: int) -> sparse.csr_matrix:
        """Read rows in one piece, float32 in canonical format."""
        return self._of(slice(start, stop))

    def rows(self, index: np.ndarray | slice | None) -> sparse.csr_matrix:
        """Return rows, float32, without entries that are stored twice, read in the order of the file."""
        return self._of(slice(None) if index is None else index)

    def _of(self, index: np.ndarray | slice) -> sparse.csr_matrix:
        found = self._whole.rows(self._rows[index])
        return found if self._all_columns else canonical_rows(found[:, self._columns])
