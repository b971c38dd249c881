"""How well the predicted effect of a perturbation agrees with the observed one."""

from __future__ import annotations

import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from mudata import MuData

from virtualcell.data._design import Scale
from virtualcell.data._screen import Screen
from virtualcell.metrics._de import log2_fold_change
from virtualcell.metrics._profiles import largest
from virtualcell.pl._common import (
    chosen,
    contexts_of,
    mean_profile,
    observed_design,
    predicted_screen,
    title,
    with_controls,
)
from virtualcell.pl._style import BLACK, BLUE, GREY, VERMILLION, axes_or_new, despine, legend_below, place_labels


def de_agreement(
    predicted: AnnData,
    observed: AnnData | MuData,
    *,
    perturbation: str,
    context: str | None = None,
    n_top: int = 50,
    n_labels: int = 10,
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
    """Draw the predicted against the observed log fold change of every gene.

    The log fold change is that of :func:`virtualcell.pl.de_volcano`. Both are taken against the measured control cells
    of the same context; over several contexts the effects are averaged, each context counting the same, so that how
    the cells are spread over contexts does not enter. The genes are those of `predicted`.

    Parameters
    ----------
    predicted
        Result of :func:`virtualcell.tl.predict_perturbation`.
    observed
        Measured cells, with the perturbation and the control.
    perturbation
        Perturbation to compare.
    context
        Context to compare in; by default the contexts with predicted and with measured cells of this perturbation.
    n_top
        Number of genes with the largest absolute change, in prediction and in observation, whose overlap is counted.
        Two random choices of `n_top` from n genes share `n_top` squared, divided by n, on average, which is shown for
        comparison.
    n_labels
        Number of genes to label: those with the largest absolute change in either.
    modality
        Modality of a MuData that holds gene expression.
    perturbation_key, control, context_key, batch_key, layer, scale, library_size_key
        As in :func:`virtualcell.tl.fit_state`; as it noted them in `uns["virtualcell"]` of `observed` unless stated;
        noted for later calls if stated. The batch plays no part.
    ax
        Axes to draw in; a new figure by default.

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
    design = observed_design(
        observed, modality, perturbation_key=perturbation_key, control=control, context_key=context_key, layer=layer,
        scale=scale, library_size_key=library_size_key, batch_key=batch_key,
    )  # fmt: skip
    if not 1 <= n_top <= predicted.n_vars:
        raise ValueError(f"n_top={n_top} must lie between 1 and {predicted.n_vars}, the number of predicted genes.")
    guess = predicted_screen(predicted, design)
    remedy = "Predict it first: `vc.tl.predict_perturbation`."
    guess = guess.take(chosen(guess, perturbation=perturbation, context=context, remedy=remedy))
    screen = Screen.from_anndata(observed, design, modality=modality)
    remedy = "It was predicted, but there are no measured cells to compare with."
    chosen(screen, perturbation=perturbation, context=context, remedy=remedy)
    predicted_in, measured_in = contexts_of(guess, perturbation), contexts_of(screen, perturbation)
    contexts = [c for c in predicted_in if c in measured_in]
    if not contexts:
        raise ValueError(
            f"perturbation={perturbation!r} was predicted in {predicted_in}, but measured only in {measured_in}. "
            "Predict it in one of these."
        )
    screen = with_controls(screen, perturbation, contexts).select(predicted.var_names)

    expected, measured = (_effect(cells, screen, perturbation, contexts) for cells in (guess, screen))
    top_expected, top_measured = (_largest(e, n_top) for e in (expected, measured))
    both = top_expected & top_measured

    ax = axes_or_new(ax, figsize=(5.2, 5.2))
    for label, rows, colour in (
        ("neither", ~(top_expected | top_measured), GREY),
        ("observed only", top_measured & ~both, BLUE),
        ("predicted only", top_expected & ~both, VERMILLION),
        ("both", both, BLACK),
    ):
        ax.scatter(measured[rows], expected[rows], s=16, c=colour, alpha=0.7, lw=0, label=f"{label} ({rows.sum():,})")
    points = np.column_stack([measured, expected])
    margin = 0.12 * np.ptp(points) or 1.0
    limits = (points.min() - margin, points.max() + margin)
    ax.axline((0, 0), slope=1, color="0.4", lw=0.8, ls=(0, (4, 3)), zorder=0)
    ax.set(xlim=limits, ylim=limits, aspect="equal")
    ax.set_xlabel("observed log$_2$ FC of 1 + CP10k")
    ax.set_ylabel("predicted log$_2$ FC of 1 + CP10k")
    overlap = f"top {n_top}: {both.sum()} shared ({n_top**2 / len(both):.1f} by chance)"
    ax.set_title(f"{title(perturbation, context)}\n{_correlation(expected, measured)}, {overlap}", fontsize=10)
    despine(ax)
    legend_below(ax, columns=2)
    ax.get_legend().set_title(f"among the {n_top} largest changes", prop={"size": 9})
    top = largest(np.abs(points).max(axis=1), n_labels)
    place_labels(ax, points[top], list(predicted.var_names[top]), avoid=points)
    return ax


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


def _correlation(a: np.ndarray, b: np.ndarray) -> str:
    """Write Pearson's r, which a constant effect does not have."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return "Pearson r undefined (constant effect)"
    return f"Pearson r = {np.corrcoef(a, b)[0, 1]:.2f}"
