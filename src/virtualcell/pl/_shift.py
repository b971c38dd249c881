"""Where a perturbation moves the cells, and where it was predicted to move them."""

from __future__ import annotations

import matplotlib.patheffects as effects
import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from mudata import MuData
from sklearn.decomposition import PCA

from virtualcell._design import Design, Scale
from virtualcell.pl import _style as style
from virtualcell.pl._common import (
    EVERYWHERE,
    cell_labels,
    observed_cells,
    predicted_cells,
    require_controls,
    title,
)


def perturbation_shift(
    adata: AnnData | MuData,
    predicted: AnnData,
    *,
    perturbation: str | None = None,
    context: str | None = None,
    components: tuple[int, int] = (1, 2),
    modality: str = "rna",
    perturbation_key: str | None = None,
    control: str | None = None,
    context_key: str | None = None,
    layer: str | None = None,
    scale: Scale | None = None,
    library_size_key: str | None = None,
    seed: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Draw control, perturbed and predicted cells in the plane of two principal components.

    The components are fitted to the log1p CP10k of the observed control and perturbed cells over the genes of
    `predicted`; the predicted cells are projected into them. In each context one arrow runs from the mean of the
    control cells to the mean of the perturbed cells and one to the mean of the predicted cells. Where no perturbed
    cell was measured, control and prediction are drawn alone, in the components of the control cells.

    Parameters
    ----------
    adata
        Measured cells.
    predicted
        Result of :func:`virtualcell.tl.predict_perturbation`.
    perturbation
        The perturbation to draw; needed only if `predicted` holds several.
    context
        Draw this context alone. By default all contexts with predicted cells, whose components then also separate
        the contexts.
    components
        Which two principal components to draw, counted from 1.
    modality
        Modality of a MuData that holds gene expression.
    perturbation_key, control, context_key, layer, scale, library_size_key
        As in :func:`virtualcell.tl.fit_state`; taken from what it left in `uns["virtualcell"]` unless stated.
    seed
        Starts the decomposition and orders the points, so that no group covers the others.
    ax
        Axes to draw in; a new figure by default.

    Returns
    -------
    Axes
        The axes, with component scores of log1p CP10k.

    Raises
    ------
    UnknownNameError
        If there are no predicted cells of this perturbation or context, or no control cells in a context.
    ValueError
        If `predicted` holds several perturbations and none was named.
    """
    design = Design.from_data(
        adata, modality=modality, perturbation_key=perturbation_key, control=control, context_key=context_key,
        layer=layer, scale=scale, library_size_key=library_size_key,
    )  # fmt: skip
    if perturbation is None:
        perturbation = _only_perturbation(predicted, design)
    guess = predicted_cells(predicted, design, perturbation=perturbation, context=context)
    contexts = guess.contexts_of(perturbation)
    observed = observed_cells(
        adata, design, perturbation=perturbation, contexts=contexts, genes=predicted.var_names, modality=modality
    )
    require_controls(observed, design, contexts)

    first, second = (c - 1 for c in components)
    rank = max(components)
    if min(components) < 1 or rank >= min(observed.expression.shape):
        raise ValueError(
            f"components={components} must lie between 1 and {min(observed.expression.shape) - 1}, the smaller of the "
            "numbers of cells and genes less one."
        )
    pca = PCA(rank, svd_solver="arpack", random_state=seed).fit(observed.expression)
    share = pca.explained_variance_ratio_

    def project(expression: np.ndarray) -> np.ndarray:
        return pca.transform(expression)[:, [first, second]]

    measured = project(observed.expression)
    treated = observed.perturbation == perturbation
    groups = [
        (f"control ({np.sum(~treated):,})", style.CONTROL, measured[~treated]),
        (f"observed ({np.sum(treated):,})", style.OBSERVED, measured[treated]),
        (f"predicted ({len(guess.perturbation):,})", style.PREDICTED, project(guess.expression)),
    ]
    groups = [g for g in groups if len(g[2])]

    ax = style.axes_or_new(ax, figsize=(5.5, 4.8))
    points = np.vstack([g[2] for g in groups])
    colours = np.repeat([g[1] for g in groups], [len(g[2]) for g in groups])
    order = np.random.default_rng(seed).permutation(len(points))
    ax.scatter(*points[order].T, c=colours[order], s=_point_size(len(points)), alpha=0.4, lw=0, rasterized=True)
    for label, colour, _ in groups:
        ax.scatter([], [], c=colour, s=30, label=label)

    tips, starts = [], []
    for where in contexts:
        start = project(observed.mean(design.control, where)[None])[0]
        starts.append(start)
        if where in observed.contexts_of(perturbation):
            tips.append(_arrow(ax, start, project(observed.mean(perturbation, where)[None])[0], style.OBSERVED, 3.2))
        tips.append(_arrow(ax, start, project(guess.mean(perturbation, where)[None])[0], style.PREDICTED, 1.6))

    ax.set_xlabel(f"PC{first + 1} ({share[first]:.1%} of variance)")
    ax.set_ylabel(f"PC{second + 1} ({share[second]:.1%} of variance)")
    ax.set_title(title(perturbation, context))
    style.despine(ax)
    style.legend_below(ax, columns=3)
    if contexts != [EVERYWHERE] and len(contexts) > 1:
        style.place_labels(ax, np.array(starts), contexts, avoid=np.vstack(tips))
    return ax


def _only_perturbation(predicted: AnnData, design: Design) -> str:
    """Return the perturbation that was predicted, if it is one."""
    names = sorted(set(cell_labels(predicted, design)[0]) - {design.control})
    if len(names) != 1:
        raise ValueError(
            f"predicted holds {len(names)} perturbations ({', '.join(names[:8])}). Name one: perturbation=."
        )
    return names[0]


def _point_size(n_cells: int) -> float:
    """Area of a point in square points, smaller for more cells."""
    return float(np.clip(12_000 / n_cells, 3, 14))


def _arrow(ax: Axes, start: np.ndarray, end: np.ndarray, colour: str, width: float) -> np.ndarray:
    """Draw an arrow with a white rim; return points along it, for labels to avoid."""
    head = {
        "arrowstyle": "-|>",
        "lw": width,
        "color": colour,
        "shrinkA": 0,
        "shrinkB": 0,
        "mutation_scale": 8 + 3 * width,
    }
    arrow = ax.annotate("", xy=tuple(end), xytext=tuple(start), arrowprops=head, zorder=4)
    arrow.arrow_patch.set_path_effects([effects.Stroke(linewidth=width + 2, foreground="white"), effects.Normal()])
    return start + np.linspace(0, 1, 15)[:, None] * (end - start)
