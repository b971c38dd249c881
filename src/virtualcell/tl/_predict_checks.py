"""What is asked of `predict_perturbation`, and whether data and model can answer it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from numbers import Integral
from types import MappingProxyType

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData

from virtualcell import _keys
from virtualcell._errors import UnknownNameError, unknown_name
from virtualcell.data._design import Design
from virtualcell.data._labels import expression_modality, is_several, obs_column, text
from virtualcell.models._base import PerturbationModel
from virtualcell.models._start import Start

logger = logging.getLogger(__name__)

MOST_UNASKED = 1_000_000  # cells that are predicted where no perturbation was named


def check_numbers(context: object, n_cells: int | None, n_samples: int | None) -> None:
    """Raise for numbers and labels of the wrong kind."""
    if is_several(context):
        raise TypeError(f"context={context!r} must be one label; leave it out for all contexts.")
    for argument, value in (("n_cells", n_cells), ("n_samples", n_samples)):
        if value is not None and (not isinstance(value, Integral) or isinstance(value, bool)):
            raise TypeError(f"{argument}={value!r} must be a whole number.")
    if n_cells is not None and n_cells < 1:
        raise ValueError(f"n_cells={n_cells!r}: at least one cell is needed.")
    if n_samples is not None and n_samples < 2:
        raise ValueError(f"n_samples={n_samples!r}: at least 2 draws are needed for a standard error.")


def design_of_data(
    model: PerturbationModel, data: AnnData | MuData, stated: Mapping[str, object], *, modality: str
) -> Design:
    """Return the design of the data: that of the model, and what was stated otherwise."""
    adata = expression_modality(data, modality)
    for key in ("context_key", "batch_key"):
        if stated.get(key) is not None and getattr(model.design, key) is None:
            raise ValueError(f"{key}={stated[key]!r} was given, but the model was set up without {key}.")
    rep = model.design.use_rep
    if rep is not None and rep not in adata.obsm and rep not in data.obsm:
        remedy = "Run `vc.tl.embed(adata, model.se)` first." if rep == _keys.X_STATE else "Compute it first."
        raise UnknownNameError(f"the model works on obsm[{rep!r}], which this data does not have. {remedy}")
    layer = model.design.layer
    if stated.get("layer") is None and layer is not None and layer not in adata.layers:
        raise unknown_name(
            "layer",
            layer,
            adata.layers,
            "The model was fitted on the layer of that name: say which layer has the same here, layer=, or where it is "
            f"in X, put it there first, `adata.layers[{layer!r}] = adata.X`.",
        )
    return dataclasses.replace(model.design.restated(**stated), split_key=None, gene_key=None)


def check_columns(data: AnnData | MuData, design: Design, *, modality: str, untreated: bool) -> None:
    """Raise for columns of the design that data of other cells may lack, and say what to do about each."""
    if not isinstance(untreated, bool):
        raise TypeError(f"untreated={untreated!r} must be True, where all cells are control cells, or False.")
    remedies = {
        "perturbation_key": "If all cells are control cells, say untreated=True; otherwise name a column of obs.",
        "context_key": "Name a column of obs, or put the cell type there, `adata.obs[{key!r}] = 'name'`.",
        "batch_key": "Name a column of obs, or put a batch that the model knows there, `adata.obs[{key!r}] = 'name'`.",
        "dose_key": "If all cells are control cells, say untreated=True; otherwise name a column of obs.",
    }
    for argument, remedy in remedies.items():
        key = getattr(design, argument)
        if key is None or (untreated and argument in ("perturbation_key", "dose_key")):
            continue
        try:
            obs_column(data, key, argument=argument, modality=modality)
        except KeyError as error:
            said = str(error).removesuffix("Name a column of obs.")
            raise UnknownNameError(f"{said}{remedy.format(key=key)}") from error


def names_of(
    model: PerturbationModel, perturbation: object, stated: Mapping[str, object] = MappingProxyType({})
) -> dict[str, str]:
    """Return the names to predict, each once, and how they were asked for; `None` asks for all that are known.

    They are written as in the data, of whose design another separator of combinations may be `stated`, or doses.
    """
    if perturbation is None:
        return {name: name for name in model.known_names if name != model.control}
    asked = list(perturbation) if is_several(perturbation) else [perturbation]
    if not asked:
        raise ValueError("perturbation=[] names nothing to predict.")
    if isinstance(perturbation, Mapping) or any(label is None or is_several(label) for label in asked):
        raise TypeError(f"perturbation={perturbation!r} must be a name, or a list of names.")
    names: dict[str, str] = {}
    known = set(model.names)
    of_labels = {k: v for k, v in stated.items() if k in ("combination_separator", "dose_key")}
    design = model.design.restated(**of_labels)
    for label in map(text, asked):
        names.setdefault(label if label in known else design.name_of(label), label)
    return names


def check_not_too_many(n_names: int, n_cells: int) -> None:
    """Raise where all perturbations were asked for, which nobody named, and so many cells would fill the memory."""
    if n_names * n_cells > MOST_UNASKED:
        raise ValueError(
            f"perturbation=None asks for {n_names:,} perturbations of {n_cells:,} cells each. Predict means, "
            'emit="mean", or fewer cells, n_cells=, or name the perturbations.'
        )


def warn_of_fewer_genes(design: Design, n_genes: int) -> None:
    """Warn where library sizes are summed over fewer genes than at fitting."""
    fewer = design.n_genes is not None and n_genes < 0.9 * design.n_genes
    if fewer and design.scale == "counts" and design.library_size_key is None:
        logger.warning(
            "The data has %d genes, the training data had %d: library sizes, summed over fewer genes, come out too "
            "small and expression too large. Keep all genes, or name the true totals with library_size_key=.",
            *(n_genes, design.n_genes),
        )


def shared_genes(
    model: PerturbationModel, design: Design, here: pd.Index, min_coverage: float
) -> tuple[list[str], np.ndarray]:
    """Return the model's genes that the data has, and their places among the model's.

    A model of embeddings needs none of them as input, so that any number may lack.
    """
    genes = common_genes(here, model.genes, min_coverage if design.use_rep is None else None)
    warn_of_fewer_genes(design, len(here))
    return genes, pd.Index(model.genes).get_indexer(genes)


def common_genes(here: pd.Index, wanted: Sequence[str], min_coverage: float | None) -> list[str]:
    """Return the model's genes that the data has, and raise where these are too few."""
    if min_coverage is not None and not 0 < min_coverage <= 1:
        raise ValueError(f"min_gene_coverage={min_coverage!r} must be above 0 and at most 1.")
    genes = [g for g in wanted if g in here]
    share = len(genes) / len(wanted)
    logger.info("%d of the model's %d genes are in the data.", len(genes), len(wanted))
    if not genes:
        raise UnknownNameError(
            f"none of the model's {len(wanted)} genes ({', '.join(wanted[:3])}, ...) is among var_names "
            f"({', '.join(here[:3])}, ...): they are matched by name. Put names of the same kind there, "
            "`adata.var_names = adata.var[column]`."
        )
    if min_coverage is not None and share < min_coverage:
        missing = next(g for g in wanted if g not in here)
        raise unknown_name(
            "genes",
            missing,
            here,
            f"{len(wanted) - len(genes)} of {len(wanted)} genes are missing; they are matched by name. Coverage is "
            f"{share:.1%}, below min_gene_coverage={min_coverage}: lower it to fill missing genes with 0.",
        )
    if share < 1:
        how = "left out of the result" if min_coverage is None else "filled with 0"
        logger.warning("%d of the model's genes are %s.", len(wanted) - len(genes), how)
    return genes


def tell_of_changed_cells(model: PerturbationModel, starting: Sequence[Start], genes: Sequence[str]) -> None:
    """Say where control cells are called like those that a model was fitted on, and have other values."""
    if model.fitted_on is None:
        return
    compared = [model.fitted_on.changed(start.context, start.names, start.cells, genes) for start in starting]
    changed, n = (sum(counts) for counts in zip(*compared, strict=True)) if compared else (0, 0)
    if changed:
        logger.info(
            "%d of %d control cells that were compared have other values than those of the same name had when %s was "
            "fitted: from another layer or matrix, with other genes in the library sizes, or they are other cells.",
            *(changed, n, type(model).__name__),
        )
