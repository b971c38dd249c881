"""Scores of several models, beside the floor and the ceiling."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from virtualcell._errors import unknown_name
from virtualcell._keys import ALL
from virtualcell.pl._common import title
from virtualcell.pl._style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    LABEL_SIZE,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    despine,
    ink_of,
    label_size,
    legend_below,
    outside_text,
    write_title,
)

_NEEDED = ["split", "seed", "source", "model", "context", "perturbation", "metric", "value"]
_DEFAULT = ("pearson_delta", "mae", "energy_distance", "top50_overlap", "discrimination_cosine", "de_overlap")
_COLOURS = (BLUE, ORANGE, PURPLE, SKY, VERMILLION, BLACK)  # of splits
_FLOOR, _CEILING = GREY, GREEN
# Sources of the ceiling, what the legend calls them, and how the line is dashed; the first that there is gets drawn.
_CEILINGS = {
    "corrected ceiling": ("ceiling, corrected for halves", (0, (5, 2))),
    "ceiling": ("ceiling of halves, not corrected", (0, (5, 1.5, 1, 1.5))),
}
# Scores of which less is better.
_LOSSES = (
    "mae",
    "mse",
    "mae_delta",
    "mse_delta",
    "energy_distance",
    "energy_distance_pca",
    "mmd",
    "de_wilcoxon_lfc_nmae",
)
_NEUTRAL = ("variance_ratio", "de_n_predicted", "de_n_observed")
_NAMES = {
    "pearson_delta": "Pearson delta",
    "mae": "mean absolute error",
    "energy_distance": "energy distance",
    "top50_overlap": "overlap of top 50 genes",
    "discrimination_cosine": "discrimination (cosine)",
    "de_overlap": "overlap of DE genes",
    "variance_ratio": "variance ratio",
}


def benchmark(
    scores: pd.DataFrame,
    *,
    metrics: Sequence[str] | None = None,
    models: Sequence[str] | None = None,
    axes: Axes | Sequence[Axes] | None = None,
) -> Axes | np.ndarray:
    """Draw the scores of models: a dot per split and seed, the floor and the ceiling as bands.

    A dot is the mean over the test perturbations of each context, then over contexts; NaN, where a metric is not
    defined, is left out. The bar is the mean over splits, each of which counts the same whatever its number of seeds.
    The bands start at such means too: what is no better than the floor (its best model for the metric), and what is
    beyond the ceiling. That is the corrected one, what the truth would score; where a metric has none, the raw one,
    half of the cells against the other half, which a good prediction can pass. How far each split lies from its own
    floor and ceiling is in the table.

    Parameters
    ----------
    scores
        What :func:`virtualcell.tl.benchmark` returned, or several such tables with the same models.
    metrics
        Metrics to draw, one panel each; by default those of the usual six that are there.
    models
        Models to draw, from top to bottom; by default all that are not floor, the best in the first metric on top.
    axes
        As many axes as metrics (one may stand alone); a new figure by default.

    Returns
    -------
    Axes, or an array of them for several metrics.

    Raises
    ------
    KeyError
        For a metric or model that `scores` does not have.
    ValueError
        If `scores` is not a table of a benchmark, or there are not as many axes as metrics.

    Examples
    --------
    >>> scores = vc.tl.benchmark(
    ...     adata, ["Additive", "NoChange"], **design, splits={"new": {"contexts": ["type_3"]}}, suite=["mae"]
    ... )
    >>> ax = vc.pl.benchmark(scores)
    """
    if missing := [c for c in _NEEDED if c not in scores]:
        raise ValueError(f"scores lacks the columns {missing}: give what `vc.tl.benchmark` returned.")
    if not len(scores):
        raise ValueError("scores has no rows: give what `vc.tl.benchmark` returned.")
    if isinstance(metrics, str):
        raise TypeError(f"metrics={metrics!r} must be a list of names: [{metrics!r}].")
    there = list(dict.fromkeys(scores["metric"]))
    if metrics is None:
        metrics = [m for m in _DEFAULT if m in there] or there[:6]
    for metric in metrics:
        if metric not in there:
            raise unknown_name("metrics", metric, there, "Name it in the suite of `vc.tl.benchmark`.")
    runs = _runs(scores)
    names = list(dict.fromkeys(scores.loc[scores["source"] == "model", "model"]))
    if models is None:
        models = _best_first(runs, names, metrics[0])
    for model in models:
        if model not in set(scores["model"]):
            raise unknown_name("models", model, [*names, *set(scores["model"]) - set(names)])
    own_figure = axes is None
    axes = _axes(axes, len(metrics), len(models))
    for ax, metric in zip(axes, metrics, strict=True):
        _panel(ax, runs[runs["metric"] == metric], metric, models)
    asked = scores.loc[scores["source"] == "model", ["perturbation", "context"]]
    names, contexts = (sorted(set(asked[column]) - {ALL}) for column in asked)
    if own_figure and len(axes) > 1:
        figure = axes[0].get_figure(root=True)
        figure.suptitle(title(names, contexts), fontsize=axes[0].title.get_fontsize(), color=outside_text(axes[0]))
    else:
        write_title(axes[0], title(names, contexts))
    if not own_figure or len(axes) == 1:
        legend_below(axes[0], columns=3)
    else:
        _legend_of_figure(axes)
    return axes[0] if len(axes) == 1 else np.array(axes, dtype=object)


def _legend_of_figure(axes: Sequence[Axes]) -> None:
    """Put one legend under all panels, in as many columns as there is room for."""
    figure = axes[0].get_figure(root=True)
    named = {}
    for ax in axes:  # a panel may lack what another has
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    handles, labels = list(named.values()), list(named)
    for n in range(len(labels), 0, -1):
        legend = figure.legend(
            handles, labels, loc="outside lower center", ncol=n, frameon=False, fontsize="small", handletextpad=0.5,
            columnspacing=1.5, labelcolor=outside_text(axes[0]),
        )  # fmt: skip
        if n == 1 or legend.get_window_extent().width <= 0.97 * figure.bbox.width:
            return
        legend.remove()


def _runs(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean of each run: over perturbations, then over contexts."""
    run = ["split", "seed", "source", "model", "metric"]
    by_context = scores.groupby([*run, "context"], sort=False, observed=True)["value"].mean()
    return by_context.groupby(run, sort=False).mean().reset_index()


