"""Prediction from control cells that were read before: cells, means by the parts of a model, and their errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData

from virtualcell._settings import seed_of
from virtualcell.models._common import require_finite
from virtualcell.models._mixture import standard_error
from virtualcell.models._names import asked_name, start_cells
from virtualcell.models._start import Start, starts

if TYPE_CHECKING:
    from virtualcell.models._base import PerturbationModel

# Where a perturbation was measured: in the very context, in others, in one or the other (for models that do not
# remember which), or nowhere.
Measured = Literal["here", "elsewhere", "somewhere", "no"]


class SetMeans(NamedTuple):
    """Mean profiles that parts of a model predict from sets of control cells, (n_sets, n_parts, n_genes), and weights.

    The weights of the parts sum to 1, (n_parts,).
    """

    means: np.ndarray
    weights: np.ndarray


def predict_from(
    model: PerturbationModel, start: Start, perturbation: str, *, n_cells: int | None = None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Predict cells of one context: rows of `start`, sorted, and the predicted cells, (n_cells, n_genes).

    The control label predicts the control cells themselves, where the model works on expression.
    """
    rows, n = _rows(model, start, n_cells, seed)
    order = np.argsort(rows[:n], kind="stable")
    sorted_rows = rows[:n][order]
    if perturbation == model.control and model.design.use_rep is None:
        return sorted_rows, start.dense(sorted_rows)
    predicted = model.predict_cells(
        start.dense(rows), perturbation, context=start.context, base=start.base, batch=start.batch_of(rows)
    )
    require_finite(model, predicted, perturbation, start.context)
    return sorted_rows, predicted[:n][order]


def rows_from(model: PerturbationModel, start: Start, *, n_cells: int | None = None, seed: int = 0) -> np.ndarray:
    """Rows of `start`, sorted, that `predict_from` starts from."""
    rows, n = _rows(model, start, n_cells, seed)
    return np.sort(rows[:n])


def _rows(model: PerturbationModel, start: Start, n_cells: int | None, seed: int) -> tuple[np.ndarray, int]:
    """Rows that the model looks at, and how many of them, the first ones, are predicted."""
    rng = np.random.default_rng([seed, *start.context.encode()])
    n = len(start.names) if n_cells is None else n_cells
    # a small request still shows the model a full set of control cells
    n_run = max(n, min(len(start.names), model.n_seen_together))
    return rng.choice(len(start.names), n_run, replace=n_run > len(start.names)), n


def control_sets(model: PerturbationModel, start: Start, *, n_cells: int, seed: int = 0) -> np.ndarray:
    """Draw disjoint sets of about `n_cells` control cells, rows of `start`, (n_sets, set_size).

    They are the cells that `predict_from` draws for so many. A model that looks at each cell by itself has one set.
    """
    n = min(n_cells, len(start.names))
    size = min(model.n_seen_together, len(start.names)) if model.n_seen_together > 1 else n
    n_sets = max(n // size, 1)
    return _rows(model, start, n_sets * size, seed)[0].reshape(n_sets, size)


def means_from(
    model: PerturbationModel, start: Start, perturbations: Sequence[str], sets: np.ndarray
) -> Iterator[SetMeans]:
    """Yield the mean profiles that the parts of a model predict for each perturbation, from the same control cells.

    Parameters
    ----------
    model
        A fitted model.
    start
        The control cells of a context.
    perturbations
        What to predict; not the control.
    sets
        Rows of `start`, see :func:`control_sets`.
    """
    cells, batches = [start.dense(rows) for rows in sets], [start.batch_of(rows) for rows in sets]
    for name in perturbations:
        parts = [
            model.predict_parts(control, name, context=start.context, base=start.base, batch=batch)
            for control, batch in zip(cells, batches, strict=True)
        ]
        means = np.stack([of_set for of_set, _ in parts])
        require_finite(model, means, name, start.context)
        yield SetMeans(means, parts[0][1])


def error_from(
    model: PerturbationModel, start: Start, perturbation: str, *, n_samples: int = 20, seed: int = 0
) -> np.ndarray:
    """Estimate the standard error of the predicted mean of each gene, (n_genes,); see `uncertainty`."""
    rng = np.random.default_rng([seed, *start.context.encode()])
    means = []
    for _ in range(n_samples):
        rows = rng.choice(len(start.names), len(start.names))
        control = start.dense(rows)
        parts, weights = model.predict_parts(
            control, perturbation, context=start.context, base=control.mean(axis=0), batch=start.batch_of(rows)
        )
        means.append(parts)
    error = standard_error(np.stack(means), weights)
    require_finite(model, error, perturbation, start.context)
    return error


def where_measured(model: PerturbationModel, perturbation: str, context: str) -> Measured:
    """Tell whether the model learned from cells of a perturbation, "here", in this context, or where else."""
    names = model.lookup.parts(perturbation)
    if len(names) != 1 or names[0] not in model.lookup:
        return "no"
    return "here" if model.design.context_key is None else "somewhere"


def uncertainty(
    self: PerturbationModel,
    adata: AnnData | MuData | None = None,
    perturbation: str | None = None,
    *,
    context: str | None = None,
    n_samples: int = 20,
    seed: int | None = None,
) -> pd.DataFrame:
    """Estimate the standard error of the predicted mean of each gene: from draws of cells and disagreement.

    Control cells are drawn with replacement `n_samples` times, and each part of the model (heads and networks of
    an ST, and its transferred effect) predicts from each draw; see
    `virtualcell.models._mixture.standard_error`. An ST adds the error, common to all parts, that such
    predictions had where training cells were left out.

    Parameters
    ----------
    adata
        Data with the control cells to start from; the training data where it is `None`.
    perturbation
        Name of the perturbation.
    context
        Context whose control cells to take; all contexts where it is `None`.
    seed
        Seed of the draws; by default `vc.settings.seed`.
    n_samples
        Number of draws, at least 2.

    Returns
    -------
    Contexts x genes, log(1 + counts per 10,000).
    """
    if n_samples < 2:
        raise ValueError(f"n_samples={n_samples!r}: at least 2 draws are needed for a standard error.")
    perturbation = asked_name(self, perturbation)
    errors = {
        start.context: self.error_from(start, perturbation, n_samples=n_samples, seed=seed_of(seed))
        for start in starts(start_cells(self, adata), context)
    }
    return pd.DataFrame.from_dict(errors, orient="index", columns=self.genes)
