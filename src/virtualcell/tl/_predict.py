"""The call people make, which answers what a perturbation would do to these cells."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Literal

import anndata as ad
import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.utils import make_index_unique
from mudata import MuData
from scipy import sparse

from virtualcell import _keys
from virtualcell._errors import UnknownNameError, unknown_name
from virtualcell.data._design import Design, Scale
from virtualcell.data._labels import expression_modality
from virtualcell.data._screen import Screen
from virtualcell.io._save import unpack
from virtualcell.models import ST
from virtualcell.models._base import PerturbationModel
from virtualcell.models._common import model_of, put_on
from virtualcell.models._start import Start, starts

logger = logging.getLogger(__name__)


def predict_perturbation(
    adata: AnnData | MuData,
    perturbation: str | Sequence[str] | None = None,
    *,
    drug: str | None = None,
    dose: float | None = None,
    context: str | None = None,
    model: PerturbationModel | None = None,
    n_cells: int | None = None,
    n_samples: int | None = None,
    fallback: Literal["best"] | None = None,
    layer: str | None = None,
    scale: Scale | None = None,
    library_size_key: str | None = None,
    perturbation_key: str | None = None,
    control: str | None = None,
    context_key: str | None = None,
    batch_key: str | None = None,
    min_gene_coverage: float = 1.0,
    seed: int = 0,
    modality: str = "rna",
) -> AnnData:
    """Predict the cells that a perturbation would make of the control cells.

    Parameters
    ----------
    adata
        Data that :func:`virtualcell.tl.fit_state` was run on, or, with `model`, any data with control cells, the
        model's genes and the same columns of `obs`. It is not changed.
    perturbation
        Name of a perturbation, a combination `A+B`, or several names.
    drug, dose
        In place of the name, for models whose names hold both, such as "[('Dabrafenib', 0.5, 'uM')]" of Tahoe-100M; see
        :meth:`virtualcell.models.ST.perturbation_name`.
    context
        Take the control cells of this context, which may be one where the perturbation was never measured; all contexts
        where it is `None`.
    model
        A fitted :class:`virtualcell.models.ST` or one of the baselines; by default the ST in `uns["virtualcell"]`.
    n_cells
        Number of predicted cells per perturbation and context; by default one for every control cell.
    n_samples
        Estimate standard errors from so many draws of the control cells (20 are plenty; each costs as much as the
        prediction), see :meth:`virtualcell.models.ST.uncertainty`.
    fallback
        "best" uses the baseline that was better than ST on the validation cells of `fit_state`, where one was;
        `uns["virtualcell"]["predicted_by"]` of the result tells which model it was.
    layer, scale, library_size_key
        Where and how expression is stored in `adata`; as at fitting where left out. Models of
        :meth:`virtualcell.models.ST.from_arc` expect log(1 + counts per 10,000) unless `scale="counts"` is stated.
    perturbation_key, control, context_key, batch_key
        Columns of `obs` and label of the control cells, where they have other names than in the model's own data.
    min_gene_coverage
        Share of the model's genes that `adata` must have, by name. Below 1.0 the missing ones enter as 0, which the
        model never saw for a gene that is expressed, and are left out of the result.
    seed
        Seed of the draw of control cells. The order of cells and genes in `adata` does not matter.
    modality
        Expression modality of a MuData.

    Returns
    -------
    AnnData of predicted cells x the model's genes, log(1 + counts per 10,000): `obs` has the perturbation and the
    context under the names of their columns in `adata`, and `control_barcode`, the control cell each one started from,
    whose expression is `layers["control"]`. Ready for `scanpy.tl.rank_genes_groups` and, on that scale, for
    `anndata.concat`. With `n_samples`, `layers["standard_error"]` has the standard error of the predicted mean of each
    gene (the same for all cells of a perturbation and context), and `obs["expected_error"]` the mean absolute error of
    the mean that follows from them.

    Raises
    ------
    KeyError
        For an unknown perturbation, context, gene or column; the message names the closest ones and the remedy.
    ValueError
        If there is no fitted model, or the matrix is not on the stated scale.
    """
    _check_numbers(context, n_cells, n_samples, seed)
    stated = {"layer": layer, "scale": scale, "library_size_key": library_size_key, "context_key": context_key}
    stated |= {"perturbation_key": perturbation_key, "control": control, "batch_key": batch_key}
    expression = expression_modality(adata, modality)
    model = _checked(_stored_model(expression) if model is None else model)
    names = _names(_of_drug(model, perturbation, drug, dose))
    for name in names:
        model.check_perturbation(name)
    if fallback is not None:
        model = _better_one(model, fallback, names)
    design = _design(model, expression, stated)
    controls = _controls(Screen.from_anndata(adata, design, modality=modality), context)
    coverage = min_gene_coverage if design.use_rep is None else None  # where genes are no input, they may lack
    genes = _common_genes(expression.var_names, model.genes, coverage)
    _warn_of_fewer_genes(design, expression.n_vars)
    columns = pd.Index(model.genes).get_indexer(genes)
    predicted: dict[str, list[AnnData]] = {name: [] for name in names}
    for start, log in _starts(controls.select(genes), model):
        for name in names:
            rows, cells = model.predict_from(start, name, n_cells=n_cells, seed=seed)
            one = _cells(start, controls.design, rows, cells[:, columns], name)
            one.layers[_keys.CONTROL_LAYER] = log[rows].toarray()
            if n_samples is not None:
                _add_errors(one, model.error_from(start, name, n_samples=n_samples, seed=seed)[columns])
            predicted[name].append(one)
    out = _joined(predicted, genes)
    out = out[:, expression.var_names[expression.var_names.isin(genes)]].copy()
    out.var = expression.var.loc[out.var_names].copy()
    on_this_scale = dataclasses.replace(
        design, layer=None, scale="log1p", library_size_key=None, use_rep=None, n_genes=None
    )
    out.uns[_keys.UNS] = {"design": on_this_scale.to_uns(), "predicted_by": type(model).__name__}
    out.uns["log1p"] = {}  # tells scanpy that logarithms were taken
    return out


def _check_numbers(context: object, n_cells: int | None, n_samples: int | None, seed: int) -> None:
    if context is not None and not isinstance(context, str):
        raise TypeError(f"context={context!r} must be one label, as a string; leave it out for all contexts.")
    for argument, value in (("n_cells", n_cells), ("n_samples", n_samples), ("seed", seed)):
        may_lack = value is None and argument != "seed"
        if not may_lack and (not isinstance(value, Integral) or isinstance(value, bool)):
            raise TypeError(f"{argument}={value!r} must be a whole number.")
    if seed < 0:
        raise ValueError(f"seed={seed!r} must be at least 0.")
    if n_cells is not None and n_cells < 1:
        raise ValueError(f"n_cells={n_cells!r}: at least one cell is needed.")
    if n_samples is not None and n_samples < 2:
        raise ValueError(f"n_samples={n_samples!r}: at least 2 draws are needed for a standard error.")


def _design(model: PerturbationModel, adata: AnnData, stated: dict[str, str | None]) -> Design:
    """Return the design of the data: that of the model, and what was stated otherwise."""
    for key in ("context_key", "batch_key"):
        if stated[key] is not None and getattr(model.design, key) is None:
            raise ValueError(f"{key}={stated[key]!r} was given, but the model was set up without {key}.")
    rep = model.design.use_rep
    if rep is not None and rep not in adata.obsm:
        remedy = "Run `vc.tl.embed(adata, model.se)` first." if rep == _keys.X_STATE else "Compute it first."
        raise UnknownNameError(f"the model works on obsm[{rep!r}], which this data does not have. {remedy}")
    layer = model.design.layer
    if stated["layer"] is None and layer is not None and layer not in adata.layers:
        raise unknown_name(
            "layer",
            layer,
            adata.layers,
            "The model was fitted on the layer of that name: say which layer has the same here, layer=, or where it is "
            f"in X, put it there first, `adata.layers[{layer!r}] = adata.X`.",
        )
    return dataclasses.replace(model.design.restated(**stated), split_key=None, gene_key=None)


def _names(perturbation: str | Sequence[str] | None) -> list[str]:
    names = [perturbation] if isinstance(perturbation, str) else perturbation
    listed = isinstance(names, Sequence | np.ndarray | pd.Index | pd.Series)
    if not listed or not all(isinstance(n, str) for n in names):
        raise TypeError(f"perturbation={perturbation!r} must be a name, or a list of names, as strings.")
    if not len(names):
        raise ValueError("perturbation=[] names nothing to predict.")
    return list(dict.fromkeys(names))


def _of_drug(
    model: PerturbationModel, perturbation: str | Sequence[str] | None, drug: str | None, dose: float | None
) -> str | Sequence[str] | None:
    """Return the perturbation, or the name of a drug at a dose in its place."""
    if drug is None:
        if dose is not None:
            raise ValueError(f"dose={dose!r} was given without drug=, whose dose it would be.")
        return perturbation
    if perturbation is not None:
        raise ValueError(f"perturbation={perturbation!r} and drug={drug!r} were both given: give one of them.")
    if not isinstance(model, ST):
        raise TypeError(f"drug={drug!r} is found in the names of an ST, and model is a {type(model).__name__}.")
    return model.perturbation_name(drug=drug, dose=dose)


def _checked(model: object) -> PerturbationModel:
    if not isinstance(model, PerturbationModel):
        raise TypeError(f"model={model!r} is not a fitted model. Load a saved one with `vc.models.ST.load(folder)`.")
    model._check_if_trained(warn=False)
    return model


# Models by the bytes in `uns` that they were read from, for as long as these are there.
_LOADED: dict[int, tuple[weakref.ref, ST]] = {}


def _stored_model(adata: AnnData) -> ST:
    """Return the model in `uns`, read once however many predictions are made with it."""
    stored = adata.uns.get(_keys.UNS, {}).get("st")
    if stored is None:
        raise ValueError(
            f"uns[{_keys.UNS!r}] holds no fitted model: run `vc.tl.fit_state(adata, ...)` first, or pass model= "
            "(`vc.models.ST.load(folder)`)."
        )
    if not isinstance(stored, np.ndarray):
        raise ValueError(f"uns[{_keys.UNS!r}]['st'] is a {type(stored).__name__} and no model: fit it again.")
    key = id(stored)
    if key not in _LOADED or _LOADED[key][0]() is not stored:
        model = put_on(model_of(unpack(stored, source=f"uns[{_keys.UNS!r}]['st']")))
        _LOADED[key] = weakref.ref(stored, lambda _: _LOADED.pop(key, None)), model
    return _LOADED[key][1]


def _better_one(model: PerturbationModel, fallback: str, names: Sequence[str]) -> PerturbationModel:
    """Return the model that did better on the validation cells of `fit_state`."""
    if fallback != "best":
        raise ValueError(f"fallback={fallback!r} is unknown; valid are 'best' and None.")
    if getattr(model, "validation", None) is None:
        raise ValueError(
            "fallback='best' needs an ST that was validated: fit it with `vc.tl.fit_state(..., validate=True)` and "
            "validation cells, or leave fallback out."
        )
    if model.fallback is None:
        return model
    for name in names:
        try:
            model.fallback.check_perturbation(name)
        except UnknownNameError as reason:
            raise UnknownNameError(
                f"fallback='best': the better model, {type(model.fallback).__name__}, cannot predict {name!r}. Leave "
                f"fallback out to have ST predict it. {reason}"
            ) from reason
    logger.warning("%s predicts: on the validation cells it was better than ST.", type(model.fallback).__name__)
    return model.fallback


def _controls(screen: Screen, context: str | None) -> Screen:
    """Return the control cells to start from; where all contexts are wanted, those without any are named."""
    rows = np.concatenate(list(screen.controls(context).values()))
    if context is None:
        with_controls = set(screen.context[rows])
        if without := sorted(set(screen.context_names) - with_controls):
            logger.warning("No prediction for %s, which has no control cells to start from.", ", ".join(without))
    controls = screen.take(np.sort(rows))
    if not controls.names.is_unique:
        raise ValueError("obs_names repeats control cells. Run `adata.obs_names_make_unique()` first.")
    return controls


def _starts(controls: Screen, model: PerturbationModel) -> Iterator[tuple[Start, sparse.csr_matrix]]:
    """Yield what the model starts from in each context, and the expression of these cells.

    Genes of the model that the data lacks enter as 0.
    """
    in_genes = dataclasses.replace(controls, rep=None)
    place = pd.Index(model.genes).get_indexer(controls.genes)
    of_rep = starts(controls) if controls.rep is not None else None
    for start in starts(in_genes):
        log = start.cells
        if of_rep is not None or len(place) == len(model.genes):
            yield start if of_rep is None else next(of_rep), log
            continue
        shape = (len(place), len(model.genes))
        wide = sparse.csr_matrix((np.ones(len(place), np.float32), (np.arange(len(place)), place)), shape=shape)
        base = np.zeros(len(model.genes), np.float32)
        base[place] = start.base
        yield dataclasses.replace(start, cells=sparse.csr_matrix(log @ wide), base=base), log


def _add_errors(cells: AnnData, error: np.ndarray) -> None:
    """Note the standard errors of the genes' means, the same for all cells of a perturbation and context."""
    cells.layers[_keys.STANDARD_ERROR] = np.tile(error.astype(np.float32), (cells.n_obs, 1))
    # the mean absolute value of a normal variable is sqrt(2 / pi) of its standard deviation
    cells.obs[_keys.EXPECTED_ERROR] = np.sqrt(2 / np.pi) * error.mean()


