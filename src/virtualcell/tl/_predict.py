"""The call people make, which answers what a perturbation would do to these cells."""

from __future__ import annotations

import dataclasses
import logging
import os
import weakref
from collections.abc import Iterator, Sequence
from typing import Literal, Unpack

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData
from scipy import sparse

from virtualcell import _keys
from virtualcell._errors import UnknownNameError
from virtualcell._interrupted import told_when_interrupted
from virtualcell._settings import say, seed_of
from virtualcell._tasks import check_client
from virtualcell._threads import own_threads
from virtualcell.data._design import Design
from virtualcell.data._design_arguments import DesignArguments, takes_design
from virtualcell.data._labels import expression_modality, var_of
from virtualcell.data._lazy import stored_matrix
from virtualcell.data._results import ours
from virtualcell.data._screen import Screen
from virtualcell.io._cell_store import checked_path, opened
from virtualcell.io._save import unpack
from virtualcell.models import ST
from virtualcell.models._base import PerturbationModel
from virtualcell.models._common import model_of, put_on
from virtualcell.models._start import Start, starts
from virtualcell.tl._doses import Asked, of_drug
from virtualcell.tl._emit import Emit, check_emit
from virtualcell.tl._predict_checks import (
    check_columns,
    check_not_too_many,
    check_numbers,
    design_of_data,
    names_of,
    shared_genes,
    tell_of_changed_cells,
)
from virtualcell.tl._predicted import Predictions

logger = logging.getLogger(__name__)

_INTERRUPTED = "Predicting was interrupted. With to= the same call goes on behind the cells that are written."


