"""The one place where expression is read, checked and normalised."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from virtualcell._errors import unknown_name
from virtualcell.data._design import Scale, check_scale

Unit = Literal["log1p", "log_counts", "counts"]

MOST_EXPRESSION = np.float32(np.log1p(1e4))  # log1p CP10k of a cell that holds one gene only

_LOG1P_MAX = 9.3  # log(1 + 10,000) = 9.2 is the most that log1p CP10k can hold; anything above is some other unit
_FEW_CELLS = 10  # equal totals of fewer cells than this may be chance
_SAMPLE = 1000  # cells whose totals are looked at
_BLOCK = 4096  # cells read at a time


class Moments(NamedTuple):
    """Mean and sample variance (n - 1) over the cells of each group, (n_groups, n_genes), and their number."""

    mean: np.ndarray
    variance: np.ndarray
    n: np.ndarray


class Expression:
    """The rows of one expression matrix on the model's scale and genes, whatever holds them.

    Values must be finite, not negative and on the stated scale: that is checked once, at the first reading, on the
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
        What is read: `"log1p"`, log(1 + counts per `target_sum`); `"log_counts"`, log(1 + count), or the matrix as it is
        where it holds logarithms already; `"counts"`, the matrix as it is.
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
        self._where = f"{name} of {side}" if side else name
        self._matrix = _matrix(adata, layer, self._where)
        self._cells = adata.obs_names
        self._index: np.ndarray | None = None  # rows of the matrix that are covered; None for all
        self._columns: np.ndarray | None = None
        self._sizes, self._key = library_size, library_size_key
        self._checked = False
        self._argument, self._measured = scale_argument, measured
        self.scale, self.unit, self.target_sum, self.genes = scale, unit, target_sum, adata.var_names
        if genes is not None:
            self._columns, self.genes = columns_of(adata.var_names, genes), pd.Index(genes)

    @property
    def n_cells(self) -> int:
        """How many cells there are."""
        return self._matrix.shape[0] if self._index is None else len(self._index)

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
        rows = np.flatnonzero(rows) if np.asarray(rows).dtype == bool else np.asarray(rows)
        out = copy.copy(self)
        out._index = rows if self._index is None else self._index[rows]
        out._cells = self._cells[rows]
        out._sizes = None if self._sizes is None else self._sizes[rows]
        return out

    def read_as(self, unit: Unit) -> Expression:
        """Return the same cells and genes in another unit."""
        out = copy.copy(self)
        out.unit, out._checked = unit, False
        return out

    def rows(self, index: np.ndarray | slice | None = None) -> sparse.csr_matrix:
        """Return cells, all by default, as float32 CSR (n, n_genes), which may share memory and is only to be read."""
        self._check()
        block = self._raw(index)
        shared = index is None and self._index is None
        if self._columns is not None:
            block, shared = block[:, self._columns], False
        if self.unit == "counts" or self.scale == "log1p":
            return block
        block = block.copy() if shared else block
        if self.unit == "log1p":
            size = self._sizes if index is None else self._sizes[index]
            block.data *= np.repeat((self.target_sum / size).astype(np.float32), np.diff(block.indptr))
        np.log1p(block.data, out=block.data)
        return block

    def blocks(self, n: int = _BLOCK) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
        """Yield row numbers and cells, `n` at a time, in the order of the file: one pass over the matrix."""
        for start in range(0, self.n_cells, n):
            rows = slice(start, min(start + n, self.n_cells))
            yield np.arange(rows.start, rows.stop), self.rows(rows)

    def moments(self, groups: Sequence[np.ndarray]) -> Moments:
        """Return mean and variance of groups of rows, each read once and some at a time.

        Sums are taken in double precision and in the order of the rows given, so that with rows in the order of cell
        names the order of the file does not matter.
        """
        n = np.array([len(g) for g in groups], dtype=np.int64)
        rows = np.concatenate([np.empty(0, np.int64), *groups]).astype(np.int64)
        group = np.repeat(np.arange(len(groups)), n)
        shape = (len(groups), len(self.genes))
        mean, variance = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        open_group, carried = -1, np.zeros((2, shape[1]))  # sums of a group that goes on in the next block
        for start in range(0, len(rows), _BLOCK):
            here = group[start : start + _BLOCK]
            cells = self.rows(rows[start : start + _BLOCK]).astype(np.float64)
            first, last = here[0], here[-1]
            member = sparse.csr_matrix(
                (np.ones(len(here)), (here - first, np.arange(len(here)))), shape=(last - first + 1, len(here))
            )
            sums = (member @ cells).toarray()
            cells.data **= 2
            squares = (member @ cells).toarray()
            if first == open_group:
                sums[0] += carried[0]
                squares[0] += carried[1]
            open_group, carried = last, np.stack([sums[-1], squares[-1]])
            size = n[first : last + 1, None]
            m = sums / size
            mean[first : last + 1] = m
            variance[first : last + 1] = np.maximum(squares - size * m**2, 0) / np.maximum(size - 1, 1)
        return Moments(mean, variance, n)

    # -- reading and checking -----------------------------------------------------------------------------------------

    def _raw(self, index: np.ndarray | slice | None) -> sparse.csr_matrix:
        """Return rows of the matrix, all its genes, as float32 CSR without entries that are stored twice."""
        if index is None:
            index = self._index
        elif self._index is not None:
            index = self._index[index]
        block = self._matrix if index is None else self._matrix[index]
        if not (isinstance(block, sparse.csr_matrix) and block.has_canonical_format):
            block = sparse.csr_matrix(block, copy=sparse.issparse(block))
            block.sum_duplicates()  # before any logarithm
        return block.astype(np.float32, copy=False)

    def _check(self) -> None:
        """Raise unless the covered cells can be what the caller stated; sum up their library sizes on the way."""
        if self._checked:
            return
        whole, most, sums = True, 0.0, np.zeros(self.n_cells)
        for start in range(0, self.n_cells, _BLOCK):
            rows = slice(start, min(start + _BLOCK, self.n_cells))
            block = self._raw(rows)
            self._check_values(block.data)
            whole = whole and np.array_equal(block.data, np.rint(block.data))
            most = max(most, float(block.data.max(initial=0)))
            sums[rows] = np.asarray(block.sum(axis=1, dtype=np.float64)).ravel()
            if self.scale == "counts" and not whole:
                break
        self._check_scale(whole, most)
        if self.scale == "counts" and self.unit == "log1p":
            self._check_sizes(sums)
        elif self.scale == "log1p":
            self._check_totals()
        self._checked = True

    def _check_values(self, values: np.ndarray) -> None:
        if not np.isfinite(values).all():
            raise ValueError(f"{self._where} holds NaN or infinite values. Set them to a number or drop those cells.")
        if values.size and values.min() < 0:
            raise ValueError(
                f"{self._where} holds negative values (least {values.min():.3g}), so it is scaled or residual "
                "expression. Give the layer with raw counts or log1p values."
            )

    def _check_scale(self, whole: bool, most: float) -> None:
        stated, argument = f"{self._argument}={self.scale!r} was stated, but {self._where}", self._argument
        if self.scale == "counts" and not whole:
            raise ValueError(
                f"{stated} holds fractions. Give the layer with raw counts (layer=), or say {argument}='log1p' if these "
                "are log(1 + counts per 10,000)."
            )
        if self.scale == "log1p" and most > _LOG1P_MAX:
            raise ValueError(
                f"{stated} reaches {most:.4g}, more than log1p of counts per 10,000 can. Say {argument}='counts' if "
                "these are raw counts."
            )
        if self.scale == "log1p" and whole and most > 0:
            raise ValueError(f"{stated} holds whole numbers only. Say {argument}='counts' for raw counts.")

    def _check_sizes(self, sums: np.ndarray) -> None:
        """Raise for cells that cannot be divided by their library size, and take sums where none was given."""
        size, key = sums if self._sizes is None else self._sizes, self._key
        empty = self._cells[~(np.isfinite(size) & (size > 0))]
        if len(empty):
            which = "no counts" if key is None else f"no positive number in obs[{key!r}]"
            raise ValueError(
                f"{len(empty)} cells have {which}, among them {list(empty[:3])}. Drop them first"
                + (": `sc.pp.filter_cells(adata, min_counts=1)`." if key is None else ".")
            )
        small = size < 0.999 * sums
        if small.any():
            raise ValueError(
                f"library_size_key={key!r} is smaller than what {self._where} adds up to in {small.sum()} cells, among "
                f"them {list(self._cells[small][:3])}: a library holds all counts of its cell. Leave it out for row "
                "sums."
            )
        self._sizes = size

    def _check_totals(self) -> None:
        """Raise where logarithms are of something else than counts per `target_sum`.

        Genes that were left out make totals smaller and unequal, which is as it should be.
        """
        sample = np.unique(np.linspace(0, self.n_cells - 1, min(_SAMPLE, self.n_cells)).astype(int))
        counts = self._raw(sample).expm1()
        totals = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
        totals = totals[totals > 0]
        if not len(totals):
            return
        median, stated = float(np.median(totals)), f"{self._argument}='log1p' was stated, but {self._where}"
        off = abs(median / self.target_sum - 1)
        anew = (
            f"Normalise anew with `sc.pp.normalize_total(adata, target_sum={self.target_sum:g})`, or give raw counts "
        )
        anew += f"with {self._argument}='counts'."
        if off > 0.05 and np.allclose(counts.data, np.rint(counts.data), rtol=0, atol=0.01):
            raise ValueError(
                f"{stated} holds logarithms of whole numbers: of raw counts, not divided by their total. Give the raw "
                f"counts, with {self._argument}='counts'."
            )
        equal = len(totals) >= _FEW_CELLS and np.mean(np.abs(totals / median - 1) < 1e-3) > 0.9
        if (equal and off > 0.01) or (self._measured and median > 1.05 * self.target_sum):
            raise ValueError(
                f"{stated} was normalised to {median:.4g} counts per cell (median) and not to {self.target_sum:g}: "
                f"scanpy's normalize_total takes the median where target_sum is left out. {anew}"
            )


def _matrix(adata: AnnData, layer: str | None, where: str) -> sparse.csr_matrix | np.ndarray:
    """Return `X` or a layer as it is in memory, rows first."""
    if adata.isbacked:
        raise ValueError("the AnnData is backed by its file, which is not supported. Load it: `adata.to_memory()`.")
    if layer is not None and layer not in adata.layers:
        raise unknown_name("layer", layer, adata.layers, "Leave it out to use X.")
    matrix = adata.X if layer is None else adata.layers[layer]
    if matrix is None:
        raise ValueError(f"{where} is empty.")
    if sparse.issparse(matrix):
        return sparse.csr_matrix(matrix)  # shares memory with what is CSR already
    if isinstance(matrix, np.ndarray):
        return np.asarray(matrix)
    raise TypeError(f"{where} is a {type(matrix).__name__}; give a numpy array or a scipy sparse matrix.")


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
        raise unknown_name(
            "genes", missing[0], index, f"{len(missing)} of {len(genes)} genes are missing; they are matched by name."
        )
    return None if len(where) == len(index) and (where == np.arange(len(index))).all() else where
