"""Which genes a perturbation changes, and how surely."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from mudata import MuData
from scipy import sparse

from virtualcell import _keys
from virtualcell.data._design import Design, Scale
from virtualcell.data._screen import Screen
from virtualcell.metrics import differential_expression
from virtualcell.metrics._profiles import largest
from virtualcell.pl._common import (
    chosen,
    contexts_of,
    is_prediction,
    observed_design,
    predicted_screen,
    title,
    with_controls,
)
from virtualcell.pl._style import BLUE, GREY, VERMILLION, axes_or_new, despine, legend_below, place_labels


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
    batch_key: str | None = None,
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
    perturbation_key, control, context_key, batch_key, layer, scale, library_size_key
        As in :func:`virtualcell.tl.fit_state`; as it noted them in `uns["virtualcell"]` unless stated; noted for
        later calls if stated. The batch plays no part.
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

    Examples
    --------
    >>> ax = vc.pl.de_volcano(fitted, perturbation=name, context="type_3")
    """
    design = observed_design(
        adata, modality, perturbation_key=perturbation_key, control=control, context_key=context_key, layer=layer,
        scale=scale, library_size_key=library_size_key, batch_key=batch_key,
    )  # fmt: skip
    cells, is_control, genes = _both_groups(adata, design, perturbation, context, modality)
    table = differential_expression(
        cells, np.where(is_control, "control", "perturbed"), control="control", genes=genes, pseudocount=1
    )

    # A p-value below the smallest double is 0; it is drawn where that double would be.
    height = -np.log10(table["fdr"].clip(lower=np.finfo(float).tiny)).to_numpy()
    change = table["log2_fold_change"].to_numpy()
    significant = (table["fdr"] < fdr).to_numpy()
    ax = axes_or_new(ax, figsize=(5.5, 4.8))
    for label, rows, colour in (
        ("not significant", ~significant, GREY),
        ("down", significant & (change < 0), BLUE),
        ("up", significant & (change > 0), VERMILLION),
    ):
        ax.scatter(change[rows], height[rows], s=16, c=colour, alpha=0.7, lw=0, label=f"{label} ({rows.sum():,})")
    ax.axhline(-np.log10(fdr), color="0.4", lw=0.8, ls=(0, (4, 3)), zorder=0)
    ax.axvline(0, color="0.8", lw=0.8, zorder=0)
    ax.set_xlabel("log$_2$ fold change of 1 + CP10k")
    ax.set_ylabel("$-$log$_{10}$ adjusted p (Wilcoxon)")
    source = "predicted" if is_prediction(adata) else "observed"
    size = f"{np.sum(~is_control):,} against {np.sum(is_control):,} cells"
    ax.set_title(f"{title(perturbation, context)}\n{source}, {size}", fontsize=10)
    margin = 0.12 * np.ptp(change) or 1.0
    ax.set_xlim(change.min() - margin, change.max() + margin)
    top = 1.12 * max(height.max(), -np.log10(fdr))
    ax.set_ylim(-0.02 * top, top)
    despine(ax)
    legend_below(ax, columns=3)
    order = largest(np.abs(change) * height, None)
    named = order[significant[order]][:n_labels]
    points = np.column_stack([change, height])
    place_labels(ax, points[named], list(genes[named]), avoid=points)
    return ax


def _both_groups(
    data: AnnData | MuData, design: Design, perturbation: str, context: str | None, modality: str
) -> tuple[sparse.csr_matrix, np.ndarray, pd.Index]:
    """Return the perturbed cells and the control cells, which of them are controls, and the genes."""
    remedy = "Name one that has cells in this data and is not the control."
    if not is_prediction(data):
        screen = Screen.from_anndata(data, design, modality=modality)
        chosen(screen, perturbation=perturbation, context=context, remedy=remedy)
        contexts = contexts_of(screen, perturbation) if context is None else [context]
        screen = with_controls(screen, perturbation, contexts)
        return screen.expression.rows(), screen.is_control, screen.genes
    screen = predicted_screen(data, design)
    rows = np.flatnonzero(chosen(screen, perturbation=perturbation, context=context, remedy=remedy))
    start = predicted_screen(data, design, layer=_keys.CONTROL_LAYER)
    cells = sparse.vstack([screen.expression.rows(rows), start.expression.rows(rows)], format="csr")
    return cells, np.repeat([False, True], len(rows)), screen.genes
