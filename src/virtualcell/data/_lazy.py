"""Matrices that are not in memory: in files of h5ad and zarr, as dask arrays, and in views of these."""

from __future__ import annotations

import hashlib
import itertools
import sys
from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from anndata import AnnData, abc
from scipy import sparse

from virtualcell._errors import unknown_name
from virtualcell._settings import settings
from virtualcell.data._copied import copy_of
from virtualcell.data._stored import InMemory, StoredMatrix, canonical_rows, compressed

OF_FILES = "virtualcell-files-"  # beginning of the names of dask arrays whose name tells all that is in them

_GAP = 32  # rows that are read although nobody asked for them, rather than to go to the file once more
_MOST_CELLS = 1 << 14  # in a block
_COPIES = 4  # of a block that are in memory at a time, on its way
_ENTRY = 8  # bytes of a column and a value


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
        raise ValueError(f"{where} is empty.")
    lazy = _lazy(stored, where)
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
    return InMemory(stored)


def is_lazy(adata: AnnData) -> bool:
    """Tell whether `X` or a layer of data, or of what it is a view of, is not in memory."""
    whole = adata._adata_ref if adata.is_view else adata
    return any(_lazy(matrix, "") is not None for matrix in (whole.X, *whole.layers.values()) if matrix is not None)


def _lazy(stored: Any, where: str) -> LazyMatrix | None:
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


