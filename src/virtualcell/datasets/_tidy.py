"""One form for every data set: the same names of columns, raw counts in X, and a design to pass on."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData
from scipy import sparse

from virtualcell._keys import MISSING

logger = logging.getLogger(__name__)

PERTURBATION, CONTEXT, BATCH, DOSE = "perturbation", "context", "batch", "dose"
_LOOKED_AT = 1_000_000  # values that are looked at to tell counts from other things


def design_of(control: str | list[str], *, library_size_key: str | None = None) -> dict[str, str | list[str]]:
    """Return the arguments of `fit_state` that name the columns of a tidy data set."""
    design = {"perturbation_key": PERTURBATION, "control": control, "context_key": CONTEXT, "batch_key": BATCH}
    return design if library_size_key is None else design | {"library_size_key": library_size_key}


def expression_of(data: AnnData | MuData) -> AnnData:
    """Return the RNA of a MuData with all labels that its cells have."""
    if isinstance(data, AnnData):
        return data
    rna = data["rna"].copy()
    for key in data.obs.columns:
        name = key.removeprefix("rna:")
        if name not in rna.obs:
            rna.obs[name] = data.obs[key].reindex(rna.obs_names)
    return rna


def labels_of(adata: AnnData, name: str, argument: str, key: str | None) -> pd.Series:
    """Return a column of `obs` as text, missing labels as None; raise an error that lists the columns otherwise."""
    if key is None or key not in adata.obs:
        said = "is not known" if key is None else f"should be {key!r}, which the file does not have"
        short = [c for c in adata.obs if adata.obs[c].nunique() < max(2, adata.n_obs // 2)]
        raise ValueError(
            f"{name}: the column for {argument} {said}. obs has {list(adata.obs.columns)}; of these, "
            f"{', '.join(_shown(adata.obs[c]) for c in short[:20])}. Name one: "
            f"vc.datasets.load({name!r}, {argument}=...)."
        )
    labels = adata.obs[key].astype(object)
    is_missing = labels.isna() | labels.map(lambda label: str(label).strip() in MISSING)
    return labels.map(str).where(~is_missing, None)


def _shown(column: pd.Series) -> str:
    values = [str(value) for value in column.value_counts().index]
    more = ", ..." if len(values) > 4 else ""
    return f"{column.name!r} ({', '.join(map(repr, values[:4]))}{more})"


def check_control(labels: pd.Series, name: str, key: str, control: list[str] | None) -> None:
    """Raise, with the labels that are there, unless some cells have a label of the control."""
    if control is not None and labels.isin(control).any():
        return
    said = "is not known" if control is None else f"should be {' or '.join(map(repr, control))}, which no cell has"
    counts = labels.value_counts()
    raise ValueError(
        f"{name}: the label of the control {said}. obs[{key!r}] has {len(counts)} labels; those of most cells are "
        f"{list(counts.index[:20])}. Name one: vc.datasets.load({name!r}, control=...)."
    )


def counts_of(adata: AnnData, name: str, layer: str | None) -> sparse.csr_matrix:
    """Return raw counts (float32 CSR), from `X` or a layer; raise if they are not there."""
    if layer is not None and layer not in adata.layers:
        raise ValueError(
            f"{name}: counts should be in layers[{layer!r}]; the layers are {list(adata.layers)}. Name one, or 'X': "
            f"vc.datasets.load({name!r}, layer=...)."
        )
    matrix = adata.X if layer is None else adata.layers[layer]
    matrix = sparse.csr_matrix(matrix, dtype=np.float32)
    values = matrix.data[:_LOOKED_AT]
    if not np.isfinite(values).all() or (values < 0).any() or (values != np.rint(values)).any():
        where = "X" if layer is None else f"layers[{layer!r}]"
        raise ValueError(
            f"{name}: {where} holds values such as {values[values != np.rint(values)][:3]}, which are no counts; the "
            f"layers are {list(adata.layers)}. Name the one with counts: vc.datasets.load({name!r}, layer=...)."
        )
    return matrix
