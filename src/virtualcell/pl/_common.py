"""The cells that a plot is about: selected by perturbation and context, on the scale of log1p CP10k."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from anndata import AnnData
from mudata import MuData

from virtualcell import _keys
from virtualcell._errors import unknown_name
from virtualcell.data._design import Design, note_columns
from virtualcell.data._screen import Screen

_COLUMNS = ("perturbation_key", "control", "context_key", "batch_key", "library_size_key")


def observed_design(data: AnnData | MuData, modality: str, **stated: object) -> Design:
    """Return the design that a picture needs: what the caller stated, and the rest as `fit_state` noted it."""
    note_columns(data, modality, **{k: v for k, v in stated.items() if k in _COLUMNS})
    return Design.from_data(data, modality=modality, **stated).plain()


def predicted_screen(predicted: AnnData, design: Design, *, layer: str | None = None) -> Screen:
    """Return predicted cells, or in a layer the control cells that they started from."""
    design = design.of_predicted().restated(layer=layer)
    return Screen.from_anndata(predicted, design, side="predicted", measured=False)


def chosen(screen: Screen, *, perturbation: str, context: str | None, remedy: str) -> np.ndarray:
    """Return which cells are of this perturbation (and context), of which there must be some."""
    keep = screen.perturbation == perturbation
    if perturbation == screen.design.control or not keep.any():
        raise unknown_name("perturbation", perturbation, screen.perturbation_names, remedy)
    if context is None:
        return keep
    if screen.design.context_key is None:
        raise ValueError(f"context={context!r} was given, but the design has no contexts. State context_key as well.")
    here = keep & (screen.context == context)
    if not here.any():
        raise unknown_name(
            "context", context, contexts_of(screen, perturbation), f"{perturbation!r} has cells only there."
        )
    return here


def with_controls(screen: Screen, perturbation: str, contexts: Sequence[str]) -> Screen:
    """Return the cells of a perturbation and the control cells in these contexts, each of which must have some."""
    screen.require_control()
    keep = screen.is_control | (screen.perturbation == perturbation)
    screen = screen.take(keep & screen.context.isin(list(contexts)))
    known = contexts_of(screen, screen.design.control)
    for context in contexts:
        if context not in known:
            raise unknown_name(
                "context",
                context,
                known,
                f"An effect is measured against the control cells ({screen.design.control!r}) of the same context.",
            )
    return screen


def contexts_of(screen: Screen, perturbation: str) -> list[str]:
    """Contexts in which there are cells of this perturbation, sorted."""
    return sorted(set(screen.context[screen.perturbation == perturbation]))


def mean_profile(screen: Screen, perturbation: str, context: str) -> np.ndarray:
    """Mean expression of a perturbation's cells in a context, (n_genes,), in double precision."""
    rows = np.flatnonzero((screen.perturbation == perturbation) & (screen.context == context))
    return np.asarray(screen.expression.rows(rows).mean(axis=0, dtype=np.float64)).ravel()


def is_prediction(data: AnnData | MuData) -> bool:
    """Tell what `predict_perturbation` returned from measured data."""
    return isinstance(data, AnnData) and _keys.CONTROL_LAYER in data.layers and _keys.CONTROL_BARCODE in data.obs


def title(perturbation: str, context: str | None) -> str:
    """Name what is shown."""
    return perturbation if context is None else f"{perturbation}, {context}"
