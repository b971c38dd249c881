"""Which genes a perturbation changes, and how surely."""

from __future__ import annotations

from typing import Unpack

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from mudata import MuData
from scipy import stats

from virtualcell import _keys
from virtualcell._errors import unknown_name
from virtualcell.data._design import Design
from virtualcell.data._design_arguments import DesignArguments, takes_design
from virtualcell.data._screen import Screen
from virtualcell.metrics import differential_expression
from virtualcell.metrics._profiles import largest
from virtualcell.pl._common import (
    chosen,
    contexts_of,
    is_prediction,
    names_of,
    observed_design,
    the_only,
    title,
    with_controls,
)
from virtualcell.pl._style import (
    BLUE,
    GREY,
    VERMILLION,
    axes_or_new,
    balanced_alphas,
    despine,
    ink_of,
    legend_below,
    place_labels,
    write_title,
)


@takes_design('they are then as earlier calls noted them in `uns["virtualcell"]`')
def de_volcano(
    adata: AnnData | MuData,
    *,
    perturbation: str | None = None,
    context: str | None = None,
    n_labels: int = 10,
    fdr: float = 0.05,
    modality: str = "rna",
    ax: Axes | None = None,
    **stated: Unpack[DesignArguments],
) -> Axes:
    """Draw the log fold change of every gene against how sure it is.

    The log fold change is the difference of the mean log1p CP10k between perturbed and control cells, divided by
    ln 2: a log2 ratio of 1 + CP10k, finite for every gene and small for genes with few counts. Measured cells are
    tested by Wilcoxon's rank sum test, two-sided (normal approximation with correction for ties and continuity).
    Predicted cells would pass any test if only enough of them were asked for: of a prediction, the predicted change is
    divided by its standard error, which is drawn, and taken for normal. Both have Benjamini and Hochberg's correction
    over all genes, and the dashed line is where genes pass `fdr`.

    Parameters
    ----------
    adata
        Measured cells, or a prediction of :func:`virtualcell.tl.predict_perturbation` with standard errors. Those of a
        prediction without `n_samples` are what predictions of this kind had where cells were left out; with it, they
        hold the draw of control cells and the disagreement of the model's parts too. A gene that changes with an error
        of zero, where noise explained all of it, is left out, and the title counts these: few are with `n_samples=20`.
    perturbation
        Perturbation to compare with the control; it may be left out where there is one.
    context
        Context to take the cells from. By default the cells of all contexts with this perturbation are pooled, which
        adds differences between contexts to the fold change where perturbed and control cells are spread differently;
        of a prediction, the mean over contexts is drawn.
    n_labels
        Number of genes to label: of those that pass `fdr`, the ones with the largest product of log fold change and
        height (Xiao et al. 2014), since a prediction can shift a gene surely but by next to nothing. A label that finds
        no room in the axes is left out, which the log counts; 40 have room in a figure of the default size.
    fdr
        False discovery rate below which a gene is coloured.
    modality
        Modality of a MuData that holds gene expression.
    ax
        Axes to draw in; a new figure by default.
    **stated
        The design, where it is not noted in the data. The batch plays no part.

    Returns
    -------
    Axes
        The axes.

    Raises
    ------
    UnknownNameError
        If no cell has this perturbation or context, or there are no control cells in the context.
    ValueError
        If there are several perturbations and none was named, or a prediction has no standard errors.

    Examples
    --------
    >>> ax = vc.pl.de_volcano(fitted, perturbation=name, context="type_3")
    """
    design = observed_design(adata, modality, stated)
    perturbation, context = names_of(design, perturbation, context)
    table, source, where, name = (_predicted if is_prediction(adata) else _measured)(
        adata, design, perturbation, context, modality
    )

    change = table["log2_fold_change"].to_numpy()
    significant = (table["fdr"] < fdr).to_numpy()
    if is_prediction(adata):
        height, unit = table["in_errors"].to_numpy(), "size of the change in standard errors"
        limit = height[significant].min() if significant.any() else np.nan
    else:  # a p-value below the smallest double is 0; it is drawn where that double would be
        height = -np.log10(table["fdr"].clip(lower=np.finfo(float).tiny)).to_numpy()
        limit, unit = -np.log10(fdr), "$-$log$_{10}$ adjusted p (Wilcoxon)"
    ax = axes_or_new(ax, figsize=(5.5, 4.8))
    ink = ink_of(ax)
    classes = {
        "not significant": (~significant, GREY),
        "down": (significant & (change < 0), BLUE),
        "up": (significant & (change > 0), VERMILLION),
    }
    alphas = balanced_alphas([rows.sum() for rows, _ in classes.values()])
    for (label, (rows, colour)), alpha in zip(classes.items(), alphas, strict=True):
        ax.scatter(
            change[rows], height[rows], s=16, color=ink.visible(colour), alpha=alpha, lw=0,
            label=f"{label} ({rows.sum():,})",
        )  # fmt: skip
    ax.axhline(limit, color=ink.muted(), lw=0.8, ls=(0, (4, 3)), zorder=0)
    ax.axvline(0, color=ink.muted(0.3), lw=0.8, zorder=0)
    ax.set_xlabel("log$_2$ fold change of 1 + CP10k")
    ax.set_ylabel(unit)
    write_title(ax, f"{title(name, where)}\n{source}")
    margin = 0.12 * np.ptp(change) or 1.0
    ax.set_xlim(change.min() - margin, change.max() + margin)
    top = 1.12 * max(height.max(), np.nan_to_num(limit), 1.0)
    ax.set_ylim(-0.02 * top, top)
    despine(ax)
    legend_below(ax, columns=3)
    order = largest(np.abs(change) * height, None)
    named = order[significant[order]][:n_labels]
    points = np.column_stack([change, height])
    place_labels(ax, points[named], list(table["gene"].iloc[named]), avoid=points)
    return ax


