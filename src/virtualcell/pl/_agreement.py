"""How well the predicted effect of a perturbation agrees with the observed one."""

from __future__ import annotations

import logging
from typing import Unpack

import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from mudata import MuData

from virtualcell.data._design_arguments import DesignArguments, takes_design
from virtualcell.data._screen import Screen
from virtualcell.metrics._de import log2_fold_change
from virtualcell.metrics._profiles import largest
from virtualcell.pl._common import (
    chosen,
    contexts_of,
    in_context,
    mean_profile,
    names_of,
    observed_design,
    predicted_screen,
    title,
    with_controls,
)
from virtualcell.pl._style import (
    BLACK,
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

logger = logging.getLogger(__name__)


@takes_design('they are then as earlier calls noted them in `uns["virtualcell"]`')
def de_agreement(
    predicted: AnnData,
    observed: AnnData | MuData,
    *,
    perturbation: str | None = None,
    context: str | None = None,
    n_top: int = 50,
    n_labels: int = 10,
    modality: str = "rna",
    ax: Axes | None = None,
    **stated: Unpack[DesignArguments],
) -> Axes:
    """Draw the predicted against the observed log fold change of every gene.

    The log fold change is that of :func:`virtualcell.pl.de_volcano`. Both are taken against the measured control cells
    of the same context; over several contexts the effects are averaged, each context counting the same, so that how
    the cells are spread over contexts does not enter. The genes are those of `predicted`. Of several perturbations,
    every gene of each is a point, and the title gives means over perturbations.

    Parameters
    ----------
    predicted
        Result of :func:`virtualcell.tl.predict_perturbation`.
    observed
        Measured cells, with the perturbation and the control.
    perturbation
        Perturbation to compare; all that were predicted and measured by default.
    context
        Context to compare in; by default the contexts with predicted and with measured cells of this perturbation.
    n_top
        Number of genes with the largest absolute change, in prediction and in observation, whose overlap is counted.
        Two random choices of `n_top` from n genes share `n_top` squared, divided by n, on average, which is shown for
        comparison.
    n_labels
        Number of genes to label: those with the largest absolute change in either. A label that finds no room in the
        axes is left out, which the log counts; 40 have room in a figure of the default size.
    modality
        Modality of a MuData that holds gene expression.
    ax
        Axes to draw in; a new figure by default.
    **stated
        The design, where it is not noted in the data. The batch plays no part.

    Returns
    -------
    Axes
        The axes; the title gives Pearson's r and the overlap.

    Raises
    ------
    UnknownNameError
        If there are no predicted or no measured cells of this perturbation and context, or no control cells.
    ValueError
        If `n_top` is not between 1 and the number of genes.

    Examples
    --------
    >>> ax = vc.pl.de_agreement(predicted, fitted, perturbation=name, context="type_3")
    """
    design = observed_design(observed, modality, stated, predicted=predicted)
    perturbation, context = names_of(design, perturbation, context)
    if not 1 <= n_top <= predicted.n_vars:
        raise ValueError(f"n_top={n_top} must lie between 1 and {predicted.n_vars}, the number of predicted genes.")
    guess = predicted_screen(predicted, design)
    screen = Screen.from_anndata(observed, design, modality=modality)
    contexts_by = _compared(guess, screen, perturbation, context)
    names, contexts = list(contexts_by), sorted({c for of_one in contexts_by.values() for c in of_one})
    screen = with_controls(screen, names, contexts).select(predicted.var_names)

    expected, measured = (
        np.stack([_effect(cells, screen, name, where) for name, where in contexts_by.items()])
        for cells in (guess, screen)
    )
    top_expected, top_measured = (np.stack([_largest(e, n_top) for e in effects]) for effects in (expected, measured))
    shared = (top_expected & top_measured).sum(axis=1).mean()

    ax = axes_or_new(ax, figsize=(5.2, 5.2))
    _scatter(ax, measured, expected, top_measured, top_expected)
    overlap = f"top {n_top}: {shared:.3g} shared ({n_top**2 / predicted.n_vars:.1f} by chance)"
    write_title(ax, f"{title(names, contexts)}\n{_correlation(expected, measured)}, {overlap}")
    despine(ax)
    legend_below(ax, columns=2, title=f"among the {n_top} largest changes")
    points = np.column_stack([measured.ravel(), expected.ravel()])
    top = largest(np.abs(points).max(axis=1), n_labels)
    labels = [f"{gene} ({name})" if len(names) > 1 else gene for name in names for gene in predicted.var_names]
    place_labels(ax, points[top], [labels[i] for i in top], avoid=points)
    return ax


def _compared(guess: Screen, screen: Screen, perturbation: str | None, context: str | None) -> dict[str, list[str]]:
    """Return the contexts to compare each perturbation in; of those that were not named, the measured ones."""
    names = guess.perturbation_names if perturbation is None else [perturbation]
    found, without = {}, []
    for name in names:
        if perturbation is None:
            predicted_in, measured_in = (
                [c for c in contexts_of(cells, name) if context in (None, c)] for cells in (guess, screen)
            )
        else:
            chosen(guess, perturbation=name, context=context, remedy="Predict it first: `vc.tl.predict_perturbation`.")
            remedy = "It was predicted, but there are no measured cells to compare with."
            chosen(screen, perturbation=name, context=context, remedy=remedy)
            predicted_in, measured_in = (
                contexts_of(cells, name) if context is None else [context] for cells in (guess, screen)
            )
        both = [c for c in predicted_in if c in measured_in]
        if both:
            found[name] = both
        else:
            without.append(f"{name!r} was predicted in {predicted_in}, but measured only in {measured_in}")
    if not found:
        if context is not None:
            in_context(guess, context)
        raise ValueError(f"perturbation={without[0]}. Predict it in one of these.")
    if without:
        logger.warning("%d perturbations are not drawn: %s.", len(without), "; ".join(without[:3]))
    return found


def _scatter(
    ax: Axes, measured: np.ndarray, expected: np.ndarray, top_measured: np.ndarray, top_expected: np.ndarray
) -> None:
    """Draw the effects, coloured by the side on which they are among the largest."""
    ink, both = ink_of(ax), top_expected & top_measured
    classes = {
        "neither": (~(top_expected | top_measured), ink.visible(GREY)),
        "observed only": (top_measured & ~both, ink.visible(BLUE)),
        "predicted only": (top_expected & ~both, ink.visible(VERMILLION)),
        "both": (both, ink.visible(BLACK)),
    }
    alphas = balanced_alphas([marked.sum() for marked, _ in classes.values()])
    for (label, (marked, colour)), alpha in zip(classes.items(), alphas, strict=True):
        ax.scatter(
            measured[marked], expected[marked], s=16, color=colour, alpha=alpha, lw=0,
            label=f"{label} ({marked.sum():,})", rasterized=marked.size > 20_000,
        )  # fmt: skip
    points = np.column_stack([measured.ravel(), expected.ravel()])
    margin = 0.12 * np.ptp(points) or 1.0
    limits = (points.min() - margin, points.max() + margin)
    ax.axline((0, 0), slope=1, color=ink.muted(), lw=0.8, ls=(0, (4, 3)), zorder=0)
    ax.set(xlim=limits, ylim=limits, aspect="equal")
    ax.set_xlabel("observed log$_2$ FC of 1 + CP10k")
    ax.set_ylabel("predicted log$_2$ FC of 1 + CP10k")


def _effect(cells: Screen, reference: Screen, perturbation: str, contexts: list[str]) -> np.ndarray:
    """Log2 fold change of each gene against the control cells of `reference`, as the mean over contexts."""
    control = reference.design.control
    pairs = [(mean_profile(cells, perturbation, c), mean_profile(reference, control, c)) for c in contexts]
    return np.mean([log2_fold_change(*pair, pseudocount=1) for pair in pairs], axis=0)


def _largest(effect: np.ndarray, n: int) -> np.ndarray:
    """Mark the `n` largest absolute values."""
    marked = np.zeros(len(effect), dtype=bool)
    marked[largest(np.abs(effect), n)] = True
    return marked


def _correlation(expected: np.ndarray, measured: np.ndarray) -> str:
    """Write Pearson's r, of several perturbations (the rows) the mean; a constant effect has none."""
    pairs = zip(expected, measured, strict=True)
    found = [np.corrcoef(a, b)[0, 1] for a, b in pairs if np.ptp(a) > 0 and np.ptp(b) > 0]
    if len(found) < len(expected):
        constant = "" if len(expected) == 1 else f"{len(expected) - len(found)} of {len(expected)} "
        return f"Pearson r undefined ({constant}constant effect{'s' if constant else ''})"
    return f"{'Pearson r' if len(found) == 1 else 'mean Pearson r'} = {np.mean(found):.2f}"
