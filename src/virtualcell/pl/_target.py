"""Whether a perturbation hits its own target."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Unpack

import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from mudata import MuData

from virtualcell._errors import unknown_name
from virtualcell.data._design import noted_design
from virtualcell.data._design_arguments import DesignArguments, takes_design
from virtualcell.data._screen import Screen
from virtualcell.pl._common import (
    chosen,
    contexts_of,
    names_of,
    observed_design,
    the_only,
    title,
    with_controls,
)
from virtualcell.pl._style import CONTROL, OBSERVED, axes_or_new, despine, ink_of, legend_below, write_title


@takes_design('they are then as earlier calls noted them in `uns["virtualcell"]`')
def target_expression(
    adata: AnnData | MuData,
    *,
    perturbation: str | None = None,
    gene: str | None = None,
    context: str | None = None,
    values: Literal["log1p", "counts"] = "log1p",
    modality: str = "rna",
    ax: Axes | None = None,
    **stated: Unpack[DesignArguments],
) -> Axes:
    """Draw how the target gene is expressed in control and in perturbed cells.

    Histograms in percent of the cells of each group, with vertical lines at the mean. The title gives the residual
    expression: the mean CP10k (or count) of the perturbed cells in percent of that of the control cells.

    Parameters
    ----------
    adata
        Measured cells.
    perturbation
        Perturbation whose target is looked at; it may be left out where there is one.
    gene
        The target, where it does not have the perturbation's name (a guide, a pair, a drug).
    context
        Context to take the cells from; by default those of all contexts with this perturbation are pooled.
    values
        `"log1p"` for log1p CP10k, `"counts"` for the raw counts.
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
        If the gene was not measured, no cell has this perturbation or context, or there are no control cells in it.
    ValueError
        If there are several perturbations and none was named, or raw counts are asked for of log1p values.

    Examples
    --------
    >>> ax = vc.pl.target_expression(fitted, perturbation=name)
    """
    design = observed_design(adata, modality, stated)
    perturbation, context = names_of(design, perturbation, context)
    if values not in ("log1p", "counts"):
        raise ValueError(f"values={values!r} is unknown. Say 'log1p' or 'counts'.")
    if values == "counts" and design.scale != "counts":
        raise ValueError("values='counts' was asked for, but scale='log1p' was stated. Give the layer with raw counts.")
    design = replace(design, gene_key=noted_design(adata, modality).get("gene_key"))
    screen = Screen.from_anndata(adata, design, modality=modality, unit=values)
    perturbation = the_only(perturbation, screen.perturbation_names, argument="adata")
    if gene is None:
        called = screen.target_names
        gene = next(iter(called.index[called == perturbation]), perturbation)
    if gene not in screen.genes:
        raise unknown_name("gene", gene, screen.genes, "Name the target as it was measured: gene=.")
    remedy = "Name one that has cells in this data and is not the control."
    chosen(screen, perturbation=perturbation, context=context, remedy=remedy)
    contexts = contexts_of(screen, perturbation) if context is None else [context]
    screen = with_controls(screen, [perturbation], contexts).select([gene])

    drawn = screen.expression.rows().toarray().ravel().astype(np.float64)
    linear = np.expm1(drawn) if values == "log1p" else drawn
    unit = "CP10k" if values == "log1p" else "counts"
    ax = axes_or_new(ax, figsize=(5.5, 4))
    ink = ink_of(ax)
    means = {}
    for name, colour in ((design.control, ink.visible(CONTROL)), (perturbation, ink.visible(OBSERVED))):
        rows = screen.perturbation == name
        means[name] = linear[rows].mean()
        label = f"{name} ({rows.sum():,}): mean {means[name]:.3g} {unit}, {np.mean(drawn[rows] > 0):.0%} above 0"
        weights = np.full(rows.sum(), 1 / rows.sum())
        ax.hist(
            drawn[rows], bins=_bins(drawn, values), weights=weights, histtype="stepfilled",
            fc=(colour, 0.45), ec=colour, lw=1.2, label=label,
        )  # fmt: skip
        at = np.log1p(means[name]) if values == "log1p" else means[name]
        ax.axvline(at, color=colour, lw=1.8, ls=(0, (4, 2)))
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set_xlabel(f"{gene}, " + ("log(1 + CP10k)" if values == "log1p" else "counts per cell"))
    ax.set_ylabel("cells of the group")
    subject = "expression" if gene == perturbation else gene
    residual = _residual(means[perturbation], means[design.control])
    write_title(ax, f"{title(perturbation, contexts)}: {subject} {residual}")
    despine(ax)
    legend_below(ax, columns=1)
    return ax


def _bins(values: np.ndarray, kind: str) -> np.ndarray:
    """Return the edges of some 30 bins; those of counts are whole numbers wide and centred on them."""
    top = values.max()
    if kind == "log1p":
        return np.linspace(0, max(top, 1.0), 31)
    width = int(np.ceil((top + 1) / 30))
    return np.arange(-0.5, top + width, width)


def _residual(perturbed: float, control: float) -> str:
    """Write the residual expression, which a gene that control cells lack does not have."""
    return f"at {perturbed / control:,.0%} of control" if control > 0 else "not detected in control"