@takes_design("they are then as the model was fitted")
@told_when_interrupted(_INTERRUPTED)
@own_threads()
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
    emit: Emit = "cells",
    fallback: Literal["best"] | None = None,
    untreated: bool = False,
    min_gene_coverage: float = 1.0,
    seed: int | None = None,
    modality: str = "rna",
    to: str | os.PathLike | None = None,
    client: object | None = None,
    **stated: Unpack[DesignArguments],
) -> AnnData:
    """Predict the cells that a perturbation would make of the control cells.

    The model says how the mean of each gene changes. Predicted cells are control cells whose counts were changed by so
    much: of a gene that falls each count is lost with the same probability, to one that rises negative binomial counts
    are added, and library sizes stay. Effects smaller than the model's own error are no change, and the control label
    predicts the control cells themselves.

    Parameters
    ----------
    adata
        Data that :func:`virtualcell.tl.fit_state` was run on, or, with `model`, any data with control cells, the
        model's genes and the same columns of `obs`. It is not changed.
    perturbation
        Name of a perturbation, a combination `A+B`, or several names; by default all that the model learned from.
    drug
        Drug to predict at a `dose`, in place of the name, where the model was fitted with `dose_key`, or names hold
        both, as "drug_1.0" and "[('Dabrafenib', 0.5, 'uM')]" do.
    dose
        Dose of `drug`, which may be left out where one was measured. Between measured doses the change of each gene's
        mean follows a monotone curve of the logarithm of the dose (PCHIP), which begins with the control. Outside of
        the measured range nothing is predicted.
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
    emit
        "cells" predicts single cells with whole counts, "mean" one mean profile per perturbation and context. Cells
        need control cells with counts: raw ones, or log(1 + counts per 10,000) that whole counts can be read off.
    fallback
        "best" uses the best baseline where the verdict of `fit_state` was that ST is worse;
        `uns["virtualcell"]["predicted_by"]` of the result tells which model it was.
    untreated
        Whether all cells of `adata` are control cells, as those of an atlas without perturbations are. The column of
        perturbations is then not read, and need not be there.
    min_gene_coverage
        Share of the model's genes that `adata` must have, by name. Below 1.0 the missing ones enter as 0, which the
        model never saw for a gene that is expressed, and are left out of the result.
    seed
        Seed of the draw of control cells; by default `vc.settings.seed`. The order of cells and genes in `adata` does
        not matter.
    modality
        Expression modality of a MuData.
    to
        An h5ad file or a zarr store to write the prediction to, some groups at a time, where it may be larger than
        memory. After a process has died, the same call goes on behind the last groups that were written.
    client
        A `dask.distributed.Client` (`pip install "virtualcell[dask]"`): its workers predict some groups at a time,
        and what a worker did not finish another one does. The result is the same.
    scale
        Whether the expression is "counts" (raw) or "log1p" (of counts per 10,000). Models of
        :meth:`virtualcell.models.ST.from_arc` expect the latter unless "counts" is stated.
    **stated
        The design of `adata`, where it is another than that of the data that the model was fitted on.

    Returns
    -------
    AnnData of predicted cells x the model's genes. `X` is log(1 + counts per 10,000), on which it is ready for
    `scanpy.tl.rank_genes_groups` and for `anndata.concat`, made of the whole counts in `layers["counts"]`. `obs` has
    the perturbation and the context under the names of their columns in `adata`, as they are written there and of the
    same type, the library size that counts were
    divided by (as `library_size`, or under the name of the column it came from), and `control_barcode`, the control
    cell each one started from, whose expression is `layers["control"]`. Matrices are CSR where the data is sparse. With
    `emit="mean"` there is a row per perturbation and context, and neither counts nor control cells to name;
    `layers["control"]` is the mean of the control cells. With `to`, the matrices stay on disk, as
    :func:`anndata.io.sparse_dataset` has them (`ad.read_h5ad` and `ad.read_zarr` load all), and cells come without
    `layers["control"]`, which `adata` has.

    Where the model can tell, `obs["extrapolation"]` says how far the control cells lie from the contexts that it
    learned from (0 is one of them, above 1 is further out than any of them lies from the others), and
    `obs["agreement"]` how far other experiments agree on the perturbation (a cosine, 1 at most).

    What is predicted for means is in `varm`, genes x groups: `varm["change"]`, the change of each gene's mean from the
    control cells, log(1 + counts per 10,000), and `varm["standard_error"]`, its standard error. Rows of
    `uns["virtualcell"]["groups"]` name the perturbation and the context of each column. Without `n_samples` the error
    is the one that predictions of this kind had where training cells were left out, NaN where the model does not know
    it, as baselines do not; with `n_samples` it holds the draw of control cells and the disagreement of the model's
    parts too, and `obs["expected_error"]` is the mean absolute error of the mean that follows from it.

    Raises
    ------
    KeyError
        For an unknown perturbation, context, gene or column; the message names the closest ones and the remedy.
    ValueError
        If there is no fitted model, the matrix is not on the stated scale, or there are no counts to make cells of; or
        if cells of all perturbations would be more than a million, and none was named.

    Examples
    --------
    >>> predicted = vc.tl.predict_perturbation(fitted, name, context="type_3")
    >>> predicted.layers["counts"].shape == predicted.shape
    True
    >>> predicted.obs["target_gene"].unique().tolist() == [name]
    True
    """
    check_emit(emit)
    seed = seed_of(seed)
    check_numbers(context, n_cells, n_samples)
    check_client(client)
    path = None if to is None else checked_path(to)
    expression = expression_modality(adata, modality)
    model = checked_model(stored_model(expression) if model is None else model)
    written = names_of(model, of_drug(model, perturbation, drug, dose), stated)
    asked = [Asked.of(model, name, drug=drug is not None) for name in written]
    names = [name for one in asked for name in one.names]
    for name in names:
        model.check_perturbation(name)
        if name == model.control:
            say(f"{name!r} is the label of control cells: it is predicted to be the control cells themselves.")
    if fallback is not None:
        model = _better_one(model, fallback, names)
    model = model.on_genes(expression.var_names)
    design = design_of_data(model, adata, stated, modality=modality)
    check_columns(adata, design, modality=modality, untreated=untreated)
    controls = controls_of(Screen.from_anndata(adata, design, modality=modality, untreated=untreated), context)
    if perturbation is drug is None and emit == "cells" and to is None:
        n_contexts = len(controls.controls())
        check_not_too_many(len(names), controls.n_cells if n_cells is None else n_cells * n_contexts)
    genes, columns = shared_genes(model, design, expression.var_names, min_gene_coverage)
    starting = list(starts_of(controls.select(genes), model))
    tell_of_changed_cells(model, [start for _, start in starting], genes)
    predictions = Predictions(
        model, asked, starting, controls.design, genes, columns,
        var_of(expression), emit, n_cells, n_samples, seed, client,
    )  # fmt: skip
    if to is None:
        store, out = None, predictions.joined(is_sparse=_is_sparse(expression, design))
    else:
        store, out = predictions.to_disk(path)
    out.obs = controls.as_written(out.obs, written)
    on_this_scale = dataclasses.replace(
        design, layer=None, scale="log1p", library_size_key=None, use_rep=None, n_genes=None
    )
    out.uns[_keys.UNS] |= {"design": on_this_scale.to_uns(), "predicted_by": type(model).__name__}
    out.uns["log1p"] = {}  # tells scanpy that logarithms were taken
    if store is None:
        return out
    store.finish(out)
    return opened(path)


