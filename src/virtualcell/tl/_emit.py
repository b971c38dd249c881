"""Predicted effects as cells: whole counts of the control cells, changed as the model says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from scipy import sparse

from virtualcell._errors import unknown_name
from virtualcell.data._counts import log_of
from virtualcell.data._emit import emit_counts
from virtualcell.models._base import PerturbationModel
from virtualcell.models._start import Start

Emit = Literal["cells", "mean"]


def check_emit(emit: str) -> None:
    """Raise unless `emit` is one of those that are known."""
    if emit not in get_args(Emit):
        raise unknown_name("emit", emit, get_args(Emit), "Say 'cells' for single cells, 'mean' for mean profiles.")


@dataclass(frozen=True, eq=False)
class Effect:
    """What a model predicts for one perturbation in one context.

    Parameters
    ----------
    perturbation
        Its name.
    rows
        Rows of the control cells that the prediction starts from, sorted; a row may occur several times.
    change
        Change of each gene's mean from those cells, (n_genes,), log(1 + counts per 10,000); 0 where the model's error
        is larger.
    highest
        The largest value that the model predicts.
    """

    perturbation: str
    rows: np.ndarray
    change: np.ndarray
    highest: float


def predicted_effect(
    model: PerturbationModel,
    start: Start,
    in_genes: Start,
    perturbation: str,
    *,
    columns: np.ndarray | None = None,
    n_cells: int | None = None,
    seed: int = 0,
) -> Effect:
    """Let a model predict from control cells, and return what changes in the mean of each gene.

    Parameters
    ----------
    model
        A fitted model.
    start
        What the model works on.
    in_genes
        Expression of the same cells, of all of the model's genes or of those in `columns`.
    perturbation
        What to predict; the control label changes nothing.
    columns
        Columns of the model's genes that `in_genes` has, in its order.
    n_cells, seed
        As in :meth:`virtualcell.models._base.PerturbationModel.predict`.
    """
    if perturbation == model.control:
        rows = model.rows_from(start, n_cells=n_cells, seed=seed)
        return Effect(perturbation, rows, np.zeros(in_genes.cells.shape[1]), 0.0)
    rows, cells = model.predict_from(start, perturbation, n_cells=n_cells, seed=seed)
    if columns is not None:
        cells = cells[:, columns]
    # both means are taken in the same way, so that what the model leaves as it is changes by exactly nothing
    before = in_genes.mean_of(rows)
    after = np.ascontiguousarray(cells).mean(axis=0, dtype=np.float64)
    change = beyond_error(after - before, model, start, perturbation, columns=columns)
    return Effect(perturbation, rows, change, float(cells.max(initial=0)))


def beyond_error(
    change: np.ndarray, model: PerturbationModel, start: Start, perturbation: str, *, columns: np.ndarray | None = None
) -> np.ndarray:
    """Return a change of the mean, (n_genes,), with 0 where it is smaller than the model's own error."""
    error = np.asarray(model.effect_error(perturbation, context=start.context, base=start.base))
    if columns is not None and error.ndim:
        error = error[columns]
    return np.where(np.abs(change) < error, 0, change)


@dataclass(frozen=True, eq=False)
class EmittedCells:
    """Predicted cells of one perturbation and context.

    Parameters
    ----------
    counts
        Whole counts, (n_cells, n_genes), float32 CSR.
    library
        Library size of each cell, (n_cells,): that of the control cell it started from.
    log
        log(1 + counts per 10,000), (n_cells, n_genes), float32 CSR.
    """

    counts: sparse.csr_matrix
    library: np.ndarray
    log: sparse.csr_matrix


def emitted_cells(effect: Effect, start: Start, genes: np.ndarray, *, seed: int = 0) -> EmittedCells:
    """Make cells of a predicted effect.

    Parameters
    ----------
    effect
        What the model predicts.
    start
        Expression of the control cells that it starts from, (n_cells, n_genes).
    genes
        Names of the genes.
    seed
        Seed of the draws.

    Raises
    ------
    NoCountsError
        If the control cells were not made of whole counts.
    """
    counted = start.counted
    library = counted.library[effect.rows]
    if not effect.change.any():
        counts = counted.counts[effect.rows]
    else:
        all_cells = np.array_equal(effect.rows, np.arange(len(counted.library)))
        counts = emit_counts(
            counted.by_gene if all_cells else counted.counts[effect.rows],
            library,
            effect.change,
            genes=genes,
            dispersion=counted.dispersions.after(effect.change),
            target_sum=counted.target_sum,
            key=f"{start.context}\0{effect.perturbation}",
            seed=seed,
        )
    return EmittedCells(counts, library, log_of(counts, library, counted.target_sum))
