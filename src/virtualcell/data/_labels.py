"""Labels of cells as they stand in `obs`, and what a label of a perturbation is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd
from anndata import AnnData
from mudata import MuData

from virtualcell._errors import unknown_name


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
        for name in (key, f"{modality}:{key}"):
            if name in data.obs:
                return data.obs[name].reindex(adata.obs_names)
    valid = [*adata.obs.columns, *(data.obs.columns if isinstance(data, MuData) else ())]
    raise unknown_name(argument, key, valid, "Name a column of obs.")


def read_labels(data: AnnData | MuData, key: str, *, argument: str, modality: str = "rna") -> pd.Series:
    """Return a column of obs as strings; a missing label is an error, because a cell without one belongs nowhere."""
    column = obs_column(data, key, argument=argument, modality=modality)
    if column.isna().any():
        raise ValueError(
            f"{argument}={key!r}: {int(column.isna().sum())} cells have no label there. Give them one, or drop them "
            f"with adata[adata.obs[{key!r}].notna()].copy()."
        )
    return column.astype(str)


def parts(label: str, control: str | None = None, known: Iterable[str] = ()) -> list[str]:
    """Split a combination "A+B" into ["A", "B"]; a label that is `known` as it stands is one part, the control none."""
    if label == control:
        return []
    if label in known:
        return [label]
    return [p for p in label.split("+") if p != control]


def known_parts(label: str, control: str, known: Sequence[str]) -> list[str]:
    """Names that add up to a label: itself where it is `known`, the same combination written otherwise, its parts."""
    if label not in known:
        written = {tuple(sorted(parts(p, control))): p for p in known}  # B+A is A+B
        label = written.get(tuple(sorted(parts(label, control))), label)
    return parts(label, control, known)
