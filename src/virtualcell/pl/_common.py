"""The cells that a plot is about: selected by perturbation and context, on the scale of log1p CP10k."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from anndata import AnnData
from mudata import MuData

from virtualcell import _keys
from virtualcell._errors import unknown_name
from virtualcell.data._design import Design, check_sides, noted_design, only_stated, require_columns
from virtualcell.data._labels import text
from virtualcell.data._screen import Screen


def observed_design(
    data: AnnData | MuData,
    modality: str,
    stated: Mapping[str, Any],
    *,
    predicted: AnnData | None = None,
    noted: bool = True,
) -> Design:
    """Return the design that a picture needs: what the caller stated, and the rest as earlier calls `noted` it.

    Where none has noted the columns of the data, those of a prediction that is shown beside it are taken.
    """
    if predicted is not None:
        check_sides(predicted, data)
    if predicted is not None and "perturbation_key" not in noted_design(data, modality):
        labels = ("perturbation_key", "control", "context_key", "combination_separator", "dose_key")
        of_predicted = {k: v for k, v in noted_design(predicted).items() if k in labels}
        stated = of_predicted | only_stated(stated)
    require_columns(data, modality, **{k: v for k, v in stated.items() if k.endswith("_key")})
    return (Design.from_data(data, modality=modality, **stated) if noted else Design(**stated)).plain()


def the_only(perturbation: str | None, known: Sequence[str], *, argument: str) -> str:
    """Return the perturbation that was named, or the only one there is."""
    if perturbation is not None:
        return perturbation
    if len(known) != 1:
        raise ValueError(
            f"{argument} holds {len(known)} perturbations ({', '.join(known[:8])}{', ...' if len(known) > 8 else ''}). "
            "Name one: perturbation=."
        )
    return known[0]


def names_of(design: Design, perturbation: object, context: object) -> tuple[str | None, str | None]:
    """Return the names of what is to be drawn, however it is written; `None` where it was left out."""
    return None if perturbation is None else design.name_of(perturbation), None if context is None else text(context)


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


def in_context(screen: Screen, context: str) -> np.ndarray:
    """Return which perturbed cells are of a context, of which there must be some."""
    if screen.design.context_key is None:
        raise ValueError(f"context={context!r} was given, but the design has no contexts. State context_key as well.")
    here = np.asarray(screen.context == context) & ~screen.is_control
    if not here.any():
        raise unknown_name("context", context, sorted(set(screen.context[~screen.is_control])), "Predict it first.")
    return here


def with_controls(screen: Screen, perturbations: Sequence[str], contexts: Sequence[str]) -> Screen:
    """Return the cells of perturbations and the control cells in these contexts, each of which must have some."""
    screen.require_control()
    keep = screen.is_control | screen.perturbation.isin(list(perturbations))
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
    if not isinstance(data, AnnData):
        return False
    return _keys.CONTROL_LAYER in data.layers or _keys.CONTROL_BARCODE in data.obs  # cells on disk lack the layer


def title(perturbations: str | Sequence[str], contexts: Sequence[str]) -> str:
    """Name what is shown: perturbations, and the contexts where the design has some."""
    names = [perturbations] if isinstance(perturbations, str) else list(perturbations)
    where = [context for context in contexts if context != _keys.ALL]
    what = _listed(names, "perturbations")
    return f"{what} in {_listed(where, 'contexts')}" if where else what


def _listed(names: Sequence[str], kind: str) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} {kind}"
