"""Which genes a perturbation changes, and how surely."""

from __future__ import annotations

import loguru
import numpy as np
import pandas as pd
from anndata import AnnData
from illico import asymptotic_wilcoxon
from matplotlib.axes import Axes
from mudata import MuData
from scipy import sparse
from scipy.stats import false_discovery_control

from virtualcell import _keys
from virtualcell._design import Design, Scale, expression_modality
from virtualcell.pl import _style as style
from virtualcell.pl._common import (
    cell_labels,
    chosen,
    is_prediction,
    mean_over_cells,
    observed_cells,
    require_controls,
    title,
)


def de_volcano(
    adata: AnnData | MuData,
    *,
    perturbation: str,
    context: str | None = None,
    n_labels: int = 10,
    fdr: float = 0.05,
    modality: str = "rna",
    perturbation_key: str | None = None,
    control: str | None = None,
    context_key: str | None = None,
    layer: str | None = None,
    scale: Scale | None = None,
    library_size_key: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the log fold change of every gene against its significance.

    The log fold change is the difference of the mean log1p CP10k between perturbed and control cells, divided by
    ln 2: a log2 ratio of 1 + CP10k, finite for every gene and small for genes with few counts. The test is Wilcoxon's
    rank sum test, two-sided (normal approximation with correction for ties and continuity), with Benjamini and
    Hochberg's correction over all genes.

    Parameters
    ----------
    adata
        Measured cells, or a prediction of :func:`virtualcell.tl.predict_perturbation`. A prediction is compared with
        the control cells that it started from. Its p-values say how clearly the model moves the cells, which depends
        on how many were asked for; they are no evidence about the experiment.
    perturbation
        Perturbation to compare with the control.
    context
        Context to take the cells from. By default the cells of all contexts with this perturbation are pooled, which
        adds differences between contexts to the fold change where perturbed and control cells are spread differently.
    n_labels
        Number of genes to label: of those that pass `fdr`, the ones with the largest product of log fold change and
        -log10 p (Xiao et al. 2014), since a prediction can shift a gene surely but by next to nothing.
    fdr
        False discovery rate below which a gene is coloured.
    modality
        Modality of a MuData that holds gene expression.
    perturbation_key, control, context_key, layer, scale, library_size_key
        As in :func:`virtualcell.tl.fit_state`; taken from what it left in `uns["virtualcell"]` unless stated.
    ax
        Axes to draw in; a new figure by default.

    Returns
    -------
    Axes
        The axes.

    Raises
    ------
    UnknownNameError
        If no cell has this perturbation or context, or there are no control cells in the context.
    """
    design = Design.from_data(
        adata, modality=modality, perturbation_key=perturbation_key, control=control, context_key=context_key,
        layer=layer, scale=scale, library_size_key=library_size_key,
    )  # fmt: skip
    names, where = cell_labels(adata, design, modality)
    remedy = "Name one that has cells in this data and is not the control."
    keep = chosen(names, where, design, perturbation=perturbation, context=context, remedy=remedy)
    if is_prediction(adata):
        treated, reference = np.asarray(adata.X[keep]), np.asarray(adata.layers[_keys.CONTROL_LAYER][keep])
    else:
        contexts = sorted(set(where[keep]))
        cells = observed_cells(adata, design, perturbation=perturbation, contexts=contexts, modality=modality)
        require_controls(cells, design, contexts)
        is_control = cells.perturbation == design.control
        treated, reference = cells.expression[~is_control], cells.expression[is_control]
    table = differential_expression(treated, reference, expression_modality(adata, modality).var_names)

    # A p-value below the smallest double is 0; it is drawn where that double would be.
    height = -np.log10(table["p_adjusted"].clip(lower=np.finfo(float).tiny)).to_numpy()
    change = table["log2_fold_change"].to_numpy()
    significant = (table["p_adjusted"] < fdr).to_numpy()
    ax = style.axes_or_new(ax, figsize=(5.5, 4.8))
    for label, rows, colour in (
        ("not significant", ~significant, style.GREY),
        ("down", significant & (change < 0), style.BLUE),
        ("up", significant & (change > 0), style.VERMILLION),
    ):
        ax.scatter(change[rows], height[rows], s=16, c=colour, alpha=0.7, lw=0, label=f"{label} ({rows.sum():,})")
    ax.axhline(-np.log10(fdr), color="0.4", lw=0.8, ls=(0, (4, 3)), zorder=0)
    ax.axvline(0, color="0.8", lw=0.8, zorder=0)
    ax.set_xlabel("log$_2$ fold change of 1 + CP10k")
    ax.set_ylabel("$-$log$_{10}$ adjusted p (Wilcoxon)")
    source = "predicted" if is_prediction(adata) else "observed"
    size = f"{treated.shape[0]:,} against {reference.shape[0]:,} cells"
    ax.set_title(f"{title(perturbation, context)}\n{source}, {size}", fontsize=10)
    margin = 0.12 * np.ptp(change) or 1.0
    ax.set_xlim(change.min() - margin, change.max() + margin)
    top = 1.12 * max(height.max(), -np.log10(fdr))
    ax.set_ylim(-0.02 * top, top)
    style.despine(ax)
    style.legend_below(ax, columns=3)
    order = np.argsort(-np.abs(change) * height, kind="stable")
    named = order[significant[order]][:n_labels]
    points = np.column_stack([change, height])
    style.place_labels(ax, points[named], list(table.index[named]), avoid=points)
    return ax


def differential_expression(
    treated: sparse.csr_matrix | np.ndarray, reference: sparse.csr_matrix | np.ndarray, genes: pd.Index
) -> pd.DataFrame:
    """Compare two groups of cells (log1p CP10k) gene by gene: `log2_fold_change` and `p_adjusted`, one row per gene."""
    stack = (
        sparse.vstack([treated, reference], format="csr")
        if sparse.issparse(treated)
        else np.vstack([treated, reference])
    )
    group = pd.Categorical(["treated"] * treated.shape[0] + ["reference"] * reference.shape[0])
    both = AnnData(stack, obs=pd.DataFrame({"group": group}, index=[str(i) for i in range(len(group))]))
    loguru.logger.disable("illico")  # it reports every call on stderr, past `logging`
    tested = asymptotic_wilcoxon(both, is_log1p=True, group_keys="group", reference="reference").loc["treated"]
    return pd.DataFrame(
        {
            "log2_fold_change": (mean_over_cells(treated) - mean_over_cells(reference)) / np.log(2),
            "p_adjusted": false_discovery_control(tested["p_value"].to_numpy().clip(0, 1)),
        },
        index=genes,
    )
