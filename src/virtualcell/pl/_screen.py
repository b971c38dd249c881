"""Perturbations ranked by a screen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from virtualcell._errors import unknown_name
from virtualcell.pl._style import (
    BLUE,
    GREEN,
    ORANGE,
    VERMILLION,
    axes_or_new,
    despine,
    ink_of,
    legend_below,
    place_labels,
    write_title,
)

_MOST_ROWS = 60  # perturbations that have a row of their own
_MEASURED = {
    "here": (BLUE, "measured here"),
    "elsewhere": (GREEN, "measured elsewhere"),
    "somewhere": (ORANGE, "measured"),
    "no": (VERMILLION, "not measured"),
}
_SCORES = {
    "effect": "effect: root mean square log$_2$ fold change",
    "toward": "progress toward the target",
    "own": "score",
}
_ROW, _SMALLEST, _LARGEST = 0.72, 3.5, 10.0  # share of a row that its name takes; sizes of names, points


def screen(table: pd.DataFrame, *, n_labels: int = 20, highlight: Sequence[str] = (), ax: Axes | None = None) -> Axes:
    """Draw the scores of a screen from the largest to the smallest, with error bars of one standard error.

    Up to 60 perturbations have a row each, with its name. Of more, the scores are drawn against their rank, and the
    largest are named.

    Parameters
    ----------
    table
        Result of :func:`virtualcell.tl.screen`.
    n_labels
        Number of perturbations to name where there are more than 60. A name that finds no room in the axes is left out,
        which the log counts; 40 have room in a figure of the default size.
    highlight
        Perturbations to name beside these, in bold.
    ax
        Axes to draw in; a new figure by default.

    Returns
    -------
    Axes
        The axes; colours say what the model has learned from.

    Raises
    ------
    KeyError
        For a perturbation to highlight that is not in the table, or a table without scores.

    Examples
    --------
    >>> ax = vc.pl.screen(vc.tl.screen(fitted, context="type_3"))
    """
    if missing := [c for c in ("score", "score_error", "measured") if c not in table]:
        raise unknown_name("table", missing[0], table.columns, "Give what `vc.tl.screen` returned.")
    if lacking := [name for name in highlight if name not in table.index]:
        raise unknown_name("highlight", lacking[0], table.index, "Name perturbations of the screen.")
    table = table.sort_values("score", ascending=False, kind="stable")
    in_rows = len(table) <= _MOST_ROWS
    ax = axes_or_new(ax, figsize=(5.2, max(2.4, 1.6 + 0.17 * len(table))) if in_rows else (6.5, 4.6))
    ink = ink_of(ax)
    score, error = table["score"].to_numpy(), table["score_error"].fillna(0).to_numpy()
    rank = np.arange(1, len(table) + 1)
    for kind, (colour, label) in reversed(_MEASURED.items()):  # few are measured of many: they lie on top
        rows = (table["measured"] == kind).to_numpy()
        if not rows.any():
            continue
        x, y, bars = (score, rank, "xerr") if in_rows else (rank, score, "yerr")
        ax.errorbar(
            x[rows], y[rows], **{bars: error[rows]}, fmt="o", ms=4.5 if in_rows else 2.5, lw=0, elinewidth=1.1,
            color=ink.visible(colour), alpha=1 if in_rows else 0.6, label=f"{label} ({rows.sum():,})",
        )  # fmt: skip
    kind = table.attrs.get("objective", "own")
    context = table.attrs.get("context")
    named = "" if context in (None, "(all)") else f", {context}"
    write_title(ax, f"Screen of {len(table):,} perturbations{named}")
    (ax.axvline if in_rows else ax.axhline)(0, color=ink.muted(0.35), lw=0.8, zorder=0)
    despine(ax)
    (ax.set_xlabel if in_rows else ax.set_ylabel)(_SCORES[kind])
    if in_rows:
        _name_rows(ax, table.index, highlight)
        legend_below(ax, columns=2)
        return ax
    ax.set_xscale("log")  # or the first, which matter, stand on one spot
    ax.set_xlabel("rank")
    ax.margins(x=0.03, y=0.12)
    legend_below(ax, columns=3)
    chosen = np.union1d(np.arange(min(n_labels, len(table))), table.index.get_indexer(list(highlight))).astype(int)
    points = np.column_stack([rank, score])
    few = points[:: max(len(points) // 500, 1)]
    place_labels(ax, points[chosen], list(table.index[chosen]), avoid=few, bold=set(highlight))
    return ax


def _name_rows(ax: Axes, names: pd.Index, highlight: Sequence[str]) -> None:
    """Write the name of each perturbation at its row, as large as the rows allow."""
    ax.set_ylim(len(names) + 0.6, 0.4)
    ax.set_yticks(np.arange(1, len(names) + 1), list(names))
    ax.get_figure(root=True).draw_without_rendering()  # a layout engine sizes the axes only now
    height = ax.get_window_extent().height * 72 / ax.get_figure(root=True).dpi / len(names)
    for label in ax.get_yticklabels():
        label.set_fontsize(float(np.clip(_ROW * height, _SMALLEST, _LARGEST)))
        label.set_fontweight("bold" if label.get_text() in set(highlight) else "normal")
    ax.tick_params(axis="y", length=0)
