"""Expression with the library sizes that a column of `obs` holds."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData

from virtualcell.data._design import Scale
from virtualcell.data._expression import Expression
from virtualcell.data._labels import expression_modality, obs_column


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
        if not pd.api.types.is_numeric_dtype(column):
            raise ValueError(f"library_size_key={library_size_key!r} is a column of {column.dtype} and not of numbers.")
        sizes = column.to_numpy(dtype=np.float64, na_value=np.nan)
    adata = expression_modality(data, modality)
    return Expression(adata, scale=scale, library_size=sizes, library_size_key=library_size_key, side=side, **how)
