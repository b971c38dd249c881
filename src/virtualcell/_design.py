"""The design of an experiment: which columns mean what, and on which scale the matrix is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Literal

import pandas as pd
from anndata import AnnData
from mudata import MuData

from virtualcell import _keys
from virtualcell._errors import unknown_name

Scale = Literal["counts", "log1p"]


@dataclass(frozen=True)
class Design:
    """Columns of `obs` and scale of the expression matrix, as the caller stated them.

    `scale="counts"` means raw counts, which are divided by the library size, multiplied by `target_sum` and put
    through log(1 + x); `scale="log1p"` means that this was done before. The library size is `obs[library_size_key]`,
    or the row sum of the matrix over all its genes where no key is given; `n_genes` is how many these were at fitting.
    """

    perturbation_key: str
    control: str
    context_key: str | None = None
    batch_key: str | None = None
    layer: str | None = None
    scale: Scale = "counts"
    library_size_key: str | None = None
    target_sum: float = 1e4
    n_genes: int | None = None

    def __post_init__(self) -> None:
        check_scale(self.scale)

    def to_uns(self) -> dict:
        """Entries for `uns` (h5ad holds no None: such entries are left out)."""
        return {k: v for k, v in asdict(self).items() if v is not None}

    @classmethod
    def from_data(cls, data: AnnData | MuData, *, modality: str = "rna", **stated: object) -> Design:
        """Take what the caller stated, and the rest from what `fit_state` left in `uns["virtualcell"]`."""
        stated = {k: v for k, v in stated.items() if v is not None}
        left = left_design(data, modality)
        found = {f.name: left[f.name] for f in fields(cls) if f.name in left} | stated
        missing = [k for k in ("perturbation_key", "control") if k not in found]
        if missing:
            raise ValueError(
                f"{' and '.join(missing)} must be given: this data holds no design of `vc.tl.fit_state` "
                f"in uns[{_keys.UNS!r}] to take it from."
            )
        return cls(**found)


def left_design(data: AnnData | MuData, modality: str = "rna") -> dict:
    """Return what `fit_state` left in `uns["virtualcell"]`, empty where it did not run."""
    return expression_modality(data, modality).uns.get(_keys.UNS, {}).get("design", {})


def check_scale(scale: str, argument: str = "scale") -> None:
    """Raise unless `scale` is one of the two that are known."""
    if scale not in ("counts", "log1p"):
        raise ValueError(
            f"{argument}={scale!r} is unknown. Say 'counts' for raw counts or 'log1p' for log(1 + counts per 10,000); "
            "it is never guessed."
        )


def check_library_sizes(scale: str, library_size_key: str | None) -> None:
    """Raise for library sizes where nothing is divided by them."""
    if scale == "log1p" and library_size_key is not None:
        raise ValueError(
            f"library_size_key={library_size_key!r} has no use with scale='log1p', where cells were divided by their "
            "totals before. Leave it out, or give raw counts with scale='counts'."
        )


def expression_modality(data: AnnData | MuData, modality: str = "rna") -> AnnData:
    """Return the AnnData with the expression: `data` itself, or its modality where it is a MuData."""
    if isinstance(data, MuData):
        if modality not in data.mod:
            raise unknown_name("modality", modality, data.mod, "Name the modality that holds gene expression.")
        return data.mod[modality]
    if not isinstance(data, AnnData):
        raise TypeError(f"Expected an AnnData or a MuData, got {type(data).__name__}.")
    return data


def obs_column(data: AnnData | MuData, key: str, *, argument: str, modality: str = "rna") -> pd.Series:
    """Return a column of the modality's obs, or else of the MuData's obs, aligned to the modality's cells."""
    adata = expression_modality(data, modality)
    if key in adata.obs:
        return adata.obs[key]
    if isinstance(data, MuData):
        if key in data.obs:
            return data.obs[key].reindex(adata.obs_names)
        prefixed = f"{modality}:{key}"
        if prefixed in data.obs:
            return data.obs[prefixed].reindex(adata.obs_names)
    valid = [*adata.obs.columns, *(data.obs.columns if isinstance(data, MuData) else ())]
    raise unknown_name(argument, key, valid, "Name a column of obs.")


def labels(data: AnnData | MuData, key: str, *, argument: str, modality: str = "rna") -> pd.Series:
    """Return a column of obs as strings; a missing label is an error, because a cell without one belongs nowhere."""
    column = obs_column(data, key, argument=argument, modality=modality)
    if column.isna().any():
        raise ValueError(
            f"{argument}={key!r}: {int(column.isna().sum())} cells have no label there. Give them one, or drop them "
            f"with adata[adata.obs[{key!r}].notna()].copy()."
        )
    return column.astype(str)