def _cells(start: Start, design: Design, rows: np.ndarray, cells: np.ndarray, name: str) -> AnnData:
    """Predicted cells of one perturbation and context, with their labels."""
    barcodes = start.names[rows]
    obs = {design.perturbation_key: name}
    if design.context_key is not None:
        obs[design.context_key] = start.context
    if design.batch_key is not None:
        obs[design.batch_key] = start.batch_of(rows)
    # a control cell occurs several times where more cells than controls were asked for
    index = make_index_unique(pd.Index([f"{barcode}-{name}" for barcode in barcodes]))
    frame = pd.DataFrame({**obs, _keys.CONTROL_BARCODE: np.asarray(barcodes)}, index=index)
    return AnnData(np.ascontiguousarray(cells, dtype=np.float32), obs=frame)


def _joined(predicted: dict[str, list[AnnData]], genes: Sequence[str]) -> AnnData:
    """Put the cells together, perturbation by perturbation; labels become categories."""
    out = ad.concat([cells for of_name in predicted.values() for cells in of_name])
    out.var_names = list(genes)
    out.obs_names = make_index_unique(pd.Index(out.obs_names))
    for key in out.obs.columns.difference([_keys.CONTROL_BARCODE, _keys.EXPECTED_ERROR]):
        out.obs[key] = pd.Categorical(out.obs[key])
    return out


def _warn_of_fewer_genes(design: Design, n_genes: int) -> None:
    fewer = design.n_genes is not None and n_genes < 0.9 * design.n_genes
    if fewer and design.scale == "counts" and design.library_size_key is None:
        logger.warning(
            "The data has %d genes, the training data had %d: library sizes, summed over fewer genes, come out too "
            "small and expression too large. Keep all genes, or name the true totals with library_size_key=.",
            *(n_genes, design.n_genes),
        )


def _common_genes(here: pd.Index, wanted: Sequence[str], min_coverage: float | None) -> list[str]:
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
