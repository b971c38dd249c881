"""The one place where expression is read, checked and normalised."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from virtualcell._design import Scale, check_scale
from virtualcell._errors import unknown_name

# log(1 + 10,000) = 9.2 is the most that a log1p CP10k matrix can hold; anything above is some other unit.
_LOG1P_MAX = 9.3
# Equal totals of fewer cells than this may be chance.
_FEW_CELLS = 10


def matrix_name(layer: str | None) -> str:
    """Name the matrix in a message."""
    return "X" if layer is None else f"layers[{layer!r}]"


def raw_matrix(adata: AnnData, layer: str | None = None) -> sparse.csr_matrix:
    """Return `X` or a layer as float32 CSR, sharing memory where it can; values must be finite and not negative."""
    if adata.isbacked:
        raise ValueError("the AnnData is backed by its file, which is not supported. Load it: `adata.to_memory()`.")
    if layer is not None and layer not in adata.layers:
        raise unknown_name("layer", layer, adata.layers, "Leave it out to use X.")
    matrix = adata.X if layer is None else adata.layers[layer]
    where = matrix_name(layer)
    if matrix is None:
        raise ValueError(f"{where} is empty.")
    matrix = sparse.csr_matrix(matrix)
    if not matrix.has_canonical_format:  # entries stored twice are summed before any logarithm
        matrix = matrix.copy()
        matrix.sum_duplicates()
    if not np.isfinite(matrix.data).all():
        raise ValueError(f"{where} holds NaN or infinite values. Set them to a number or drop those cells.")
    if matrix.data.size and matrix.data.min() < 0:
        raise ValueError(
            f"{where} holds negative values (least {matrix.data.min():.3g}), so it is scaled or residual expression. "
            "Give the layer with raw counts or log1p values."
        )
    return matrix.astype(np.float32, copy=False)


def check_matches_scale(
    matrix: sparse.csr_matrix, scale: Scale, where: str, *, target_sum: float | None = None
) -> None:
    """Raise if the values cannot be what the caller stated, or (with `target_sum`) have another total."""
    check_scale(scale)
    if not matrix.data.size:
        return
    if scale == "counts" and not _whole_numbers(matrix.data):
        raise ValueError(
            f"scale='counts' was stated, but {where} holds fractions. Give the layer with raw counts (layer=), or say "
            "scale='log1p' if these are log(1 + counts per 10,000)."
        )
    if scale == "log1p" and matrix.data.max() > _LOG1P_MAX:
        raise ValueError(
            f"scale='log1p' was stated, but {where} reaches {matrix.data.max():.4g}, more than log1p of counts per "
            "10,000 can. Say scale='counts' if these are raw counts."
        )
    if scale == "log1p" and _whole_numbers(matrix.data):
        raise ValueError(
            f"scale='log1p' was stated, but {where} holds whole numbers only. Say scale='counts' for raw counts."
        )
    if scale == "log1p" and target_sum is not None and matrix.shape[0] >= _FEW_CELLS:
        # cells with one total, and not this one, were normalised to it; with genes left out the totals differ
        total = np.asarray(matrix[:1000].expm1().sum(axis=1), dtype=np.float64).ravel()
        median = float(np.median(total))
        if np.ptp(total) < 1e-3 * median and abs(median / target_sum - 1) > 0.01:
            raise ValueError(
                f"scale='log1p' was stated, but the cells of {where} were normalised to {median:.4g} counts each, not "
                f"to {target_sum:g}: scanpy's normalize_total takes the median where target_sum is left out. Normalise "
                f"anew with `sc.pp.normalize_total(adata, target_sum={target_sum:g})`, or give raw counts with "
                "scale='counts'."
            )


def _whole_numbers(values: np.ndarray) -> bool:
    head = values[:4096]  # fractions show early, and spare a pass over all values
    return np.array_equal(head, np.rint(head)) and np.array_equal(values, np.rint(values))


def log_expression(
    adata: AnnData,
    *,
    genes: Sequence[str] | None = None,
    layer: str | None = None,
    scale: Scale = "counts",
    library_size_key: str | None = None,
    target_sum: float = 1e4,
) -> sparse.csr_matrix:
    """Return log1p of counts per `target_sum` as a new float32 CSR matrix (cells x genes); `adata` is not changed.

    Parameters
    ----------
    adata
        Cells.
    genes
        Columns to return, by name and in this order; all of them by default. The library size is always taken over
        all genes of `adata`, or from `obs[library_size_key]`.
    layer, scale, library_size_key, target_sum
        As in :class:`virtualcell._design.Design`.
    """
    where = matrix_name(layer)
    matrix = raw_matrix(adata, layer)
    check_matches_scale(matrix, scale, where, target_sum=target_sum)
    if scale == "log1p":
        return _new_columns(matrix, adata.var_names, genes)
    size = sums = np.asarray(matrix.sum(axis=1), dtype=np.float64).ravel()
    if library_size_key is not None:
        if library_size_key not in adata.obs:
            raise unknown_name("library_size_key", library_size_key, adata.obs.columns, "Leave it out for row sums.")
        column = adata.obs[library_size_key]
        if not pd.api.types.is_numeric_dtype(column):
            raise ValueError(f"library_size_key={library_size_key!r} is a column of {column.dtype} and not of numbers.")
        size = column.to_numpy(dtype=np.float64)
    empty = adata.obs_names[~(np.isfinite(size) & (size > 0))]
    if len(empty):
        which = "no counts" if library_size_key is None else f"no positive number in obs[{library_size_key!r}]"
        raise ValueError(
            f"{len(empty)} cells have {which}, among them {list(empty[:3])}. Drop them first"
            + (": `sc.pp.filter_cells(adata, min_counts=1)`." if library_size_key is None else ".")
        )
    small = size < 0.999 * sums
    if small.any():
        raise ValueError(
            f"library_size_key={library_size_key!r} is smaller than what {where} adds up to in {small.sum()} cells, "
            f"among them {list(adata.obs_names[small][:3])}: a library holds all counts of its cell. Leave it out for "
            "row sums."
        )
    matrix = _new_columns(matrix, adata.var_names, genes)
    matrix.data *= np.repeat((target_sum / size).astype(np.float32), np.diff(matrix.indptr))
    np.log1p(matrix.data, out=matrix.data)
    return matrix


def _new_columns(matrix: sparse.csr_matrix, names: pd.Index, genes: Sequence[str] | None) -> sparse.csr_matrix:
    """Select columns by gene name into a matrix that shares no memory with `matrix`; copied once, not twice."""
    columns = columns_by_name(matrix, names, genes)
    return columns.copy() if columns is matrix else columns


def columns_by_name(matrix: sparse.csr_matrix, names: pd.Index, genes: Sequence[str] | None) -> sparse.csr_matrix:
    """Select columns by gene name, in the order of `genes`; a missing or doubled name is an error."""
    if genes is None:
        return matrix
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
    return matrix if len(where) == len(index) and (where == np.arange(len(index))).all() else matrix[:, where]
