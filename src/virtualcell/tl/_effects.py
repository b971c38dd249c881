"""The call that lists predicted changes gene by gene, and the measured ones beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData

from virtualcell._errors import unknown_name
from virtualcell._settings import seed_of
from virtualcell._threads import own_threads
from virtualcell.data._design_arguments import DesignArguments, takes_design
from virtualcell.models._base import PerturbationModel
from virtualcell.models._shrinkage import shrink_with_signs
from virtualcell.tl._changes import LOG2, Setting
from virtualcell.tl._predict_checks import check_numbers

COLUMNS = ("log2_fold_change", "standard_error", "shrunken", "false_sign_rate")


@takes_design("they are then as the model was fitted")
@own_threads()
def effects(
    adata: AnnData | MuData,
    perturbations: str | Sequence[str] | None = None,
    *,
    context: str | None = None,
    genes: Sequence[str] | None = None,
    observed: bool = False,
    model: PerturbationModel | None = None,
    n_cells: int | None = 256,
    untreated: bool = False,
    min_gene_coverage: float = 1.0,
    seed: int | None = None,
    modality: str = "rna",
    **stated: Unpack[DesignArguments],
) -> pd.DataFrame:
    """List the predicted change of every gene for perturbations of one context, with errors.

    Parameters
    ----------
    adata
        Data with control cells, as in :func:`virtualcell.tl.predict_perturbation`. It is not changed.
    perturbations
        Names of perturbations; by default all that the model learned from, and with "features" all that it has
        features of, measured or not.
    context
        Context whose control cells are perturbed; it must be stated where there are several.
    genes
        Genes to list, all by default. The table has a row for each of them and each perturbation.
    observed
        Whether to put beside each prediction what the cells of the data say, whatever part of a split they are in.
    model
        A fitted model; by default the ST in `uns["virtualcell"]`.
    n_cells
        Number of control cells that a network starts from, the same for all perturbations; `None` for all there are.
    untreated
        Whether all cells of `adata` are control cells, as those of an atlas without perturbations are.
    min_gene_coverage
        Share of the model's genes that `adata` must have, by name; below 1.0 the missing ones enter as 0.
    seed
        Seed of the draw of control cells; by default `vc.settings.seed`.
    modality
        Expression modality of a MuData.
    **stated
        The design of `adata`, where it is another than that of the data that the model was fitted on.

    Returns
    -------
    One row per perturbation and gene, `perturbation` and `gene` being categories in the order they were asked for:

    `log2_fold_change`
        Change of mean log1p CP10k divided by ln 2, a log2 ratio of 1 + CP10k, as in
        :func:`virtualcell.pl.de_volcano`. It is 0 where it is smaller than the model's own error, as in predicted
        cells.
    `standard_error`
        Its standard error: disagreement of the model's parts, the draw of control cells, and the error that such
        predictions had where cells were left out.
    `shrunken`, `false_sign_rate`
        Posterior mean, and the probability that the true change is none or has the other sign, by adaptive shrinkage
        (Stephens 2017) of all genes of a perturbation with the log fold change as measurement.
    `observed_log2_fold_change`, `observed_standard_error`, `observed_shrunken`, `observed_false_sign_rate`
        With `observed`, the same of the measured cells, against the control cells of their context and batch; missing
        where there are none.

    Baselines, and an ST without a transferred effect, know no errors, so that these are missing, and what follows from
    them.

    Raises
    ------
    KeyError
        For an unknown perturbation, context, gene or column.
    ValueError
        If no context is stated where there are several, or `observed` changes are asked for of untreated cells.

    Examples
    --------
    >>> table = vc.tl.effects(fitted, name, context="type_3", observed=True)
    >>> len(table) == fitted.n_vars, "observed_log2_fold_change" in table.columns
    (True, True)
    """
    seed = seed_of(seed)
    check_numbers(context, n_cells, None)
    if observed and untreated:
        raise ValueError("observed=True needs perturbed cells, of which there are none where untreated=True.")
    setting = Setting.of(
        adata, context, model, stated, untreated=untreated, min_gene_coverage=min_gene_coverage, modality=modality
    )
    names = setting.names(perturbations, stated)
    shown = _shown(setting.genes, genes)
    parts = []
    for changes in setting.chunks(names, n_cells=n_cells, seed=seed):
        values = (changes.change, changes.error, changes.shrunken.mean, changes.shrunken.false_sign)
        parts.append([table[:, shown] for table in values])
    columns = dict(zip(COLUMNS, (np.concatenate(tables) for tables in zip(*parts, strict=True)), strict=True))
    if observed:
        columns |= {f"observed_{name}": table[:, shown] for name, table in _observed(setting, names).items()}
    codes, n = np.arange(len(names)), len(shown)
    table = pd.DataFrame(
        {
            "perturbation": pd.Categorical.from_codes(np.repeat(codes, n), setting.screen.spelled(names)),
            "gene": pd.Categorical.from_codes(np.tile(np.arange(n), len(names)), setting.genes[shown]),
            **{name: values.ravel().astype(np.float32) for name, values in columns.items()},
        }
    )
    table.attrs["context"] = setting.context
    return table


def _shown(known: pd.Index, genes: Sequence[str] | None) -> np.ndarray:
    """Places of the genes that are asked for."""
    if genes is None:
        return np.arange(len(known))
    if isinstance(genes, str):
        raise TypeError(f"genes={genes!r} must be a list of names.")
    genes = list(dict.fromkeys(genes))
    place = known.get_indexer(genes)
    if (place < 0).any():
        raise unknown_name("genes", genes[int(np.argmax(place < 0))], known, "It is not among those of the model.")
    return place


def _observed(setting: Setting, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return what the cells of the data say, (n, n_genes) each, NaN for perturbations without cells in the context."""
    out = {name: np.full((len(names), len(setting.genes)), np.nan, np.float32) for name in COLUMNS}
    wanted = np.asarray(setting.screen.perturbation.isin(list(names)))
    if not (wanted & np.asarray(setting.screen.context == setting.context)).any():
        return out
    found = setting.measured(wanted)
    rows = pd.Index(names).get_indexer([name for _, name in found.pairs()])
    posterior = shrink_with_signs(found.effects, found.variance)
    values = (found.effects / LOG2, np.sqrt(found.variance) / LOG2, posterior.mean / LOG2, posterior.false_sign)
    for name, table in zip(COLUMNS, values, strict=True):
        out[name][rows] = table
    return out
