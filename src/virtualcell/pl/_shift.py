"""Where a perturbation moves the cells, and where it was predicted to move them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

import matplotlib.patheffects as effects
import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from mudata import MuData
from scipy import sparse
from sklearn.decomposition import PCA

from virtualcell._settings import seed_of
from virtualcell.data._design_arguments import DesignArguments, takes_design
from virtualcell.data._screen import Screen
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
    CONTROL,
    OBSERVED,
    PREDICTED,
    axes_or_new,
    balanced_alphas,
    despine,
    ink_of,
    legend_below,
    place_labels,
    write_title,
)

_HEAD = 0.4  # length of an arrow's head, in units of its scale


@takes_design('they are then as earlier calls noted them in `uns["virtualcell"]`')
def perturbation_shift(
    predicted: AnnData,
    observed: AnnData | MuData,
    *,
    perturbation: str | None = None,
    context: str | None = None,
    components: tuple[int, int] = (1, 2),
    n_labels: int = 20,
    modality: str = "rna",
    seed: int | None = None,
    ax: Axes | None = None,
    **stated: Unpack[DesignArguments],
) -> Axes:
    """Draw control, perturbed and predicted cells in the plane of two principal components.

    The components are fitted to the log1p CP10k of the observed control and perturbed cells over the genes of
    `predicted`; the predicted cells are projected into them. In each context one arrow runs from the mean of the
    control cells to the mean of the perturbed cells and one to the mean of the predicted cells. A shift that is
    shorter than the head of its arrow is not drawn, and the legend says so. Where no perturbed cell was measured,
    control and prediction are drawn alone, in the components of the control cells.

    Parameters
    ----------
    predicted
        Result of :func:`virtualcell.tl.predict_perturbation`.
    observed
        Measured cells, control cells among them.
    perturbation
        The perturbation to draw; all that were predicted by default, with their names at the predicted arrows.
    context
        Draw this context alone. By default all contexts with predicted cells, whose components then also separate
        the contexts.
    components
        Which two principal components to draw, counted from 1.
    n_labels
        Number of perturbations to name where there are several: those that were predicted to move furthest. A name
        that finds no room in the axes is left out, which the log counts; 40 have room in a figure of the default size.
    modality
        Modality of a MuData that holds gene expression.
    seed
        Starts the decomposition and orders the points, so that no group covers the others; by default
        `vc.settings.seed`.
    ax
        Axes to draw in; a new figure by default.
    **stated
        The design, where it is not noted in the data. The batch plays no part.

    Returns
    -------
    Axes
        The axes, with component scores of log1p CP10k.

    Raises
    ------
    UnknownNameError
        If there are no predicted cells of this perturbation or context, or no control cells in a context.
    ValueError
        If `components` has a number that the data does not have.

    Examples
    --------
    >>> ax = vc.pl.perturbation_shift(predicted, fitted, perturbation=name, context="type_3")
    """
    design = observed_design(observed, modality, stated, predicted=predicted)
    perturbation, context = names_of(design, perturbation, context)
    guess = predicted_screen(predicted, design)
    if perturbation is not None:
        remedy = "Predict it first: `vc.tl.predict_perturbation`."
        guess = guess.take(chosen(guess, perturbation=perturbation, context=context, remedy=remedy))
    elif context is not None:
        guess = guess.take(in_context(guess, context))
    names, contexts = guess.perturbation_names, guess.context_names
    screen = Screen.from_anndata(observed, design, modality=modality)
    screen = with_controls(screen, names, contexts).select(predicted.var_names)
    project, labels = _components(screen, components, seed_of(seed))

    treated = ~screen.is_control
    measured = project(screen.expression.rows())
    ax = axes_or_new(ax, figsize=(5.5, 4.8))
    ink = ink_of(ax)
    made = project(guess.expression.rows().toarray())
    groups = {
        "control": (ink.visible(CONTROL), measured[~treated]),
        "observed": (ink.visible(OBSERVED), measured[treated]),
        "predicted": (ink.visible(PREDICTED), made),
    }
    _scatter(ax, groups, seed_of(seed))
    ax.set_xlabel(labels[0])
    ax.set_ylabel(labels[1])
    write_title(ax, title(names, contexts))
    despine(ax)
    legend_below(ax, columns=3)

    shifts = _Shifts(ax, thin=float(np.clip((6 / len(guess.pairs())) ** 0.5, 0.6, 1)))
    starts, ends = {}, {}
    for where, name in guess.pairs():
        starts[where] = project(mean_profile(screen, design.control, where)[None])[0]
        if where in contexts_of(screen, name):
            shifts.draw(starts[where], project(mean_profile(screen, name, where)[None])[0], "observed", 3.2)
        ends[where, name] = project(mean_profile(guess, name, where)[None])[0]
        shifts.draw(starts[where], ends[where, name], "predicted", 1.6)
    shifts.note(legend_columns=3)
    _name(ax, names, starts, ends, shifts.points, n_labels)
    return ax


def _components(
    screen: Screen, components: tuple[int, int], seed: int
) -> tuple[Callable[[np.ndarray | sparse.csr_matrix], np.ndarray], list[str]]:
    """Fit principal components to cells; return how to project into two of them, and the labels of their axes."""
    rank, most = max(components), min(screen.n_cells, len(screen.genes)) - 1
    if min(components) < 1 or rank > most:
        raise ValueError(
            f"components={components} must lie between 1 and {most}, the smaller of the numbers of cells and genes "
            "less one."
        )
    pca = PCA(rank, svd_solver="arpack", random_state=seed).fit(screen.expression.rows())
    drawn = [c - 1 for c in components]
    labels = [f"PC{i + 1} ({pca.explained_variance_ratio_[i]:.1%} of variance)" for i in drawn]
    return lambda expression: pca.transform(expression)[:, drawn], labels


def _name(ax: Axes, names: list[str], starts: dict, ends: dict, avoid: list[np.ndarray], n_labels: int) -> None:
    """Name contexts where the arrows start and perturbations where they end, as far as there are several."""
    points, texts = [], []
    if len(starts) > 1:
        points, texts = list(starts.values()), list(starts)
    if len(names) > 1:
        length = {group: float(np.linalg.norm(end - starts[group[0]])) for group, end in ends.items()}
        for group in sorted(length, key=lambda group: -length[group])[:n_labels]:
            points.append(ends[group])
            texts.append(group[1])
    if texts:
        place_labels(ax, np.array(points), texts, avoid=np.vstack([*avoid, *starts.values()]))


def _scatter(ax: Axes, groups: dict[str, tuple[tuple[float, float, float], np.ndarray]], seed: int) -> None:
    """Draw groups of cells (colour, points) in a random order, in smaller points where there are more cells."""
    groups = {name: group for name, group in groups.items() if len(group[1])}
    sizes = [len(points) for _, points in groups.values()]
    alphas = [0.7 * alpha for alpha in balanced_alphas(sizes)]
    colours = np.repeat([(*colour, a) for (colour, _), a in zip(groups.values(), alphas, strict=True)], sizes, axis=0)
    points = np.vstack([points for _, points in groups.values()])
    order = np.random.default_rng(seed).permutation(len(points))
    area = float(np.clip(12_000 / len(points), 3, 14))
    ax.scatter(*points[order].T, c=colours[order], s=area, lw=0, rasterized=True)
    for name, (colour, drawn) in groups.items():
        ax.scatter([], [], color=colour, s=30, label=f"{name} ({len(drawn):,})")


class _Shifts:
    """Arrows of means, with a rim in the colour of the background; those shorter than their head are not drawn."""

    def __init__(self, ax: Axes, *, thin: float) -> None:
        ax.get_figure(root=True).draw_without_rendering()  # a layout engine sizes the axes only now
        ax.autoscale(False)
        self.ax, self.thin, self.ink = ax, thin, ink_of(ax)
        self.points: list[np.ndarray] = []  # along the arrows, for labels to avoid
        self.short = {"observed": 0, "predicted": 0}
        self.drawn = {"observed": 0, "predicted": 0}

    def draw(self, start: np.ndarray, end: np.ndarray, kind: str, width: float) -> None:
        """Draw one arrow."""
        width = width * self.thin
        scale = 8 + 3 * width
        pixels = self.ax.get_figure(root=True).dpi / 72
        length = np.linalg.norm(np.diff(self.ax.transData.transform([start, end]), axis=0)) / pixels
        if length <= _HEAD * scale + width:
            self.short[kind] += 1
            return
        self.drawn[kind] += 1
        colour = self.ink.visible(OBSERVED if kind == "observed" else PREDICTED)
        head = {"arrowstyle": "-|>", "lw": width, "color": colour, "shrinkA": 0, "shrinkB": 0, "mutation_scale": scale}
        arrow = self.ax.annotate("", xy=tuple(end), xytext=tuple(start), arrowprops=head, zorder=4)
        rim = effects.Stroke(linewidth=width + 2, foreground=self.ink.background)
        arrow.arrow_patch.set_path_effects([rim, effects.Normal()])
        self.points.append(start + np.linspace(0, 1, 15)[:, None] * (end - start))

    def note(self, *, legend_columns: int) -> None:
        """Say in the legend how many shifts are too small to draw."""
        if not any(self.short.values()):
            return
        for handle in self.ax.collections:
            kind = handle.get_label().split(" ")[0]
            if n := self.short.get(kind):
                several = f"{n} of {n + self.drawn[kind]} shifts" if n + self.drawn[kind] > 1 else "shift"
                handle.set_label(f"{handle.get_label()}, {several} too small to draw")
        legend_below(self.ax, columns=legend_columns)
