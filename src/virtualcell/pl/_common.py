"""The cells that a plot is about: selected by perturbation and context, on the scale of log1p CP10k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData
from scipy import sparse

from virtualcell import _keys
from virtualcell._design import Design, expression_modality, labels
from virtualcell._errors import unknown_name
from virtualcell.data._matrix import columns_by_name, log_expression, raw_matrix

EVERYWHERE = "all cells"  # the one context of a design without contexts


@dataclass(frozen=True)
class Cells:
    """Expression (cells x genes, log1p CP10k), and the perturbation and the context of each cell."""

    expression: sparse.csr_matrix | np.ndarray
    perturbation: np.ndarray
    context: np.ndarray

    def mean(self, perturbation: str, context: str | None = None) -> np.ndarray:
        """Mean expression, (genes,), of a perturbation's cells in one context or in all."""
        rows = self.perturbation == perturbation
        if context is not None:
            rows &= self.context == context
        return mean_over_cells(self.expression[rows])

    def contexts_of(self, perturbation: str) -> list[str]:
        """Contexts in which there are cells of this perturbation, sorted."""
        return sorted(set(self.context[self.perturbation == perturbation]))


def mean_over_cells(matrix: sparse.csr_matrix | np.ndarray) -> np.ndarray:
    """Mean of each column in double precision, of a dense or a sparse matrix."""
    return np.asarray(matrix.mean(axis=0, dtype=np.float64)).ravel()


def cell_labels(data: AnnData | MuData, design: Design, modality: str = "rna") -> tuple[pd.Series, pd.Series]:
    """Return the perturbation and the context of every cell."""
    perturbation = labels(data, design.perturbation_key, argument="perturbation_key", modality=modality)
    if design.context_key is None:
        return perturbation, pd.Series(EVERYWHERE, index=perturbation.index)
    return perturbation, labels(data, design.context_key, argument="context_key", modality=modality)


def observed_cells(
    data: AnnData | MuData,
    design: Design,
    *,
    perturbation: str,
    contexts: Sequence[str] | None = None,
    genes: Sequence[str] | None = None,
    modality: str = "rna",
    normalise: bool = True,
) -> Cells:
    """Return the measured control and `perturbation` cells of the contexts, as log1p CP10k or else as they are."""
    names, where = cell_labels(data, design, modality)
    if not (names == design.control).any():
        raise unknown_name("control", design.control, sorted(set(names)), "Name the label of the control cells.")
    keep = names.isin([design.control, perturbation])
    if contexts is not None:
        keep &= where.isin(contexts)
    adata = expression_modality(data, modality)[keep.to_numpy()]
    if normalise:
        expression = log_expression(
            adata, genes=genes, layer=design.layer, scale=design.scale,
            library_size_key=design.library_size_key, target_sum=design.target_sum,
        )  # fmt: skip
    else:
        expression = columns_by_name(raw_matrix(adata, design.layer), adata.var_names, genes)
    return Cells(expression, names[keep].to_numpy(), where[keep].to_numpy())


def predicted_cells(predicted: AnnData, design: Design, *, perturbation: str, context: str | None = None) -> Cells:
    """Return the predicted cells of a perturbation, in one context or in all that were predicted."""
    names, where = cell_labels(predicted, design)
    remedy = "Predict it first: `vc.tl.predict_perturbation`."
    keep = chosen(names, where, design, perturbation=perturbation, context=context, remedy=remedy)
    return Cells(np.asarray(predicted.X[keep]), names.to_numpy()[keep], where.to_numpy()[keep])


def chosen(
    names: pd.Series, where: pd.Series, design: Design, *, perturbation: str, context: str | None, remedy: str
) -> np.ndarray:
    """Return which cells are of this perturbation (and context), of which there must be some."""
    keep = (names == perturbation).to_numpy()
    if perturbation == design.control or not keep.any():
        raise unknown_name("perturbation", perturbation, sorted(set(names) - {design.control}), remedy)
    if context is None:
        return keep
    if design.context_key is None:
        raise ValueError(f"context={context!r} was given, but the design has no contexts. State context_key as well.")
    here = keep & (where == context).to_numpy()
    if not here.any():
        raise unknown_name("context", context, sorted(set(where[keep])), f"{perturbation!r} has cells only there.")
    return here


def require_controls(cells: Cells, design: Design, contexts: Sequence[str]) -> None:
    """Raise unless every context has control cells to measure an effect against."""
    known = cells.contexts_of(design.control)
    for context in contexts:
        if context not in known:
            raise unknown_name(
                "context",
                context,
                known,
                f"An effect is measured against the control cells ({design.control!r}) of the same context.",
            )


def is_prediction(data: AnnData | MuData) -> bool:
    """Tell what `predict_perturbation` returned from measured data."""
    return isinstance(data, AnnData) and _keys.CONTROL_LAYER in data.layers and _keys.CONTROL_BARCODE in data.obs


def title(perturbation: str, context: str | None) -> str:
    """Name what is shown."""
    return perturbation if context is None else f"{perturbation}, {context}"
