"""What many perturbations do to many genes, predicted and observed."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.image import AxesImage
from scipy.cluster.hierarchy import leaves_list, linkage

from virtualcell._errors import unknown_name
from virtualcell.pl._style import BLUE, GREY, VERMILLION, ink_of, write_title

_OBSERVED = "observed_"
_VALUES = {
    "log2_fold_change": "log$_2$ fold change of 1 + CP10k",
    "shrunken": "shrunken log$_2$ fold change",
}
_CELL, _SMALLEST, _LARGEST = 0.8, 3.5, 9.0  # share of a row that its name takes; sizes of names, points
_CLIPPED = 99  # percentile of the absolute changes at which colours end


def effect_heatmap(
    effects: pd.DataFrame,
    *,
    value: str = "log2_fold_change",
    n_genes: int = 40,
    n_perturbations: int = 60,
    axes: Axes | Sequence[Axes] | None = None,
) -> np.ndarray:
    """Draw changes as a heatmap, perturbations x genes, the observed ones beside the predicted ones.

    Rows and columns are ordered by average linkage of Euclidean distances over both tables, and both have the same
    order and the same colours, of which the background is zero.

    Parameters
    ----------
    effects
        Result of :func:`virtualcell.tl.effects`, with `observed=True` for two heatmaps.
    value
        Column to draw: "log2_fold_change" or "shrunken".
    n_genes
        Number of genes, those that change the most in any perturbation of either table.
    n_perturbations
        Number of perturbations, those that change the genes the most.
    axes
        Axes to draw in, one, or two for observed changes; a new figure by default.

    Returns
    -------
    The axes, (1,) or (2,): predicted, observed. The colour bar stands beside the last.

    Raises
    ------
    KeyError
        For an unknown column.
    ValueError
        For another number of axes than heatmaps, or fewer than one gene or perturbation.

    Examples
    --------
    >>> axes = vc.pl.effect_heatmap(vc.tl.effects(fitted, context="type_3"))
    """
    if value not in _VALUES or value not in effects:
        raise unknown_name("value", value, [v for v in _VALUES if v in effects], "Name a column of `vc.tl.effects`.")
    for argument, n in (("n_genes", n_genes), ("n_perturbations", n_perturbations)):
        if n < 1:
            raise ValueError(f"{argument}={n!r}: at least one is needed.")
    if effects.empty:
        raise ValueError("effects has no rows: there is nothing to draw. See `vc.tl.effects(adata, ...)`.")
    sides = [side for side in ("", _OBSERVED) if f"{side}{value}" in effects]
    tables = [effects.pivot(index="perturbation", columns="gene", values=f"{side}{value}") for side in sides]
    if tables[0].isna().all(axis=None):
        raise ValueError(f"value={value!r} is missing: the model knows no errors. Draw value='log2_fold_change'.")
    tables = _chosen(tables, n_genes, n_perturbations)
    axes = _axes(axes, tables)
    limit = max(float(np.nanpercentile(np.abs(np.concatenate(tables)), _CLIPPED)), 1e-6)
    for ax, table, side in zip(axes, tables, sides, strict=True):
        image = _draw(ax, table, limit)
        lacking = int(table.isna().all(axis=1).sum())
        note = f" ({lacking} not measured)" if lacking else ""
        context = effects.attrs.get("context")
        where = "" if context in (None, "(all)") else f", {context}"
        write_title(ax, ("observed" if side else "predicted") + where + note)
    for ax in axes[1:]:
        ax.tick_params(labelleft=False)
    figure = axes[0].get_figure(root=True)
    figure.colorbar(image, ax=axes[-1], label=_VALUES[value], extend="both", fraction=0.05, pad=0.02)
    figure.draw_without_rendering()  # a layout engine sizes the axes only now
    for ax in axes:
        _fit_names(ax, *tables[0].shape)
    return axes


def _chosen(tables: list[pd.DataFrame], n_genes: int, n_perturbations: int) -> list[pd.DataFrame]:
    """Return the rows and columns that change the most, in the order of their clusters."""
    largest = pd.concat([t.abs() for t in tables])
    genes = largest.max().sort_values(ascending=False, kind="stable").index[:n_genes]
    # by what was predicted for them, which there is for all
    size = np.square(tables[0][genes]).sum(axis=1).sort_values(ascending=False, kind="stable")
    names = size.index[:n_perturbations]
    both = np.concatenate([t.loc[names, genes].fillna(0).to_numpy() for t in tables], axis=1)
    by_gene = np.concatenate([t.loc[names, genes].fillna(0).to_numpy() for t in tables], axis=0).T
    rows, columns = names[_clustered(both)], genes[_clustered(by_gene)]
    return [t.loc[rows, columns] for t in tables]


def _clustered(rows: np.ndarray) -> np.ndarray:
    """Order rows so that similar ones are neighbours."""
    if len(rows) < 3:
        return np.arange(len(rows))
    return leaves_list(linkage(rows, method="average", metric="euclidean", optimal_ordering=True))


def _axes(axes: Axes | Sequence[Axes] | None, tables: list[pd.DataFrame]) -> np.ndarray:
    n, (n_rows, n_columns) = len(tables), tables[0].shape
    if axes is None:
        size = (1.6 + n * max(2.2, 0.16 * n_columns), max(2.4, 1.4 + 0.16 * n_rows))
        return np.atleast_1d(plt.subplots(1, n, figsize=size, layout="constrained")[1])
    axes = np.atleast_1d(axes).ravel()
    if len(axes) != n:
        raise ValueError(f"axes= holds {len(axes)} axes for {n} heatmaps: give {n}, or leave it out.")
    return axes


def _draw(ax: Axes, table: pd.DataFrame, limit: float) -> AxesImage:
    """Draw one heatmap; what is missing is grey."""
    ink = ink_of(ax)
    ends = [ink.visible(BLUE), ink.background, ink.visible(VERMILLION)]
    colours = LinearSegmentedColormap.from_list("change", ends).with_extremes(bad=ink.visible(GREY))
    values = np.ma.masked_invalid(table.to_numpy(dtype=float))
    image = ax.imshow(values, cmap=colours, vmin=-limit, vmax=limit, aspect="auto", interpolation="none")
    ax.set_yticks(np.arange(len(table)), [str(name) for name in table.index])
    ax.set_xticks(np.arange(table.shape[1]), [str(gene) for gene in table.columns], rotation=90)
    ax.tick_params(length=0)
    return image


def _fit_names(ax: Axes, n_rows: int, n_columns: int) -> None:
    """Make names as large as rows and columns allow."""
    frame, points = ax.get_window_extent(), 72 / ax.get_figure(root=True).dpi
    for labels, room in (
        (ax.get_yticklabels(), frame.height / n_rows),
        (ax.get_xticklabels(), frame.width / n_columns),
    ):
        for label in labels:
            label.set_fontsize(float(np.clip(_CELL * room * points, _SMALLEST, _LARGEST)))
