"""Expression as a dask array, for functions of other packages that go through one block by block."""

from __future__ import annotations

from types import ModuleType

import numpy as np
from scipy import sparse

from virtualcell.data._expression import Expression

_CELLS = 1 << 13  # in a block


def dask_array(what: str) -> ModuleType:
    """Return `dask.array`, or say what it is needed for and how to get it."""
    try:
        import dask.array
    except ImportError as error:
        raise ImportError(f'{what} needs dask: `pip install "virtualcell[dask]"`.') from error
    return dask.array


def as_dask(expression: Expression) -> object:
    """Return cells x genes as a dask array of sparse blocks, each of which is read when it is worked on."""

    def block(block_info: dict | None = None) -> sparse.csr_matrix:
        start, stop = block_info[None]["array-location"][0]
        return expression.rows(slice(start, stop))

    edges = [*range(0, expression.n_cells, _CELLS), expression.n_cells]
    chunks = tuple(np.diff(edges).tolist()), (len(expression.genes),)
    meta = sparse.csr_matrix((0, 0), dtype=np.float32)
    da = dask_array("to go through cells that are not in memory, block by block,")
    return da.map_blocks(block, chunks=chunks, dtype=np.float32, meta=meta)
