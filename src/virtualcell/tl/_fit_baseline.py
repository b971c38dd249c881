"""Fit a baseline on a screen in one call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Literal

import pandas as pd
from anndata import AnnData
from mudata import MuData

from virtualcell import models
from virtualcell._errors import unknown_name
from virtualcell._settings import seed_of
from virtualcell._tasks import Workers, check_client
from virtualcell._threads import own_threads
from virtualcell.data._design import Design, Scale, check_library_sizes, note_design
from virtualcell.data._design_arguments import describes_design
from virtualcell.data._labels import expression_modality
from virtualcell.data._screen import Screen
from virtualcell.models import Transfer
from virtualcell.models._baselines import Baseline
from virtualcell.models._feature_baselines import FeatureBaseline
from virtualcell.tl._prepare import choose_genes, prepared, warn_of_panel

Name = Literal[
    "NoChange", "PerturbationMean", "ContextMean", "Additive", "NearestContext", "Ridge", "NearestPerturbations"
]


@describes_design
@own_threads()
def fit_baseline(
    adata: AnnData | MuData,
    model: Name = "Additive",
    *,
    perturbation_key: str,
    control: str | Sequence[str],
    context_key: str | None = None,
    batch_key: str | None = None,
    combination_separator: str | None = "+",
    dose_key: str | None = None,
    split_key: str | None = None,
    layer: str | None = None,
    scale: Scale = "counts",
    library_size_key: str | None = None,
    gene_key: str | None = None,
    modality: str = "rna",
    n_top_genes: int | None = 2000,
    perturbation_features: pd.DataFrame | None = None,
    min_cells: int = 10,
    client: object | None = None,
    seed: int | None = None,
) -> Baseline:
    """Fit a baseline on the cells and genes that :func:`virtualcell.tl.fit_state` would take, in seconds.

    The result predicts cells: `vc.tl.predict_perturbation(adata, "STAT1", model=baseline)`. A model that
    :func:`virtualcell.tl.fit_state` left in `uns["virtualcell"]` stays there; only the design is noted.

    Parameters
    ----------
    adata
        Cells x genes of a screen, or a MuData with it in `modality`.
    model
        Name of the baseline in :mod:`virtualcell.models`. "Ridge" and "NearestPerturbations" predict from features.
    perturbation_key, control, context_key, batch_key, combination_separator, dose_key
        The design, as :func:`virtualcell.tl.fit_state` takes it.
    split_key
        Column with `train`, `val` and `test`. Test cells take no part, and validation cells are learned from like
        training cells.
    layer, scale, library_size_key, gene_key, modality
        The expression, as :func:`virtualcell.tl.fit_state` takes it.
    n_top_genes
        Number of highly variable genes to model; `None` for all. Targets always come along.
    perturbation_features
        One row of features per perturbation, for "Ridge" and "NearestPerturbations".
    min_cells
        Smallest number of training cells of a perturbation to be learned.
    client
        A `dask.distributed.Client` whose workers go through cells that are not in memory, as in
        :func:`virtualcell.tl.fit_state`.
    seed
        Seed of the tenth of each group that :func:`virtualcell.tl.fit_state` keeps for validation where there is no
        `split_key`, and which therefore has no part in the choice of genes; by default `vc.settings.seed`.

    Returns
    -------
    The fitted baseline, which :func:`virtualcell.tl.predict_perturbation` takes as `model`.

    Raises
    ------
    KeyError
        For an unknown baseline, column, label, layer or modality.
    ValueError
        For data that does not fit what was stated, or features that are missing or have no use.

    Examples
    --------
    >>> additive = vc.tl.fit_baseline(adata, "Additive", **design)
    >>> predicted = vc.tl.predict_perturbation(adata, name, model=additive)
    >>> predicted.uns["virtualcell"]["predicted_by"]
    'Additive'
    """
    kind = _kind(model, perturbation_features)
    check_client(client)
    check_library_sizes(scale, library_size_key)
    design = Design(
        perturbation_key=perturbation_key,
        control=control,
        context_key=context_key,
        batch_key=batch_key,
        combination_separator=combination_separator,
        dose_key=dose_key,
        split_key=split_key,
        gene_key=gene_key,
        layer=layer,
        scale=scale,
        library_size_key=library_size_key,
        n_genes=expression_modality(adata, modality).n_vars,
    )
    screen = Screen.from_anndata(adata, design, modality=modality).by(Workers(client))
    screen = prepared(screen, min_cells=min_cells, has_features=perturbation_features is not None, seed=seed_of(seed))
    warn_of_panel(screen, adata, modality=modality)
    screen = screen.select(choose_genes(screen, n_top_genes, targets=screen.targets()))
    baseline = kind(screen) if perturbation_features is None else kind(screen, perturbation_features)
    baseline.train()
    baseline.forget_data()
    note_design(adata, design.to_uns(), modality, whole=True)
    return baseline


def _kind(name: str, features: pd.DataFrame | None) -> Callable[..., Baseline]:
    """Return the class of a baseline, after checking that features are there where it needs them, and only there."""
    kinds = {n: getattr(models, n) for n in models.__all__}
    kinds = {n: k for n, k in kinds.items() if inspect.isclass(k) and issubclass(k, Baseline) and k is not Transfer}
    if name not in kinds:
        remedy = "Fit an ST with `vc.tl.fit_state`, and effects of other experiments with `vc.models.Transfer`."
        raise unknown_name("model", name, kinds, remedy)
    needs = issubclass(kinds[name], FeatureBaseline)
    if needs and features is None:
        raise ValueError(f"model={name!r} predicts from features of perturbations: give perturbation_features=.")
    if not needs and features is not None:
        raise ValueError(f"perturbation_features have no use with model={name!r}: leave them out.")
    return kinds[name]