class LazyMatrix(StoredMatrix):
    """A matrix that is read when it is asked for, some rows at a time: `vc.settings.max_memory` says how many."""

    is_lazy, in_memory = True, False

    @abstractmethod
    def read(self, start: int, stop: int) -> sparse.csr_matrix:
        """Read rows in one piece, float32 in canonical format."""

    @property
    @abstractmethod
    def bytes_per_cell(self) -> float:
        """Memory that a row takes while it is read."""

    @property
    @abstractmethod
    def source(self) -> tuple | None:
        """What tells this matrix from any other, also after it was changed in place; `None` where nothing does."""

    @property
    def chunk(self) -> int:
        """Rows that the storage keeps together."""
        return 1

    @cached_property
    def edges(self) -> np.ndarray:
        """First rows of the blocks that a pass over the matrix reads, and the number of rows: (n_blocks + 1,)."""
        fits = int(settings.max_memory * 2**30 / (_COPIES * max(self.bytes_per_cell, 1)))
        n = min(max(fits, 1), _MOST_CELLS)
        n = max(n // self.chunk * self.chunk, self.chunk)
        return np.append(np.arange(0, self.shape[0], n), self.shape[0])

    def rows(self, index: np.ndarray | slice | None) -> sparse.csr_matrix:
        """Return rows, float32, without entries that are stored twice, read in the order of the file."""
        if index is None or isinstance(index, slice):
            start, stop, step = (index or slice(None)).indices(self.shape[0])
            if step == 1:
                return self._in_one_piece(start, max(start, stop))
            index = np.arange(start, stop, step)
        wanted, back = np.unique(index, return_inverse=True)
        if not len(wanted):
            return sparse.csr_matrix((0, self.shape[1]), dtype=np.float32)
        is_new = (np.diff(wanted) > _GAP) | (np.diff(np.searchsorted(self.edges, wanted, side="right")) > 0)
        parts = np.split(wanted, np.flatnonzero(is_new) + 1)
        found = stacked([self.read(int(part[0]), int(part[-1]) + 1)[part - part[0]] for part in parts])
        return found if np.array_equal(back, np.arange(found.shape[0])) else found[back]

    def _in_one_piece(self, start: int, stop: int) -> sparse.csr_matrix:
        inside = self.edges[(self.edges > start) & (self.edges < stop)]
        edges = [start, *inside.tolist(), stop]
        return stacked([self.read(a, b) for a, b in itertools.pairwise(edges)])

    def copied(self, *, make: bool = True) -> StoredMatrix:
        """Return a copy in the cache folder, made where there is none; itself where none is to be made."""
        return copy_of(self, make=make) or self

    def sample(self) -> bytes:
        """Return some rows from all over the matrix, as bytes."""
        n = self.shape[0]
        block = self.rows(np.unique(np.linspace(0, max(n - 1, 0), min(8, n)).astype(int)))
        return b"".join(np.ascontiguousarray(a).tobytes() for a in (block.indptr, block.indices, block.data))


def stacked(parts: list[sparse.csr_matrix]) -> sparse.csr_matrix:
    """Put rows one below the other."""
    return parts[0] if len(parts) == 1 else sparse.vstack(parts, format="csr")


# -- files ------------------------------------------------------------------------------------------------------------


class CSROnDisk(LazyMatrix):
    """Compressed rows in an h5ad or zarr file."""

    def __init__(self, stored: abc.CSRDataset) -> None:
        group = stored.group
        self._group, self.shape = group, stored.shape
        self._data, self._indices, self._indptr = (group[name] for name in ("data", "indices", "indptr"))

    @property
    def entries_per_cell(self) -> float:
        """Mean number of stored entries of a row."""
        return self._data.shape[0] / max(self.shape[0], 1)

    @property
    def bytes_per_cell(self) -> float:
        """Memory that a row takes while it is read."""
        return self.entries_per_cell * (_ENTRY + self._data.dtype.itemsize)

    @property
    def source(self) -> tuple | None:
        """File and place in it, its size and when it was written."""
        return place_of(self._group)

    def read(self, start: int, stop: int) -> sparse.csr_matrix:
        """Read rows in one piece, float32 in canonical format."""
        indptr = self._indptr[start : stop + 1].astype(np.int64)
        entries = slice(int(indptr[0]), int(indptr[-1]))
        arrays = self._data[entries], self._indices[entries].astype(np.int32, copy=False), indptr - indptr[0]
        return canonical_rows(sparse.csr_matrix(arrays, shape=(stop - start, self.shape[1])))


class DenseOnDisk(LazyMatrix):
    """A dense matrix in an HDF5 or zarr file."""

    is_sparse = False

    def __init__(self, stored: Any) -> None:
        self._stored, self.shape = stored, tuple(stored.shape)

    @property
    def entries_per_cell(self) -> float:
        """Number of genes."""
        return float(self.shape[1])

    @property
    def bytes_per_cell(self) -> float:
        """Memory that a row takes while it is read."""
        return self.shape[1] * (self._stored.dtype.itemsize + 4)

    @property
    def chunk(self) -> int:
        """Rows that the storage keeps together."""
        return self._stored.chunks[0] if self._stored.chunks else 1

    @property
    def source(self) -> tuple | None:
        """File and place in it, its size and when it was written."""
        return place_of(self._stored)

    def read(self, start: int, stop: int) -> sparse.csr_matrix:
        """Read rows in one piece, float32 in canonical format."""
        return compressed(np.asarray(self._stored[start:stop]))


class ByColumns(LazyMatrix):
    """A matrix that is stored by columns: whoever asks for rows gets them from a copy by rows, made once."""

    @abstractmethod
    def columns(self) -> Iterator[sparse.csc_matrix]:
        """Yield all columns, some at a time."""

    @cached_property
    def _by_rows(self) -> StoredMatrix:
        return self.copied()

    def read(self, start: int, stop: int) -> sparse.csr_matrix:
        """Read rows in one piece, float32 in canonical format."""
        return self._by_rows.rows(slice(start, stop))

    def sample(self) -> bytes:
        """Return some of the first column, as bytes: rows would have to be sought everywhere."""
        first = next(self.columns(), None)
        return b"" if first is None else first.data[:1000].tobytes() + first.indices[:1000].tobytes()


class CSCOnDisk(ByColumns):
    """Compressed columns in an h5ad or zarr file."""

    def __init__(self, stored: abc.CSCDataset) -> None:
        self._group, self.shape = stored.group, stored.shape

    @property
    def entries_per_cell(self) -> float:
        """Mean number of stored entries of a row."""
        return self._group["data"].shape[0] / max(self.shape[0], 1)

    @property
    def bytes_per_cell(self) -> float:
        """Memory that a row takes while it is read."""
        return self.entries_per_cell * (_ENTRY + self._group["data"].dtype.itemsize)

    @property
    def source(self) -> tuple | None:
        """File and place in it, its size and when it was written."""
        return place_of(self._group)

    def columns(self) -> Iterator[sparse.csc_matrix]:
        """Yield all columns, as many at a time as memory allows."""
        indptr = self._group["indptr"][:].astype(np.int64)
        most = max(1, int(settings.max_memory * 2**30 / (_COPIES * 2 * _ENTRY)))
        first = 0
        while first < self.shape[1]:
            last = max(first + 1, int(np.searchsorted(indptr, indptr[first] + most, side="right")) - 1)
            entries = slice(int(indptr[first]), int(indptr[last]))
            arrays = self._group["data"][entries], self._group["indices"][entries], indptr[first : last + 1]
            yield sparse.csc_matrix((*arrays[:2], arrays[2] - arrays[2][0]), shape=(self.shape[0], last - first))
            first = last


def place_of(element: Any) -> tuple | None:
    """Tell a group or an array of a file from any other, also after the file was written anew."""
    if isinstance(element, h5py.Group | h5py.Dataset):
        stat = Path(element.file.filename).stat()
        return str(Path(element.file.filename).resolve()), element.name, stat.st_size, stat.st_mtime_ns
    root = getattr(element.store, "root", None)
    if root is None:  # in the memory of a process, or on the net
        return None
    files = [path.stat() for path in sorted((Path(root) / element.path).rglob("*")) if path.is_file()]
    newest = max((stat.st_mtime_ns for stat in files), default=0)
    return str(Path(root).resolve()), element.path, sum(stat.st_size for stat in files), newest


# -- dask -------------------------------------------------------------------------------------------------------------


class DaskRows(LazyMatrix):
    """A dask array, of dense or of sparse blocks."""

    def __init__(self, stored: Any) -> None:
        self._stored, self.shape = stored, stored.shape
        self.is_sparse = sparse.issparse(stored._meta)

    @cached_property
    def entries_per_cell(self) -> float:
        """Mean number of stored entries of a row, of the first block where they are sparse."""
        if not self.is_sparse or not self.shape[0]:
            return float(self.shape[1])
        first = self.read(0, min(_GAP, self.shape[0]))
        return max(first.nnz / first.shape[0], 1.0)

    @property
    def bytes_per_cell(self) -> float:
        """Memory that a row takes while it is read."""
        if self.is_sparse:
            return self.entries_per_cell * (_ENTRY + self._stored.dtype.itemsize)
        return self.shape[1] * (self._stored.dtype.itemsize + 4)

    @cached_property
    def edges(self) -> np.ndarray:
        """First rows of the blocks that a pass reads: as many chunks of the array as memory allows, at least one."""
        fits = int(settings.max_memory * 2**30 / (_COPIES * max(self.bytes_per_cell, 1)))
        n, ends, edges = min(max(fits, 1), _MOST_CELLS), np.cumsum(self._stored.chunks[0]), [0]
        for i, end in enumerate(ends.tolist()):
            if i + 1 == len(ends) or int(ends[i + 1]) - edges[-1] > n:
                edges.append(end)
        return np.unique([*edges, self.shape[0]])

    @property
    def source(self) -> tuple | None:
        """Name of an array of files; nothing tells whether what others are made of has changed."""
        return (self._stored.name,) if self._stored.name.startswith(OF_FILES) else None

    def read(self, start: int, stop: int) -> sparse.csr_matrix:
        """Read rows in one piece, float32 in canonical format."""
        # by this thread: those of dask would hold as many chunks as there are cores
        return _rows_of(self._stored[start:stop].compute(scheduler="synchronous"))

    def sample(self) -> bytes:
        """Return the name of the array, which is of what dask was told, and some rows."""
        return self._stored.name.encode() + super().sample()


class DaskColumns(ByColumns):
    """A dask array of columns that are compressed, as of a CSC matrix in a file."""

    def __init__(self, stored: Any) -> None:
        self._stored, self.shape = stored, stored.shape

    @cached_property
    def entries_per_cell(self) -> float:
        """Mean number of stored entries of a row, as many as the first columns have."""
        first = next(self.columns())
        return first.nnz / max(self.shape[0], 1) * self.shape[1] / first.shape[1]

    @property
    def bytes_per_cell(self) -> float:
        """Memory that a row takes while it is read."""
        return self.entries_per_cell * (_ENTRY + self._stored.dtype.itemsize)

    @property
    def source(self) -> tuple | None:
        """Nothing tells whether what the array is made of has changed."""
        return None

    def columns(self) -> Iterator[sparse.csc_matrix]:
        """Yield all columns, one chunk at a time."""
        ends = np.cumsum([0, *self._stored.chunks[1]]).tolist()
        for start, stop in itertools.pairwise(ends):
            yield sparse.csc_matrix(self._stored[:, start:stop].compute(scheduler="synchronous"))

    def sample(self) -> bytes:
        """Return the name of the array, which is of what dask was told, and some of the first column."""
        return self._stored.name.encode() + super().sample()


def _rows_of(block: Any) -> sparse.csr_matrix:
    if sparse.issparse(block):
        return canonical_rows(sparse.csr_matrix(block))
    if isinstance(block, np.ndarray):
        return compressed(block)
    raise TypeError(
        f"the blocks of a dask array are {type(block).__name__}; those of numpy and scipy are read. Turn them into "
        "these: `X.map_blocks(scipy.sparse.csr_matrix)`."
    )


# -- views ------------------------------------------------------------------------------------------------------------


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
        if self._whole.source is None:
            return None
        part = hashlib.sha256(self._rows.tobytes() + b"|" + self._columns.tobytes()).hexdigest()
        return (*self._whole.source, part)

    def read(self, start: int, stop: int) -> sparse.csr_matrix:
        """Read rows in one piece, float32 in canonical format."""
        return self._of(slice(start, stop))

    def rows(self, index: np.ndarray | slice | None) -> sparse.csr_matrix:
        """Return rows, float32, without entries that are stored twice, read in the order of the file."""
        return self._of(slice(None) if index is None else index)

    def _of(self, index: np.ndarray | slice) -> sparse.csr_matrix:
        found = self._whole.rows(self._rows[index])
        return found if self._all_columns else canonical_rows(found[:, self._columns])
