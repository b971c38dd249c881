"""Which perturbation is trained on and which is held out, in which context."""

from __future__ import annotations

import math
from typing import Unpack

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.patches import Patch
from mudata import MuData

from virtualcell import _keys
from virtualcell._errors import unknown_name
from virtualcell.data._design import OF_LABELS, only_stated
from virtualcell.data._design_arguments import LabelArguments, takes_design
from virtualcell.data._labels import expression_modality, read_labels
from virtualcell.data._results import ours
from virtualcell.data._screen import Screen
from virtualcell.pl._common import observed_design, title
from virtualcell.pl._style import ORANGE, VERMILLION, axes_or_new, ink_of, label_size, legend_beside, write_title

_COLOURS = dict(zip(_keys.SPLITS, ("#A9D5F0", ORANGE, VERMILLION), strict=True))
_LINE = 1.1  # room that a line of text needs, in units of its size


@takes_design('they are then as the split, or else another call, noted them in `uns["virtualcell"]`', LabelArguments)
def split(
    adata: AnnData | MuData,
    *,
    split_key: str = _keys.SPLIT,
    modality: str = "rna",
    library_size_key: str | None = None,
    ax: Axes | None = None,
    **stated: Unpack[LabelArguments],
) -> Axes:
    """Draw perturbations x contexts, coloured by the part of the split, with the number of cells in each tile.

    A tile whose cells belong to several parts is divided in their proportion. The control is the first row. Where
    the rows are lower than a line of text, only every so many are named and the numbers are left out.

    Parameters
    ----------
    adata
        Cells with `obs[split_key]`, as :func:`virtualcell.pp.split` writes it.
    split_key
        Column of `obs` with the part of each cell: train, val or test.
    modality
        Modality of a MuData that holds gene expression.
    library_size_key
        Column of `obs` with the library size, which plays no part here: a whole design can be passed.
    ax
        Axes to draw in; a new figure, as high as the list is long, by default.
    **stated
        The design, where it is not noted in the data. The batch plays no part.

    Returns
    -------
    Axes
        The axes; tile (i, j) lies at x in [j, j + 1], y in [i, i + 1].

    Raises
    ------
    UnknownNameError
        If a column is not in `obs`, or the split has parts other than train, val and test.

    Examples
    --------
    >>> vc.pp.split(adata, **design, holdout={"contexts": ["type_3"]})
    >>> ax = vc.pl.split(adata, **design)
    """
    manifest = ours(expression_modality(adata, modality)).get(_keys.SPLIT_MANIFEST, {}).get(split_key, {})
    of_split = {k: manifest[k] for k in OF_LABELS if k in manifest}
    labels = of_split | only_stated({**stated, "library_size_key": library_size_key})
    # what a split does not say of its labels is not what some later call noted
    design = observed_design(adata, modality, labels, noted=not of_split)
    screen = Screen.from_anndata(adata, design, modality=modality)
    part = read_labels(adata, split_key, argument="split_key", modality=modality)
    for name in set(part) - set(_COLOURS):
        raise unknown_name(f"obs[{split_key!r}]", name, _COLOURS, "A split has these parts and no other.")
    parts = [p for p in _COLOURS if (part == p).any()]
    written = np.asarray(screen.spelled(screen.perturbation))
    counts = pd.crosstab([written, np.asarray(screen.context)], part.to_numpy())
    counts = counts.reindex(columns=parts)
    of_control = screen.spelled([design.control] if screen.is_control.any() else [])
    rows = [*of_control, *sorted(screen.spelled(screen.perturbation_names))]
    columns = screen.context_names

    size = (2.6 + 0.8 * len(columns), float(np.clip(1.2 + 0.2 * len(rows), 2.4, 9)))
    ax = axes_or_new(ax, figsize=size)
    ink = ink_of(ax)
    y = pd.Index(rows).get_indexer(counts.index.get_level_values(0))
    x = pd.Index(columns).get_indexer(counts.index.get_level_values(1))
    total = counts.to_numpy().sum(axis=1)
    edges = np.column_stack([np.zeros(len(total)), counts.to_numpy().cumsum(axis=1) / total[:, None]])
    for i, name in enumerate(parts):
        ax.add_collection(_tiles(x + edges[:, i], x + edges[:, i + 1], y, _COLOURS[name], ink.background))
    ax.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
    for column in range(1, len(columns)):
        ax.axvline(column, color=ink.background, lw=3)
    if of_control:
        ax.axhline(1, color=ink.foreground, lw=1.2)

    tilted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if len(columns) > 1 else {}
    ax.set_xticks(np.arange(len(columns)) + 0.5, columns, **tilted)
    ax.set_xlabel(design.context_key or "")
    ax.set_ylabel(design.perturbation_key)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    handles = [Patch(color=_COLOURS[p], label=f"{p} ({int(counts[p].sum()):,} cells)") for p in parts]
    legend_beside(ax, handles)
    write_title(ax, title(screen.perturbation_names, columns))
    _write_names(ax, rows, y, x, total)
    return ax


def _write_names(ax: Axes, rows: list[str], y: np.ndarray, x: np.ndarray, total: np.ndarray) -> None:
    """Name the rows and write the numbers of cells into their tiles, as far as there is room for text."""
    ax.get_figure(root=True).draw_without_rendering()  # a layout engine sizes the axes only now
    height = ax.get_window_extent().height * 72 / ax.get_figure(root=True).dpi / len(rows)
    step = math.ceil(_LINE * label_size() / height)
    named = np.arange(0, len(rows), step)
    ax.set_yticks(named + 0.5, [rows[i] for i in named], fontsize=label_size())
    if step == 1:
        for i, j, n in zip(y, x, total, strict=True):
            # tiles have the same light colours in every style
            ax.text(j + 0.5, i + 0.5, f"{n:,}", ha="center", va="center", fontsize=0.95 * label_size(), color="black")


def _tiles(
    left: np.ndarray, right: np.ndarray, row: np.ndarray, colour: str, edge: tuple[float, float, float]
) -> PolyCollection:
    """Return one rectangle per row that has a width; thousands of tiles are one artist so."""
    wide = right > left
    left, right, row = left[wide], right[wide], row[wide]
    corners = [(left, row), (right, row), (right, row + 1), (left, row + 1)]
    return PolyCollection(
        np.stack([np.column_stack(c) for c in corners], axis=1), facecolor=colour, edgecolor=edge, lw=0.5
    )