def checked_model(model: object) -> PerturbationModel:
    if not isinstance(model, PerturbationModel):
        raise TypeError(f"model={model!r} is not a fitted model. Load a saved one with `vc.models.ST.load(folder)`.")
    model._check_if_trained(warn=False)
    return model


# Models by the bytes in `uns` that they were read from, for as long as these are there.
_LOADED: dict[int, tuple[weakref.ref, ST]] = {}


def stored_model(adata: AnnData) -> ST:
    """Return the model in `uns`, read once however many predictions are made with it."""
    stored = ours(adata).get("st")
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
    """Return the model that did better on the cells that `fit_state` left out."""
    if fallback != "best":
        raise ValueError(f"fallback={fallback!r} is unknown; valid are 'best' and None.")
    if getattr(model, "validation", None) is None:
        raise ValueError(
            "fallback='best' needs an ST with a verdict: fit it with `vc.tl.fit_state(..., validate=True)`, or leave "
            "fallback out."
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
    logger.warning("%s predicts: on cells that were left out it was better than ST.", type(model.fallback).__name__)
    return model.fallback


def controls_of(screen: Screen, context: str | None) -> Screen:
    """Return the control cells to start from; where all contexts are wanted, those without any are named."""
    rows = np.concatenate(list(screen.controls(context).values()))
    if context is None:
        with_controls = set(screen.context[rows])
        if without := sorted(set(screen.context_names) - with_controls):
            logger.warning("No prediction for %s, which has no control cells to start from.", ", ".join(without))
    controls = screen.take(np.sort(rows))
    controls = dataclasses.replace(controls, expression=controls.expression.at_hand(make=False))
    if not controls.names.is_unique:
        raise ValueError("obs_names repeats control cells. Run `adata.obs_names_make_unique()` first.")
    controls.check_embedding()
    return controls


def starts_of(controls: Screen, model: PerturbationModel) -> Iterator[tuple[Start, Start]]:
    """Yield what the model starts from in each context, and the expression of these cells.

    Genes of the model that the data lacks enter as 0.
    """
    in_genes = dataclasses.replace(controls, rep=None)
    place = pd.Index(model.genes).get_indexer(controls.genes)
    of_rep = starts(controls) if controls.rep is not None else None
    for start in starts(in_genes):
        if of_rep is not None or len(place) == len(model.genes):
            yield start if of_rep is None else next(of_rep), start
            continue
        shape = (len(place), len(model.genes))
        wide = sparse.csr_matrix((np.ones(len(place), np.float32), (np.arange(len(place)), place)), shape=shape)
        base = np.zeros(len(model.genes), np.float32)
        base[place] = start.base
        yield dataclasses.replace(start, cells=sparse.csr_matrix(start.cells @ wide), base=base), start


def _is_sparse(adata: AnnData, design: Design) -> bool:
    return stored_matrix(adata, design.layer, "").is_sparse
