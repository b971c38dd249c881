"""Dask arrays, and expression as one for functions of other packages that go through it block by block."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from virtualcell._tasks import Workers
from virtualcell.data._on_disk import ENTRY, ByColumns, LazyMatrix
from virtualcell.data._stored import canonical_rows, compressed

if TYPE_CHECKING:
    from virtualcell.data._expression import Expression

OF_FILES = "virtualcell-files-"  # beginning of the names of dask arrays whose name tells all that is in them

_CELLS = 1 << 13  # in a block
_FIRST = 32  # cells whose entries tell how many others have


def dask_array(what: str) -> ModuleType:
    """Return `dask.array`, or say what it is needed for and how to get it."""
    try:
        import dask.array
    except ImportError as error:
        raise ImportError(f'{what} needs dask: `pip install "virtualcell[dask]"`.') from error
    return dask.array


def as_dask(expression: Expression) -> object:
    """Return cells x genes as a dask array of sparse blocks, each of which is read when it is worked on.

    A block holds what tells of its own cells alone, so that little is sent to where it is read.
    """
    da, n_genes = dask_array("to go through cells that are not in memory, block by block,"), len(expression.genes)
    from dask import delayed

    meta = sparse.csr_matrix((0, 0), dtype=np.float32)
    edges = [*range(0, expression.n_cells, _CELLS), expression.n_cells]
    blocks = [
        da.from_delayed(delayed(_all_rows)(expression.take(np.arange(a, b))), (b - a, n_genes), np.float32, meta)
        for a, b in itertools.pairwise(edges)
    ]
    return da.concatenate(blocks)


@contextmanager
def worked_on_by(workers: Workers) -> Iterator[None]:
    """Have dask arrays computed by workers, and by nobody else: a client that was not named is not asked."""
    import dask

    # by its name: a worker that is started meanwhile is sent all that dask is told
    told = dask.config.set(scheduler="threads" if workers.client is None else "distributed")
    with told, nullcontext() if workers.client is None else workers.client.as_current():
        yield


def _all_rows(expression: Expression) -> sparse.csr_matrix:
    return expression.rows()


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
        first = self.read(0, min(_FIRST, self.shape[0]))
        return max(first.nnz / first.shape[0], 1.0)

    @property
    def bytes_per_cell(self) -> float:
        """Memory that a row takes while it is read."""
        if self.is_sparse:
            return self.entries_per_cell * (ENTRY + self._stored.dtype.itemsize)
        return self.shape[1] * (self._stored.dtype.itemsize + 4)

    @cached_property
    def edges(self) -> np.ndarray:
        """First rows of the blocks that a pass reads: as many chunks of the array as memory allows, at least one."""
        n, ends, edges = self.cells_at_once, np.cumsum(self._stored.chunks[0]), [0]
        for i, end in enumerate(ends.tolist()):
            if i + 1 == len(ends) or int(ends[i + 1]) - edges[-1] > n:
                edges.append(end)
        return np.unique([*edges, self.shape[0]])

    @property
    def source(self) -> tuple | None:
        """Name of an array of files; nothing tells whether what others are made of has changed."""
        return self.here if self._stored.name.startswith(OF_FILES) else None

    @property
    def here(self) -> tuple:
        """Name of the array, which is of what dask was told."""
        return (self._stored.name,)

    def read(self, start: int, stop: int) -> sparse.csr_matrix:
        """Read rows in one piece, float32 in canonical format."""
        # by this thread: those of dask would hold as many chunks as there are cores
        return _rows_of(self._stored[start:stop].compute(scheduler="synchronous"))

    def sample(self) -> bytes:
        """Return some rows where the name of the array is not all that tells of it."""
        return super().sample() if self.source is None else b""


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
        return self.entries_per_cell * (ENTRY + self._stored.dtype.itemsize)

    @property
    def source(self) -> tuple | None:
        """Nothing tells whether what the array is made of has changed."""
        return None

    @property
    def here(self) -> tuple:
        """Name of the array, which is of what dask was told."""
        return (self._stored.name,)

    def columns(self) -> Iterator[sparse.csc_matrix]:
        """Yield all columns, one chunk at a time."""
        ends = np.cumsum([0, *self._stored.chunks[1]]).tolist()
        for start, stop in itertools.pairwise(ends):
            yield sparse.csc_matrix(self._stored[:, start:stop].compute(scheduler="synchronous"))


def _rows_of(block: Any) -> sparse.csr_matrix:
    if sparse.issparse(block):
        return canonical_rows(sparse.csr_matrix(block))
    if isinstance(block, np.ndarray):
        return compressed(block)
    raise TypeError(
        f"the blocks of a dask array are {type(block).__name__}; those of numpy and scipy are read. Turn them into "
        "these: `X.map_blocks(scipy.sparse.csr_matrix)`."
    )
