"""Results in an AnnData: what calls of this package noted in `uns`, and whether more can be written."""

from __future__ import annotations

from typing import Any

from anndata import AnnData

from virtualcell._keys import UNS
from virtualcell.data._lazy import is_lazy


def ours(adata: AnnData) -> dict[str, Any]:
    """Return what calls of this package noted in `uns`; of lazy data it is read, once where it can be put back."""
    found = adata.uns.get(UNS, {})
    read = _in_memory(found)
    if read is not found and not adata.is_view:
        adata.uns[UNS] = read
    return read


def _in_memory(value: Any) -> Any:
    """Read what :func:`anndata.experimental.read_lazy` left where it was; return the same object where it did not."""
    if isinstance(value, dict):
        read = {k: _in_memory(v) for k, v in value.items()}
        return value if all(read[k] is v for k, v in value.items()) else read
    if hasattr(value, "compute"):  # a dask array
        return value.compute()
    return value.to_memory() if hasattr(value, "to_memory") else value


def takes_results(adata: AnnData) -> bool:
    """Tell whether results can be written: a view of a file would be read as a whole, or could not be."""
    if not adata.is_view or not is_lazy(adata):
        return True
    matrices = [m for m in (adata._adata_ref.X, *adata._adata_ref.layers.values()) if m is not None]
    return not adata.isbacked and all(hasattr(m, "compute") or hasattr(m, "tocsr") for m in matrices)


def require_results(adata: AnnData) -> None:
    """Raise for data that results cannot be written to."""
    if not takes_results(adata):
        raise ValueError(
            "adata is a view of data that is not in memory, and results cannot be written to such a view. Give the "
            "whole data, or copy the view: `adata.to_memory()`, or into a file, `adata.copy(filename)`."
        )