def _mean_of(runs: pd.DataFrame) -> pd.Series:
    """Mean of each model over splits, each counting the same."""
    return runs.groupby(["model", "split"])["value"].mean().groupby("model").mean()


def _best_first(runs: pd.DataFrame, names: Sequence[str], metric: str) -> list[str]:
    means = _mean_of(runs[(runs["metric"] == metric) & runs["model"].isin(names)]).reindex(names)
    return list(means.sort_values(ascending=metric in _LOSSES, kind="stable").index)


def _axes(axes: Axes | Sequence[Axes] | None, n: int, n_models: int) -> list[Axes]:
    if axes is None:
        columns = n if n <= 3 else 2 if n == 4 else 3
        rows = -(-n // columns)
        size = (1.5 + 2.5 * columns, (0.75 + 0.36 * max(n_models, 2)) * rows + 0.6)
        figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", sharey=True, squeeze=False)
        for ax in grid.ravel()[n:]:
            figure.delaxes(ax)
        return list(grid.ravel()[:n])
    given = list(np.ravel(axes))
    if len(given) != n:
        raise ValueError(f"axes holds {len(given)} axes for {n} metrics: give one for each, or name fewer metrics=.")
    return given


def _panel(ax: Axes, runs: pd.DataFrame, metric: str, models: Sequence[str]) -> None:
    splits = list(dict.fromkeys(runs["split"]))
    which = "mean over splits" if len(splits) > 1 else "mean over seeds"
    means, ink = _mean_of(runs), ink_of(ax)
    for row, model in enumerate(models):
        own = runs[runs["model"] == model]
        for i, split in enumerate(splits):
            values = np.sort(own.loc[own["split"] == split, "value"].to_numpy())
            # splits side by side, seeds of one spread a little so that equal ones show
            height = row + 0.5 * ((i + 0.5) / len(splits) - 0.5) + np.linspace(-0.05, 0.05, len(values) + 2)[1:-1]
            label = split if row == 0 and len(splits) > 1 else None
            colour = ink.visible(_COLOURS[i % len(_COLOURS)])
            ax.scatter(values, height, s=16, color=colour, alpha=0.85, lw=0.4, ec=ink.background, zorder=3, label=label)
        label, at = which if row == 0 else None, means.get(model, np.nan)
        ax.plot([at] * 2, [row - 0.33, row + 0.33], color=ink.foreground, lw=1.8, zorder=4, label=label)
    ax.set(ylim=(len(models) - 0.4, -0.6), yticks=range(len(models)))
    height = ax.get_window_extent().height * 72 / ax.get_figure(root=True).dpi / len(models)
    ax.set_yticklabels(models, fontsize=min(label_size() / LABEL_SIZE, max(0.9 * height, 4.0)))  # as rows have room
    name = _NAMES.get(metric, metric)
    ax.set_xlabel(name if metric in _NEUTRAL else f"{name} ({'←' if metric in _LOSSES else '→'} better)")
    floors = runs[(runs["source"] == "floor") & ~runs["model"].isin(models)]
    if len(floors):
        floors = floors[floors["model"] == _best_first(floors, floors["model"].unique(), metric)[0]]
    ceilings, (label, dashes) = _ceiling(runs)
    shown = runs[runs["model"].isin(models)]["value"].dropna()
    ends = np.array([*shown, *_mean_of(floors), *_mean_of(ceilings)])
    if ends.size:
        margin = 0.08 * np.ptp(ends) or 0.05
        ax.set_xlim(ends.min() - margin, ends.max() + margin)
    _band(ax, floors, _FLOOR, "floor", "best of the floor", (0, (1, 1.5)), upwards=metric in _LOSSES)
    _band(ax, ceilings, _CEILING, "ceiling", label, dashes, upwards=metric not in _LOSSES)
    ax.tick_params(axis="y", length=0)
    ax.locator_params(axis="x", nbins=5)
    despine(ax)


def _ceiling(runs: pd.DataFrame) -> tuple[pd.DataFrame, tuple[str, tuple]]:
    """Choose the corrected ceiling where the metric has one, and say how it is drawn."""
    there = set(runs.loc[runs["value"].notna(), "source"])
    source = next((s for s in _CEILINGS if s in there), "ceiling")
    return runs[runs["source"] == source], _CEILINGS[source]


def _band(ax: Axes, runs: pd.DataFrame, colour: str, name: str, label: str, dashes: tuple, *, upwards: bool) -> None:
    """Shade from the mean to the end of the axis, and write the name of the band at its foot."""
    if runs["value"].notna().any():
        at, ink = _mean_of(runs).mean(), ink_of(ax)
        visible = ink.visible(colour)
        ax.axvline(at, color=visible, lw=1.4, ls=dashes, zorder=1, label=label)
        ax.axvspan(at, ax.get_xlim()[upwards], color=visible, alpha=0.18, lw=0, zorder=0)
        ax.annotate(
            name, (at, 0), (2.5 if upwards else -2.5, 3), xycoords=("data", "axes fraction"),
            textcoords="offset points", rotation=90, ha="left" if upwards else "right", va="bottom",
            fontsize=0.9 * label_size(), color=ink.muted(0.8), zorder=1,
        )  # fmt: skip
