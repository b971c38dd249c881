"""The call that ranks perturbations by what they are predicted to do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal, Unpack

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData

from virtualcell._progress import Bar
from virtualcell._settings import seed_of
from virtualcell._tasks import check_client
from virtualcell._threads import own_threads
from virtualcell.data._design_arguments import DesignArguments, takes_design
from virtualcell.models._base import PerturbationModel
from virtualcell.tl._changes import Changes, Setting
from virtualcell.tl._objective import EffectSize, Objective, Target, effect_size, objective_of
from virtualcell.tl._predict_checks import check_numbers

logger = logging.getLogger(__name__)

_COLLAPSED, _MANY = 0.8, 10  # mean correlation above which so many predictions are said to be one


@takes_design("they are then as the model was fitted")
@own_threads()
def screen(
    adata: AnnData | MuData,
    perturbations: str | Sequence[str] | None = None,
    *,
    context: str | None = None,
    objective: Literal["effect", "toward"] | Callable[[pd.DataFrame], object] = "effect",
    target: Target | None = None,
    model: PerturbationModel | None = None,
    n_cells: int | None = 256,
    alpha: float = 0.05,
    untreated: bool = False,
    min_gene_coverage: float = 1.0,
    seed: int | None = None,
    modality: str = "rna",
    progress_bar: bool | None = None,
    client: object | None = None,
    **stated: Unpack[DesignArguments],
) -> pd.DataFrame:
    """Predict many perturbations of the control cells of one context, and rank them.

    Only means are predicted, a few perturbations at a time, so that a screen of all genes needs little memory. All
    changes are differences of mean log1p CP10k divided by ln 2, a log2 ratio of 1 + CP10k, as in
    :func:`virtualcell.pl.de_volcano`, and those that `predict_perturbation(..., emit="mean")` makes.

    Parameters
    ----------
    adata
        Data with control cells, as in :func:`virtualcell.tl.predict_perturbation`. It is not changed.
    perturbations
        Names of perturbations; by default all that the model learned from. "features" stands for all that the model
        has features of, measured or not.
    context
        Context whose control cells are perturbed; it must be stated where there are several.
    objective
        What to rank by, the largest first. "effect" is the root mean square of the changes over genes. "toward" is the
        way to `target`. A function gets a DataFrame of changes, perturbations x genes, for some of the perturbations at
        a time, and returns a number for each row.
    target
        Where "toward" leads: the label of a population, which is that of a perturbation in this context or that of
        another context, whose control cells are meant; or a signature, as a list of genes that are to rise, or as
        `{"up": [...], "down": [...]}`.
    model
        A fitted model; by default the ST in `uns["virtualcell"]`.
    n_cells
        Number of control cells that a network starts from, the same for all perturbations; `None` for all there are.
    alpha
        Local false sign rate below which a gene counts as moved.
    untreated
        Whether all cells of `adata` are control cells, as those of an atlas without perturbations are.
    min_gene_coverage
        Share of the model's genes that `adata` must have, by name; below 1.0 the missing ones enter as 0.
    seed
        Seed of the draw of control cells; by default `vc.settings.seed`.
    modality
        Expression modality of a MuData.
    progress_bar
        Whether to show a bar; by default as `vc.settings.progress` says.
    client
        A `dask.distributed.Client` (`pip install "virtualcell[dask]"`): its workers predict some perturbations at a
        time, and what a worker did not finish another one does. The result is the same.
    **stated
        The design of `adata`, where it is another than that of the data that the model was fitted on.

    Returns
    -------
    One row per perturbation, sorted by score:

    `score`, `score_error`
        What was asked for, and its standard error. For a population it is the share of the way from the control cells
        to it, 1 where it is reached in that direction; for a signature the mean change of the genes that are to rise
        minus that of those that are to fall. The error of a function of one's own is not known.
    `effect`, `effect_error`
        Root mean square of the changes over genes, and its standard error.
    `n_genes`
        Number of genes with a local false sign rate below `alpha`, see :func:`virtualcell.tl.effects`.
    `distance`
        For a population, the distance that is left to its mean, 1 where nothing changed.
    `extrapolation`, `agreement`
        Where the model can tell, how far the control cells lie from what it learned from, and how far other experiments
        agree, as in :func:`virtualcell.tl.predict_perturbation`.
    `measured`
        Whether the model learned from cells of the perturbation in this context ("here"), in others or in other
        experiments ("elsewhere"), in one or the other, for models that do not remember ("somewhere"), or not ("no").

    Standard errors hold the disagreement of the model's parts, the draw of control cells and the error that predictions
    of this kind had where cells were left out; errors of genes are taken to go together as their measured effects do.
    Baselines, and an ST without a transferred effect, know no errors, so that these are missing, and so is the number
    of genes.

    `.attrs` has the objective, the context, `alpha`, and `mean_correlation`, that of the changes of every two
    perturbations over genes. A warning says where it is so high that the ranking is one of strength alone.

    Raises
    ------
    KeyError
        For an unknown perturbation, context, target, gene or column.
    ValueError
        If no context is stated where there are several, or a target is lacking, or cannot be told from the control.

    Examples
    --------
    >>> table = vc.tl.screen(fitted, context="type_3")
    >>> bool(table["score"].is_monotonic_decreasing)
    True
    >>> target = {"down": list(fitted.var_names[:5])}  # a signature
    >>> table = vc.tl.screen(fitted, context="type_3", objective="toward", target=target)
    """
    check_client(client)
    seed = seed_of(seed)
    check_numbers(context, n_cells, None)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha!r} must be above 0 and below 1; 0.05 is usual.")
    setting = Setting.of(
        adata, context, model, stated, untreated=untreated, min_gene_coverage=min_gene_coverage, modality=modality
    )
    names, goal = setting.names(perturbations, stated), objective_of(objective, target, setting)
    tables, alike = [], _Alike()
    with Bar("Screen", len(names), unit="perturbation", shown=progress_bar) as bar:
        for changes in setting.chunks(names, n_cells=n_cells, seed=seed, client=client):
            tables.append(_table(changes, goal, alpha))
            alike.add(changes.change)
            bar.show(bar.done + len(changes.names))
    table = pd.concat(tables)
    table.index = pd.Index(setting.screen.spelled(table.index), name="perturbation")
    table["n_genes"] = table["n_genes"].astype("Int64")
    table = table.sort_values("score", ascending=False, kind="stable")
    table.attrs |= {"objective": goal.name, "context": setting.context, "alpha": alpha}
    table.attrs["mean_correlation"] = alike.mean()
    _warn_of_collapse(alike)
    return table


def _table(changes: Changes, goal: Objective, alpha: float) -> pd.DataFrame:
    """Return the rows of some perturbations."""
    setting = changes.setting
    columns = goal.columns(changes)
    of_size = ("score", "score_error")
    size, error = (columns[c] for c in of_size) if isinstance(goal, EffectSize) else effect_size(changes)
    false_sign = changes.shrunken.false_sign
    n_genes = np.where(np.isnan(false_sign).all(axis=1), np.nan, (false_sign < alpha).sum(axis=1))
    first = {c: columns.pop(c) for c in of_size}
    columns = {**first, "effect": size, "effect_error": error, "n_genes": n_genes, **columns}
    trust = pd.DataFrame([setting.model.trust(setting.start, name) for name in changes.names], index=changes.names)
    table = pd.DataFrame(columns, index=changes.names).join(trust)
    table["measured"] = [setting.model.where_measured(name, setting.context) for name in changes.names]
    return table


class _Alike:
    """Mean correlation over genes of every two predictions, which come a few at a time."""

    def __init__(self) -> None:
        self.total: np.ndarray | float = 0.0
        self.n = 0

    def add(self, changes: np.ndarray) -> None:
        centred = changes - changes.mean(axis=1, keepdims=True)
        length = np.linalg.norm(centred, axis=1)
        moved = length > 0
        self.total = self.total + (centred[moved] / length[moved, None]).sum(axis=0)
        self.n += int(moved.sum())

    def mean(self) -> float:
        """NaN for fewer than two perturbations that change anything."""
        if self.n < 2:
            return float("nan")
        return float((np.square(self.total).sum() - self.n) / (self.n * (self.n - 1)))


def _warn_of_collapse(alike: _Alike) -> None:
    if alike.n >= _MANY and alike.mean() > _COLLAPSED:
        logger.warning(
            "The predictions of %d perturbations point in one direction (mean correlation %.2f): their ranks tell how "
            "strong each is along it, and little of what sets it apart. Screen those that were measured, or fit with "
            "more perturbations or other features.",
            *(alike.n, alike.mean()),
        )
