"""Where a perturbation moves the cells, and where it was predicted to move them."""

from __future__ import annotations

import matplotlib.patheffects as effects
import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from mudata import MuData
from scipy import sparse
from sklearn.decomposition import PCA

from virtualcell._settings import seed_of
from virtualcell.data._design import Scale
from virtualcell.data._screen import Screen
from virtualcell.pl._common import (
    chosen,
    contexts_of,
    mean_profile,
    observed_design,
    predicted_screen,
    title,
    with_controls,
)
from virtualcell.pl._style import CONTROL, OBSERVED, PREDICTED, axes_or_new, despine, legend_below, place_labels


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
    batch_key: str | None = None,
    layer: str | None = None,
    scale: Scale | None = None,
    library_size_key: str | None = None,
    seed: int | None = None,
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
    perturbation_key, control, context_key, batch_key, layer, scale, library_size_key
        As in :func:`virtualcell.tl.fit_state`; as it noted them in `uns["virtualcell"]` unless stated; noted for
        later calls if stated. The batch plays no part.
    seed
        Starts the decomposition and orders the points, so that no group covers the others; by default
        `vc.settings.seed`.
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

    Examples
    --------
    >>> ax = vc.pl.perturbation_shift(fitted, predicted, perturbation=name, context="type_3")
    """
    design = observed_design(
        adata, modality, perturbation_key=perturbation_key, control=control, context_key=context_key, layer=layer,
        scale=scale, library_size_key=library_size_key, batch_key=batch_key,
    )  # fmt: skip
    guess = predicted_screen(predicted, design)
    if perturbation is None:
        perturbation = _only_perturbation(guess)
    remedy = "Predict it first: `vc.tl.predict_perturbation`."
    guess = guess.take(chosen(guess, perturbation=perturbation, context=context, remedy=remedy))
    contexts = contexts_of(guess, perturbation)
    observed = Screen.from_anndata(adata, design, modality=modality)
    observed = with_controls(observed, perturbation, contexts).select(predicted.var_names)

    first, second = (c - 1 for c in components)
    rank, most = max(components), min(observed.n_cells, len(observed.genes)) - 1
    if min(components) < 1 or rank > most:
        raise ValueError(
            f"components={components} must lie between 1 and {most}, the smaller of the numbers of cells and genes "
            "less one."
        )
    expression = observed.expression.rows()
    pca = PCA(rank, svd_solver="arpack", random_state=seed_of(seed)).fit(expression)
    share = pca.explained_variance_ratio_

    def project(expression: np.ndarray | sparse.csr_matrix) -> np.ndarray:
        return pca.transform(expression)[:, [first, second]]

    def centre(screen: Screen, name: str, context: str) -> np.ndarray:
        return project(mean_profile(screen, name, context)[None])[0]

    measured = project(expression)
    treated = observed.perturbation == perturbation
    groups = [
        (f"control ({np.sum(~treated):,})", CONTROL, measured[~treated]),
        (f"observed ({np.sum(treated):,})", OBSERVED, measured[treated]),
        (f"predicted ({guess.n_cells:,})", PREDICTED, project(guess.expression.rows().toarray())),
    ]
    ax = axes_or_new(ax, figsize=(5.5, 4.8))
    _scatter(ax, groups, seed_of(seed))

    tips, starts = [], []
    for where in contexts:
        start = centre(observed, design.control, where)
        starts.append(start)
        if where in contexts_of(observed, perturbation):
            tips.append(_arrow(ax, start, centre(observed, perturbation, where), OBSERVED, 3.2))
        tips.append(_arrow(ax, start, centre(guess, perturbation, where), PREDICTED, 1.6))

    ax.set_xlabel(f"PC{first + 1} ({share[first]:.1%} of variance)")
    ax.set_ylabel(f"PC{second + 1} ({share[second]:.1%} of variance)")
    ax.set_title(title(perturbation, context))
    despine(ax)
    legend_below(ax, columns=3)
    if len(contexts) > 1:
        place_labels(ax, np.array(starts), contexts, avoid=np.vstack(tips))
    return ax


def _only_perturbation(predicted: Screen) -> str:
    """Return the perturbation that was predicted, if it is one."""
    names = predicted.perturbation_names
    if len(names) != 1:
        raise ValueError(
            f"predicted holds {len(names)} perturbations ({', '.join(names[:8])}). Name one: perturbation=."
        )
    return names[0]


def _scatter(ax: Axes, groups: list[tuple[str, str, np.ndarray]], seed: int) -> None:
    """Draw groups of cells (label, colour, points) in a random order, in smaller points where there are more cells."""
    groups = [g for g in groups if len(g[2])]
    points = np.vstack([g[2] for g in groups])
    colours = np.repeat([g[1] for g in groups], [len(g[2]) for g in groups])
    order = np.random.default_rng(seed).permutation(len(points))
    area = float(np.clip(12_000 / len(points), 3, 14))
    ax.scatter(*points[order].T, c=colours[order], s=area, alpha=0.4, lw=0, rasterized=True)
    for label, colour, _ in groups:
        ax.scatter([], [], c=colour, s=30, label=label)


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
