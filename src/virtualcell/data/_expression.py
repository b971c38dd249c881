"""The one place where expression is read, checked and normalised."""

from __future__ import annotations

import copy
import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from virtualcell._tasks import Workers
from virtualcell.data._design import Scale, check_scale
from virtualcell.data._lazy import stored_matrix
from virtualcell.data._moments import Moments, moments_of, pieces_of, sums_of
from virtualcell.data._scales import (
    DataOf,
    are_nearly_whole,
    are_whole,
    fault_of_fractions,
    fault_of_totals,
    is_one_total,
    rounded,
)
from virtualcell.data._stored import BLOCK, columns_of, row_numbers, row_sums
from virtualcell.data._threads import in_threads

logger = logging.getLogger(__name__)

Unit = Literal["log1p", "log_counts", "counts"]

MOST_EXPRESSION = np.float32(np.log1p(1e4))  # log1p CP10k of a cell that holds one gene only

_SAMPLE = 1000  # cells whose totals are looked at
_PIECES = 8  # blocks of cells that a worker sums up at a time


class Expression:
    """The rows of one expression matrix on the model's scale and genes, whatever holds them.

    Values must be finite, not negative and on the stated scale (counts may be off by what arithmetic leaves, a
    thousandth, and are rounded): that is checked once, at the first reading, on the
    rows that this object covers. The matrix itself is never changed and never copied as a whole.

    Parameters
    ----------
    adata
        Cells x genes.
    layer, scale, target_sum
        As in :class:`virtualcell.data._design.Design`.
    library_size
        Library size of each cell, (n_cells,); by default the row sums over all genes of `adata`.
    library_size_key
        Column that the library sizes come from, for messages.
    unit
        What is read: `"log1p"`, log(1 + counts per `target_sum`); `"log_counts"`, log(1 + count), or the matrix as it
        is where it holds logarithms already; `"counts"`, the matrix as it is.
    genes
        Columns to read, by name and in this order; all of them by default.
    side
        Name of the argument that `adata` was given as, for messages of calls with several.
    scale_argument
        Name of the argument that stated the scale, for messages.
    measured
        Whether the cells were measured. The totals of predicted cells scatter around `target_sum`, and are let be where
        they do.
    """

    def __init__(
        self,
        adata: AnnData,
        *,
        layer: str | None = None,
        scale: Scale = "counts",
        library_size: np.ndarray | None = None,
        library_size_key: str | None = None,
        target_sum: float = 1e4,
        unit: Unit = "log1p",
        genes: Sequence[str] | None = None,
        side: str = "",
        scale_argument: str = "scale",
        measured: bool = True,
    ) -> None:
        check_scale(scale, scale_argument)
        name = "X" if layer is None else f"layers[{layer!r}]"
        self._where, self._side = f"{name} of {side}" if side else name, side
        self._matrix = stored_matrix(adata, layer, self._where)
        self._data, self._layer = DataOf(adata), layer  # for messages
        self._cells = adata.obs_names
        self._index: np.ndarray | None = None  # rows of the matrix that are covered; None for all
        self._columns: np.ndarray | None = None
        self._n_columns = adata.n_vars
        self._found, self._key = _Found(library_size), library_size_key
        self._argument, self._measured, self.workers = scale_argument, measured, Workers()
        self.scale, self.unit, self.target_sum, self.genes = scale, unit, target_sum, adata.var_names
        if genes is not None:
            self._columns, self.genes = columns_of(adata.var_names, genes), pd.Index(genes)

    @property
    def n_cells(self) -> int:
        """How many cells there are."""
        return len(self._cells)

    @property
    def cells(self) -> pd.Index:
        """Names of the cells."""
        return self._cells

    @property
    def library_size(self) -> np.ndarray | None:
        """Library size of each cell as it was given, or as summed up at the first reading of "log1p" from counts."""
        return self._found.sizes

    def select(self, genes: Sequence[str]) -> Expression:
        """Return the same cells with other genes, by name and in this order."""
        columns = columns_of(self.genes, genes)
        out = copy.copy(self)
        if columns is not None:
            out._columns = columns if self._columns is None else self._columns[columns]
        out.genes = pd.Index(genes)
        return out

    def take(self, rows: np.ndarray) -> Expression:
        """Return some of the cells: row numbers or a mask."""
        rows = row_numbers(rows, self.n_cells)
        out = copy.copy(self)
        out._index = rows if self._index is None else self._index[rows]
        out._cells = self._cells[rows]
        sizes = self._found.sizes
        out._found = _Found(None if sizes is None else sizes[rows], self._found.is_checked, self._found.is_noisy)
        return out

    def read_as(self, unit: Unit) -> Expression:
        """Return the same cells and genes in another unit."""
        out = copy.copy(self)
        out.unit, out._found = unit, _Found(self._found.sizes)
        return out

    def rows(self, index: np.ndarray | slice | None = None) -> sparse.csr_matrix:
        """Return cells, all by default, as float32 CSR (n, n_genes), which may share memory and is only to be read.

        Within a row the entries are in the order of the file.
        """
        self._check()
        block = self._raw(index)
        shared = self._index is None and (index is None or isinstance(index, slice))
        if self._columns is not None:
            block, shared = block[:, self._columns], False
        if self.unit == "counts" or self.scale == "log1p":
            return block
        block = block.copy() if shared else block
        if self.unit == "log1p":
            size = self._found.sizes if index is None else self._found.sizes[index]
            block.data *= np.repeat((self.target_sum / size).astype(np.float32), np.diff(block.indptr))
        np.log1p(block.data, out=block.data)
        return block

    def stored(self, index: np.ndarray | slice) -> sparse.csr_matrix:
        """Return cells as they are stored, with all columns of the matrix: what `rows` is made of, for a GPU to make.

        They may share memory and are only to be read; of these columns, `gene_of_column` and `takes_logarithm` tell.
        """
        if self.unit == "log1p" and self.scale == "counts":
            raise ValueError("unit='log1p' divides counts by library sizes, which is for `rows` to do.")
        self._check()
        return self._raw(index)

    @property
    def gene_of_column(self) -> np.ndarray:
        """Number that each stored column has among the genes, -1 where it is none of them, (n_columns,)."""
        if self._columns is None:
            return np.arange(len(self.genes))
        return pd.Index(self._columns).get_indexer(np.arange(self._n_columns))

    @property
    def takes_logarithm(self) -> bool:
        """Whether values are log(1 + x) of what is stored."""
        return self.unit == "log_counts" and self.scale == "counts"

    @property
    def entries_per_cell(self) -> float:
        """Mean number of stored entries of a cell, of all columns."""
        return self._matrix.entries_per_cell

    @property
    def key(self) -> str | None:
        """What tells these rows from any others, in any process; `None` of a matrix that nothing tells apart."""
        if (of_matrix := self._matrix.key) is None:
            return None
        self._check()  # which sums up library sizes
        arrays = self._index, self._columns, self._found.sizes if self.unit == "log1p" else None
        digests = [None if a is None else hashlib.sha256(np.ascontiguousarray(a)).hexdigest() for a in arrays]
        known = of_matrix, self.unit, self.scale, self.target_sum, self._found.is_noisy, *digests
        return hashlib.sha256(repr(known).encode()).hexdigest()[:24]

    @property
    def in_memory(self) -> bool:
        """Whether the matrix is in memory, and not read from elsewhere."""
        return self._matrix.in_memory

    @property
    def is_lazy(self) -> bool:
        """Whether rows are slow to read but for one pass in the order of the file."""
        return self._matrix.is_lazy

    def at_hand(self, *, make: bool = True) -> Expression:
        """Return the same cells from where they are quick to read in any order: from memory, or from a copy on disk.

        A matrix that is not in memory is copied, as a whole and in one pass, to the cache folder, where later calls
        find it. Where no copy is to be made, one that is there is taken.
        """
        if not self._matrix.is_lazy:
            return self
        out = copy.copy(self)
        out._matrix = self._matrix.copied(make=make, workers=self.workers)
        return out

    def by(self, workers: Workers) -> Expression:
        """Return the same cells, of which workers go through the blocks: for the check, the copy, and moments.

        Cells in memory would have to be sent to them, and are gone through here.
        """
        if workers.client is None:
            return self
        if self.in_memory:
            logger.info("%s is in memory: client= is of use for data that its workers can open.", self._where)
            return self
        for file in self._matrix.files:
            workers.require(file)
        out = copy.copy(self)
        out.workers = workers
        return out

    def slices(self, n: int | None = None) -> list[slice]:
        """Cut the cells, in their order, into blocks of `n`, by default as the matrix is best read."""
        edges = np.append(np.arange(0, self.n_cells, n or BLOCK), self.n_cells)
        if n is None and self._matrix.is_lazy:
            if self._index is None:
                edges = self._matrix.edges
            elif (np.diff(self._index) > 0).all():  # in the order of the file
                edges = np.unique([0, *np.searchsorted(self._index, self._matrix.edges), self.n_cells])
        return [slice(int(a), int(b)) for a, b in itertools.pairwise(edges)]

    def blocks(self, n: int | None = None) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
        """Yield row numbers and cells, `n` at a time, in the order of the file: one pass over the matrix."""
        for rows in self.slices(n):
            yield np.arange(rows.start, rows.stop), self.rows(rows)

    def moments(self, groups: Sequence[np.ndarray]) -> Moments:
        """Return mean and variance of groups of rows, each read once and some at a time.

        Sums are taken in double precision and in the order of the rows given, so that with rows in the order of cell
        names the order of the file does not matter. Nor does it matter which other groups are asked for, or who sums
        up. Of a lazy matrix a copy is made first.
        """
        if self._matrix.is_lazy:
            return self.at_hand().moments(groups)
        self._check()  # here, where all blocks are
        n = [len(g) for g in groups]
        rows = ([groups[g][start:stop] for g, start, stop in pieces] for pieces in pieces_of(n))
        found = self.workers.each(Expression._sums, self, rows, at_once=_PIECES)
        return moments_of(n, found, len(self.genes))

    def _sums(self, pieces: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return sums_of(self.rows(np.concatenate(pieces)), [len(piece) for piece in pieces])

    # -- reading and checking -----------------------------------------------------------------------------------------

    def _raw(self, index: np.ndarray | slice | None) -> sparse.csr_matrix:
        """Return rows of the matrix, all its genes, as float32 CSR without entries that are stored twice."""
        if index is None:
            index = self._index
        elif self._index is not None:
            index = self._index[index]
        block = self._matrix.rows(index)
        return rounded(block) if self._found.is_noisy else block

    def _check(self) -> None:
        """Raise unless the covered cells can be what the caller stated; sum up their library sizes on the way."""
        if self._found.is_checked:
            return
        whole, exact, most, sums = True, True, 0.0, np.zeros(self.n_cells)
        self._raw(slice(0, 0))  # what is stored by columns is turned around once, not in every thread
        blocks = self.slices()
        here = self.workers.client is None and not self._matrix.is_lazy
        looks = in_threads(self._look_at, blocks) if here else self.workers.each(Expression._look_at, self, blocks)
        for rows, (is_whole, is_exact, highest, of_rows) in zip(blocks, looks, strict=True):
            whole, exact, most = whole and is_whole, exact and is_exact, max(most, highest)
            sums[rows] = of_rows
        if not whole:
            self._check_fractions()
        self._check_scale(whole, most)
        if self.scale == "counts" and self.unit == "log1p":
            self._check_sizes(sums)
        elif self.scale == "log1p" and self.unit != "log_counts":  # which are of any total
            self._check_totals()
        self._found.is_noisy = self.scale == "counts" and not exact
        self._found.is_checked = True

    def _look_at(self, rows: slice) -> tuple[bool, bool, float, np.ndarray | float]:
        """Raise for values that are none; tell whether others are whole, to the last bit, the highest, sums of counts.

        Counts may be off by what arithmetic leaves, and are then rounded.
        """
        block = self._raw(rows)
        low, high = block.data.min(initial=0), block.data.max(initial=0)  # NaN where there is one
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError(f"{self._where} holds NaN or infinite values. Set them to a number or drop those cells.")
        is_exact = low >= 0 and are_whole(block.data)
        is_whole = is_exact or (self.scale == "counts" and are_nearly_whole(block.data))
        if low < 0 and not (is_whole and low > -0.5):
            raise ValueError(
                f"{self._where} holds negative values (least {low:.3g}), so it is scaled or residual expression. Give "
                f"the layer with raw counts or log1p values.{self._counts_elsewhere()}"
            )
        if self.scale != "counts" or self.unit != "log1p":
            return is_whole, is_exact, float(high), 0.0
        return is_whole, is_exact, float(high), row_sums(block if is_exact or not is_whole else rounded(block))

    def _counts_elsewhere(self) -> str:
        return self._data.counts_elsewhere(self._layer, self._argument, self._side)

    def _check_fractions(self) -> None:
        """Raise where fractions are known to be neither counts nor the logarithms that are meant."""
        what = fault_of_fractions(self._sample(), self.scale, self._argument, self.target_sum, measured=self._measured)
        if what is not None:
            self._refuse(what)

    def _refuse(self, what: str) -> None:
        stated = f"{self._argument}={self.scale!r} was stated, but {self._where}"
        raise ValueError(f"{stated} {what}{self._counts_elsewhere()}")

    def _check_scale(self, whole: bool, most: float) -> None:
        stated, argument = f"{self._argument}={self.scale!r} was stated, but {self._where}", self._argument
        logs, is_high = f"log(1 + counts per {self.target_sum:,.0f})", most > 1.01 * np.log1p(self.target_sum)
        if not whole and is_high:
            with np.errstate(over="ignore"):  # of what is no logarithm
                one_total = is_one_total(row_sums(self._sample().expm1()))
            if one_total:  # such as a million: rounding logarithms would not make them counts
                self._check_totals()
            raise ValueError(
                f"{stated} holds fractions and reaches {most:.4g}: these are neither raw counts nor {logs}. Give the "
                f"layer with raw counts (layer=), or round counts that were corrected with `np.rint` and say "
                f"{argument}='counts'.{self._counts_elsewhere()}"
            )
        if self.scale == "counts" and not whole:
            raise ValueError(
                f"{stated} holds fractions. Give the layer with raw counts (layer=), or say {argument}='log1p' if these"
                f" are {logs}. Counts that were corrected (by SoupX, CellBender, alevin-fry) are to be rounded, with "
                f"`np.rint`.{self._counts_elsewhere()}"
            )
        if self.scale == "log1p" and is_high:
            what = f"{stated} reaches {most:.4g}, more than {logs} can."
            raise ValueError(f"{what} Say {argument}='counts' if these are raw counts.")
        if self.scale == "log1p" and whole and most > 0:
            raise ValueError(f"{stated} holds whole numbers only. Say {argument}='counts' for raw counts.")

    def _check_sizes(self, sums: np.ndarray) -> None:
        """Raise for cells that cannot be divided by their library size, and take sums where none was given."""
        size, key = sums if self._found.sizes is None else self._found.sizes, self._key
        empty = self._cells[~(np.isfinite(size) & (size > 0))]
        if len(empty):
            which = "no counts" if key is None else f"no positive number in obs[{key!r}]"
            how = ": `sc.pp.filter_cells(adata, min_counts=1)`." if key is None else "."
            raise ValueError(f"{len(empty)} cells have {which}, among them {list(empty[:3])}. Drop them first{how}")
        small = size < 0.999 * sums
        if small.any():
            raise ValueError(
                f"library_size_key={key!r} is smaller than what {self._where} adds up to in {small.sum()} cells, among "
                f"them {list(self._cells[small][:3])}: a library holds all counts of its cell. Leave it out for row "
                "sums."
            )
        self._found.sizes = size

    def _sample(self) -> sparse.csr_matrix:
        """Return some cells from all over the file, in double precision."""
        rows = np.unique(np.linspace(0, self.n_cells - 1, min(_SAMPLE, self.n_cells)).astype(int))
        return self._raw(rows).astype(np.float64)

    def _check_totals(self) -> None:
        """Raise where logarithms are of something else than counts per `target_sum`."""
        what = fault_of_totals(self._sample(), self._argument, self.target_sum, measured=self._measured)
        if what is not None:
            self._refuse(what)


@dataclass
class _Found:
    """What the first reading found out: library sizes, or those given, and whether the rest is as stated."""

    sizes: np.ndarray | None = None
    is_checked: bool = False
    is_noisy: bool = False
