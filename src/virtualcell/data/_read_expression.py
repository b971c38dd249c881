"""Expression with the library sizes that a column of `obs` holds, and embeddings of cells."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData, abc
from mudata import MuData
from scipy import sparse

from virtualcell._errors import unknown_name
from virtualcell._keys import X_STATE
from virtualcell._numbers import as_numbers
from virtualcell.data._design import Scale
from virtualcell.data._expression import Expression
from virtualcell.data._labels import column_of, expression_modality, obs_column, text, without_version


def read_expression(
    data: AnnData | MuData,
    *,
    modality: str = "rna",
    scale: Scale = "counts",
    library_size_key: str | None = None,
    side: str = "",
    **how: object,
) -> Expression:
    """Return the expression of all cells, with the library sizes that a column of `obs` holds.

    Parameters
    ----------
    data, modality
        Cells x genes, or a MuData with them in `modality`.
    scale, library_size_key
        As in :class:`virtualcell.data._design.Design`.
    side, how
        As in :class:`Expression`: `layer`, `unit`, `genes` and others.
    """
    sizes = None
    if library_size_key is not None and scale == "counts":
        argument = f"{side}: library_size_key" if side else "library_size_key"
        try:
            column = obs_column(data, library_size_key, argument=argument, modality=modality)
        except KeyError as error:
            raise type(error)(f"{error} Leave it out for row sums.") from error
        if not pd.api.types.is_numeric_dtype(column) or pd.api.types.is_complex_dtype(column):
            raise ValueError(f"library_size_key={library_size_key!r} is a column of {column.dtype} and not of numbers.")
        sizes = column.to_numpy(dtype=np.float64, na_value=np.nan)
    adata = expression_modality(data, modality)
    return Expression(adata, scale=scale, library_size=sizes, library_size_key=library_size_key, side=side, **how)


def read_embedding(data: AnnData | MuData, key: str, *, modality: str = "rna") -> np.ndarray:
    """Return cell embeddings, (n_cells, n_dims), float32, of the modality or else of the MuData; missing ones are NaN.

    Raises
    ------
    KeyError
        Where there are none of that name.
    ValueError
        For what is no table of numbers, one row a cell.
    """
    adata = expression_modality(data, modality)
    if key in adata.obsm:
        values = adata.obsm[key]
    elif isinstance(data, MuData) and key in data.obsm and adata.obs_names.isin(data.obs_names).all():
        values = data.obsm[key]
        rows = data.obs_names.get_indexer(adata.obs_names)
        values = values.iloc[rows] if isinstance(values, pd.DataFrame) else values[rows]
    else:
        remedy = "Run `vc.tl.embed(adata, model)` first." if key == X_STATE else "Compute it first."
        raise unknown_name("use_rep", key, adata.obsm, remedy)
    if hasattr(values, "compute"):  # a dask array, as `read_lazy` has them
        values = values.compute()
    elif isinstance(values, abc.CSRDataset | abc.CSCDataset):
        values = values.to_memory()
    if isinstance(values, pd.DataFrame):
        numbers = values.apply(as_numbers)
        text = [c for c in values if numbers[c].isna().ne(values[c].isna()).any()]
        if text:
            raise ValueError(f"obsm[{key!r}] has columns that hold no numbers, {text[:3]}: leave them out.")
        values = numbers.to_numpy(dtype=np.float32, na_value=np.nan)
    values = values.toarray() if sparse.issparse(values) else np.ma.filled(np.ma.asarray(values), np.nan)
    if values.ndim != 2 or not values.shape[1] or values.dtype.kind not in "fiub":
        raise ValueError(
            f"obsm[{key!r}] is an array of {values.dtype} and shape {values.shape}: cells x dimensions, of real "
            "numbers, are needed."
        )
    return values.astype(np.float32, copy=False)


def read_target_names(adata: AnnData, gene_key: str | None) -> pd.Series:
    """Return the name of each gene that perturbations go by, indexed by `var_names`."""
    if gene_key is None:
        return pd.Series([without_version(str(gene)) for gene in adata.var_names], index=adata.var_names)
    if gene_key not in adata.var:
        raise unknown_name("gene_key", gene_key, adata.var.columns, "Leave it out to match genes by var_names.")
    return column_of(adata, "var", gene_key, "gene_key").map(text).map(without_version).astype(str)
