"""Matrices in files of h5ad and zarr, read some rows at a time."""

from __future__ import annotations

import itertools
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from anndata import abc
from anndata.io import sparse_dataset
from scipy import sparse

from virtualcell._settings import settings
from virtualcell._tasks import Workers
from virtualcell.data._copied import copy_of, key_of
from virtualcell.data._stored import StoredMatrix, canonical_rows, compressed

_GAP = 32
_MOST_CELLS = 1 << 14  # in a block
_COPIES = 4  # of a block that are in memory at a time, on its way
ENTRY = 8  # bytes of a column and a value


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
    @abstractmethod
    def here(self) -> tuple:
        """What tells this matrix from any other in this process, as long as it is not changed in place."""

    @property
    def key(self) -> str | None:
        """What tells this matrix from any other, and its copy too."""
        return None if self.source is None else key_of(self)

    @property
    def chunk(self) -> int:
        """Rows that the storage keeps together."""
        return 1

    @property
    def gap(self) -> int:
        """Rows that are rather read although nobody asked for them than the storage is gone to once more."""
        return self.shape[0]

    @property
    def cells_at_once(self) -> int:
        """Rows that memory allows to read at a time."""
        fits = int(settings.max_memory * 1e9 / (_COPIES * max(self.bytes_per_cell, 1)))
        return min(max(fits, 1), _MOST_CELLS)

    @cached_property
    def edges(self) -> np.ndarray:
        """First rows of the blocks that a pass over the matrix reads, and the number of rows: (n_blocks + 1,)."""
        n = max(self.cells_at_once // self.chunk * self.chunk, self.chunk)
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
        is_new = (np.diff(wanted) > self.gap) | (np.diff(np.searchsorted(self.edges, wanted, side="right")) > 0)
        parts = np.split(wanted, np.flatnonzero(is_new) + 1)
        found = stacked([self.read(int(part[0]), int(part[-1]) + 1)[part - part[0]] for part in parts])
        return found if np.array_equal(back, np.arange(found.shape[0])) else found[back]

    def _in_one_piece(self, start: int, stop: int) -> sparse.csr_matrix:
        inside = self.edges[(self.edges > start) & (self.edges < stop)]
        edges = [start, *inside.tolist(), stop]
        return stacked([self.read(a, b) for a, b in itertools.pairwise(edges)])

    def copied(self, *, make: bool = True, workers: Workers | None = None) -> StoredMatrix:
        """Return a copy in the cache folder, made where there is none; itself where none is to be made."""
        return copy_of(self, make=make, workers=workers or Workers()) or self

    def sample(self) -> bytes:
        """Return some rows from all over the matrix, as bytes."""
        n = self.shape[0]
        block = self.rows(np.unique(np.linspace(0, max(n - 1, 0), min(8, n)).astype(int)))
        return b"".join(np.ascontiguousarray(a).tobytes() for a in (block.indptr, block.indices, block.data))


def stacked(parts: list[sparse.csr_matrix]) -> sparse.csr_matrix:
    """Put rows one below the other."""
    return parts[0] if len(parts) == 1 else sparse.vstack(parts, format="csr")


# -- files ------------------------------------------------------------------------------------------------------------


class OnDisk(LazyMatrix):
    """A matrix in an h5ad or zarr file, which another process opens anew."""

    _element: Any  # group or array of the file

    def __reduce__(self) -> tuple:
        element = self._element
        if not isinstance(element, h5py.Group | h5py.Dataset):
            return _opened_anew, (type(self), element)
        return _opened_anew, (type(self), (os.path.abspath(element.file.filename), element.name))

    @property
    def source(self) -> tuple | None:
        """File and place in it, its size and when it was written."""
        return place_of(self._element)

    @property
    def here(self) -> tuple:
        """File or store, as this process has it open, and place in it."""
        element = self._element
        if isinstance(element, h5py.Group | h5py.Dataset):
            return h5py.h5o.get_info(element.id).fileno, element.name
        return str(element.store), element.path

    @property
    def files(self) -> list[Path]:
        """The file, unless it is in the memory of a process or on the net.

        Raises
        ------
        ValueError
            For an HDF5 file that no other process can open.
        """
        if isinstance(element := self._element, h5py.Group | h5py.Dataset):
            if self.source is None:
                raise ValueError(
                    f"client=: its workers cannot open {element.file.filename}, which is no file, was opened from "
                    "another folder, or was replaced since. Open a file by its whole path, or leave client out."
                )
            if element.file.mode != "r":
                raise ValueError(
                    f"client=: its workers cannot open {element.file.filename}, which is open for writing here. Open "
                    "it with backed='r', or leave client out."
                )
        return [] if self.source is None else [Path(self.source[0])]


def _opened_anew(kind: Callable[[Any], OnDisk], place: Any) -> OnDisk:
    element = h5py.File(place[0], "r")[place[1]] if isinstance(place, tuple) else place
    return kind(sparse_dataset(element) if hasattr(element, "keys") else element)


class CSROnDisk(OnDisk):
    """Compressed rows in an h5ad or zarr file."""

    def __init__(self, stored: abc.CSRDataset) -> None:
        group = stored.group
        self._element, self.shape = group, stored.shape
        self._data, self._indices, self._indptr = (group[name] for name in ("data", "indices", "indptr"))

    @property
    def entries_per_cell(self) -> float:
        """Mean number of stored entries of a row."""
        return self._data.shape[0] / max(self.shape[0], 1)

    @property
    def bytes_per_cell(self) -> float:
        """Memory that a row takes while it is read."""
        return self.entries_per_cell * (ENTRY + self._data.dtype.itemsize)

    @property
    def gap(self) -> int:
        """Rows that are rather read although nobody asked for them; in zarr, chunks would be decompressed again."""
        return _GAP if isinstance(self._data, h5py.Dataset) else self.shape[0]

    def read(self, start: int, stop: int) -> sparse.csr_matrix:
        """Read rows in one piece, float32 in canonical format."""
        indptr = self._indptr[start : stop + 1].astype(np.int64)
        entries = slice(int(indptr[0]), int(indptr[-1]))
        arrays = self._data[entries], self._indices[entries].astype(np.int32, copy=False), indptr - indptr[0]
        return canonical_rows(sparse.csr_matrix(arrays, shape=(stop - start, self.shape[1])))


class DenseOnDisk(OnDisk):
    """A dense matrix in an HDF5 or zarr file."""

    is_sparse = False

    def __init__(self, stored: Any) -> None:
        self._element, self.shape = stored, tuple(stored.shape)

    @property
    def entries_per_cell(self) -> float:
        """Number of genes."""
        return float(self.shape[1])

    @property
    def bytes_per_cell(self) -> float:
        """Memory that a row takes while it is read."""
        return self.shape[1] * (self._element.dtype.itemsize + 4)

    @property
    def chunk(self) -> int:
        """Rows that the storage keeps together."""
        return self._element.chunks[0] if self._element.chunks else 1

    def read(self, start: int, stop: int) -> sparse.csr_matrix:
        """Read rows in one piece, float32 in canonical format."""
        return compressed(np.asarray(self._element[start:stop]))


class ByColumns(LazyMatrix):
    """A matrix that is stored by columns: whoever asks for rows gets them from a copy by rows, made once."""

    @abstractmethod
    def columns(self) -> Iterator[sparse.csc_matrix]:
        """Yield all columns, some at a time."""

    @cached_property
    def _by_rows(self) -> StoredMatrix:
        return self.copied()

    def __reduce__(self) -> tuple:
        return _same, (self._by_rows,)  # another process reads the copy

    def read(self, start: int, stop: int) -> sparse.csr_matrix:
        """Read rows in one piece, float32 in canonical format."""
        return self._by_rows.rows(slice(start, stop))

    def sample(self) -> bytes:
        """Return some of the first column, as bytes: rows would have to be sought everywhere."""
        first = next(self.columns(), None)
        return b"" if first is None else first.data[:1000].tobytes() + first.indices[:1000].tobytes()


def _same(copy: StoredMatrix) -> StoredMatrix:
    return copy


class CSCOnDisk(ByColumns, OnDisk):
    """Compressed columns in an h5ad or zarr file."""

    def __init__(self, stored: abc.CSCDataset) -> None:
        self._element, self.shape = stored.group, stored.shape

    @property
    def entries_per_cell(self) -> float:
        """Mean number of stored entries of a row."""
        return self._element["data"].shape[0] / max(self.shape[0], 1)

    @property
    def bytes_per_cell(self) -> float:
        """Memory that a row takes while it is read."""
        return self.entries_per_cell * (ENTRY + self._element["data"].dtype.itemsize)

    def columns(self) -> Iterator[sparse.csc_matrix]:
        """Yield all columns, as many at a time as memory allows."""
        indptr = self._element["indptr"][:].astype(np.int64)
        most = max(1, int(settings.max_memory * 1e9 / (_COPIES * 2 * ENTRY)))
        first = 0
        while first < self.shape[1]:
            last = max(first + 1, int(np.searchsorted(indptr, indptr[first] + most, side="right")) - 1)
            entries = slice(int(indptr[first]), int(indptr[last]))
            arrays = self._element["data"][entries], self._element["indices"][entries], indptr[first : last + 1]
            yield sparse.csc_matrix((*arrays[:2], arrays[2] - arrays[2][0]), shape=(self.shape[0], last - first))
            first = last


def place_of(element: Any) -> tuple | None:
    """Tell a group or an array of a file from any other, also after the file was written anew."""
    if isinstance(element, h5py.Group | h5py.Dataset):
        path = Path(element.file.filename)
        if not path.exists():  # in the memory of a process, or opened from another folder
            return None
        stat = path.stat()
        has_number = os.name == "posix" and element.file.driver == "sec2"  # Windows keeps open files in their place
        if has_number and not os.path.samestat(stat, os.fstat(element.file.id.get_vfd_handle())):
            return None  # another file is there by now
        return str(path.resolve()), element.name, stat.st_size, stat.st_mtime_ns
    root = getattr(element.store, "root", None)
    if root is None:  # in the memory of a process, or on the net
        return None
    files = [path.stat() for path in sorted((Path(root) / element.path).rglob("*")) if path.is_file()]
    newest = max((stat.st_mtime_ns for stat in files), default=0)
    return str(Path(root).resolve()), element.path, sum(stat.st_size for stat in files), newest