_REMEDY = "Name one that has cells in this data and is not the control."
Found = tuple[pd.DataFrame, str, list[str], str]


def _measured(data: AnnData | MuData, design: Design, perturbation: str | None, context: str | None, mod: str) -> Found:
    """Test measured cells; return the table, what it is made of, the contexts, and the perturbation."""
    screen = Screen.from_anndata(data, design, modality=mod)
    perturbation = the_only(perturbation, screen.perturbation_names, argument="adata")
    chosen(screen, perturbation=perturbation, context=context, remedy=_REMEDY)
    contexts = contexts_of(screen, perturbation) if context is None else [context]
    screen = with_controls(screen, [perturbation], contexts)
    is_control = screen.is_control
    table = differential_expression(
        screen.expression.rows(), np.where(is_control, "control", "perturbed"), control="control", genes=screen.genes,
        pseudocount=1,
    )  # fmt: skip
    return table, f"observed, {np.sum(~is_control):,} against {np.sum(is_control):,} cells", contexts, perturbation


def _predicted(data: AnnData, design: Design, perturbation: str | None, context: str | None, mod: str) -> Found:
    """Compare each predicted change with its standard error; contexts are averaged, and err together."""
    if _keys.CHANGE not in data.varm:
        raise ValueError(
            f"this prediction has no varm[{_keys.CHANGE!r}], the change of each gene, which `anndata.concat` drops. "
            "Draw what `vc.tl.predict_perturbation` returned, which takes several perturbations and contexts at once."
        )
    groups = data.uns[_keys.UNS][_keys.GROUPS]
    known = sorted(set(groups["perturbation"]) - {design.control})
    perturbation = the_only(perturbation, known, argument="adata")
    if perturbation not in known:
        raise unknown_name("perturbation", perturbation, known, _REMEDY)
    columns = groups.reset_index(drop=True)
    columns = columns[columns["perturbation"] == perturbation]
    if context is not None:
        if context not in set(columns["context"]):
            raise unknown_name("context", context, list(columns["context"]), f"{perturbation!r} has cells only there.")
        columns = columns[columns["context"] == context]
    change, error = (data.varm[k][:, columns.index].mean(axis=1) for k in (_keys.CHANGE, _keys.STANDARD_ERROR))
    has_error = (change == 0) | (error > 0)  # of the others noise explained all errors where cells were left out
    if np.isnan(error).any() or not has_error.any():
        by = data.uns[_keys.UNS].get("predicted_by", "the model")
        raise ValueError(
            f"{by} knows no standard error of this prediction, which a volcano shows. Ask for one: "
            "`vc.tl.predict_perturbation(..., n_samples=20)`."
        )
    change, error = change[has_error], error[has_error]
    z = np.abs(change) / np.where(change == 0, 1.0, error)
    table = pd.DataFrame(
        {
            "gene": data.var_names[has_error],
            "log2_fold_change": change / np.log(2),
            "in_errors": z,
            "fdr": stats.false_discovery_control(2 * stats.norm.sf(z)),
        }
    )
    without = f"; {np.sum(~has_error):,} genes without one are left out" if not has_error.all() else ""
    return table, f"predicted, change and its standard error{without}", list(columns["context"]), perturbation
