"""Colours, new axes, and labels that do not collide."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import matplotlib.patheffects as effects
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Annotation, Text
from matplotlib.transforms import offset_copy

logger = logging.getLogger(__name__)

# Okabe & Ito (2008), distinct under the common colour vision deficiencies.
GREY, BLACK, ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE = (
    "#999999", "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
CONTROL, OBSERVED, PREDICTED = GREY, BLUE, VERMILLION

_LABEL_SIZE = 8.5  # points
_ANGLES = np.deg2rad([20, -20, 160, -160, 90, -90, 50, -50, 130, -130, 0, 180])
_RADII = np.array([4, 10, 18, 28, 40, 55, 75, 100])  # points between the mark and the edge of its label


def axes_or_new(ax: Axes | None, *, figsize: tuple[float, float]) -> Axes:
    """Return `ax`, or the axes of a new figure."""
    return plt.subplots(figsize=figsize, layout="constrained")[1] if ax is None else ax


def despine(ax: Axes) -> None:
    """Take away the frame's top and right."""
    ax.spines[["top", "right"]].set_visible(False)


def legend_below(ax: Axes, *, columns: int) -> None:
    """Put the legend under the axes, where it covers no data, in fewer columns where they are narrow."""
    # In points, so that low axes keep their tick labels and axis label clear of it too.
    below = offset_copy(ax.transAxes, ax.get_figure(root=True), y=-36, units="points")
    for n in range(columns, 0, -1):
        legend = ax.legend(
            loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, ncol=n, frameon=False, fontsize=9,
            handletextpad=0.5, columnspacing=1.5,
        )  # fmt: skip
        # A layout engine would squeeze the axes to the width that a wider legend leaves them.
        if legend.get_window_extent().width <= 1.15 * ax.get_window_extent().width:
            return


def place_labels(
    ax: Axes, points: np.ndarray, texts: Sequence[str], *, avoid: np.ndarray | None = None
) -> list[Annotation]:
    """Write each text beside its point: no two boxes overlap, all lie inside the axes, few of `avoid` are covered.

    Call this last, since whatever moves the axes or their limits later moves the points away from under their labels.
    A text for which there is no room is left out and counted in the log. `points` and `avoid` are (n, 2), data units.
    """
    figure = ax.get_figure(root=True)
    figure.draw_without_rendering()  # a layout engine sizes the axes only now
    pixels = figure.dpi / 72
    frame = ax.get_window_extent()
    anchors = ax.transData.transform(np.reshape(points, (-1, 2)))
    marks = anchors if avoid is None else np.vstack([ax.transData.transform(avoid), np.repeat(anchors, 5, axis=0)])
    taken = [Text.get_window_extent(t).extents for t in ax.texts if t.get_text()]
    if ax.get_legend() is not None:
        taken.append(ax.get_legend().get_window_extent().extents)

    radius, angle = (a.ravel() for a in np.meshgrid(_RADII * pixels, _ANGLES, indexing="ij"))
    direction = np.column_stack([np.cos(angle), np.sin(angle)])
    placed = []
    for anchor, text in zip(anchors, texts, strict=True):
        half = _text_size(ax, text) / 2 + pixels
        centre = anchor + direction * (radius[:, None] + half)
        boxes = np.hstack([centre - half, centre + half])  # (candidates, x0 y0 x1 y1)
        leaders = anchor + np.linspace(0, 1, 12)[:, None, None] * (centre - anchor)  # (12, candidates, 2)
        free = (boxes[:, :2] >= frame.min).all(1) & (boxes[:, 2:] <= frame.max).all(1)
        crossed = np.zeros(len(boxes))
        for x0, y0, x1, y1 in taken:
            free &= (boxes[:, 2] < x0) | (boxes[:, 0] > x1) | (boxes[:, 3] < y0) | (boxes[:, 1] > y1)
            crossed += ((leaders > (x0, y0)) & (leaders < (x1, y1))).all(-1).any(0)
        if not free.any():
            continue
        covered = ((marks > boxes[:, None, :2]) & (marks < boxes[:, None, 2:])).all(-1).sum(1)
        best = np.flatnonzero(free)[np.argmin((covered + 20 * crossed + radius / pixels / 6)[free])]
        taken.append(boxes[best])
        marks = np.vstack([marks, np.repeat(leaders[:, best], 3, axis=0)])
        placed.append(
            ax.annotate(
                text, ax.transData.inverted().transform(anchor), (centre[best] - anchor) / pixels,
                textcoords="offset points", ha="center", va="center", fontsize=_LABEL_SIZE, zorder=5,
                path_effects=[effects.withStroke(linewidth=2, foreground="white")],
                arrowprops={"arrowstyle": "-", "lw": 0.6, "color": "0.35", "shrinkA": 0, "shrinkB": 1},
            )
        )  # fmt: skip
    if len(placed) < len(texts):
        logger.info("%d of %d labels found no room; give a larger `ax`.", len(texts) - len(placed), len(texts))
    return placed


def _text_size(ax: Axes, text: str) -> np.ndarray:
    """Measure a label in pixels, (width, height)."""
    probe = ax.text(0, 0, text, fontsize=_LABEL_SIZE)
    size = np.array(probe.get_window_extent().size)
    probe.remove()
    return size
