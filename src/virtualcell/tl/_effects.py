"""The call that lists predicted changes gene by gene, and the measured ones beside them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from anndata import AnnData
from mudata import MuData

from virtualcell._errors import unknown_name
from virtualcell._settings import seed_of
from virtualcell._threads import own_threads
from virtualcell.data._design import Scale
from virtualcell.models._base import PerturbationModel
from virtualcell.models._shrinkage import shrink_with_signs
from virtualcell.tl._changes import LOG2, Setting
from virtualcell.tl._predict_checks import check_numbers

COLUMNS = ("log2_fold_change", "standard_error", "shrunken", "false_sign_rate")


@own_threads()
def effects(
    adata: AnnData | MuData,
    perturbations: str | Sequence[str] | None = None,
    *,
    context: str | None = None,
    genes: Sequence[str] | None = None,
    observed: bool = False,
    model: PerturbationModel | None = None,
    n_cells: int = 256,
    layer: str | None = None,
    scale: Scale | None = None,
    library_size_key: str | None = None,
    perturbation_key: str | None = None,
    control: str | Sequence[str] | None = None,
    context_key: str | None = None,
    batch_key: str | None = None,
    min_gene_coverage: float = 1.0,
    seed: int | None = None,
    modality: str = "rna",
) -> pd.DataFrame:
    """List the predicted change of every gene for perturbations of one context, with errors.

    Parameters
    ----------
    adata, perturbations, context, model, n_cells
        As in :func:`virtualcell.tl.screen`.
    genes
        Genes to list, all by default. The table has a row for each of them and each perturbation.
    observed
        Whether to put beside each prediction what the cells of the data say, whatever part of a split they are in.
    layer, scale, library_size_key, perturbation_key, control, context_key, batch_key, min_gene_coverage, seed, modality
        As in :func:`virtualcell.tl.predict_perturbation`.

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
        If no context is stated where there are several.

    Examples
    --------
    >>> table = vc.tl.effects(fitted, name, context="type_3", observed=True)
    >>> len(table) == fitted.n_vars, "observed_log2_fold_change" in table.columns
    (True, True)
    """
    seed = seed_of(seed)
    check_numbers(context, n_cells, None, seed)
    stated: dict[str, object]
    stated = {"layer": layer, "scale": scale, "library_size_key": library_size_key, "context_key": context_key}
    stated |= {"perturbation_key": perturbation_key, "control": control, "batch_key": batch_key}
    setting = Setting.of(adata, context, model, min_gene_coverage=min_gene_coverage, modality=modality, **stated)
    names = setting.names(perturbations)
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
