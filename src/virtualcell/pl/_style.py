"""Colours, new axes, and labels that do not collide."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import matplotlib.patheffects as effects
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.text import Annotation, Text
from matplotlib.transforms import offset_copy

logger = logging.getLogger(__name__)

# Okabe & Ito (2008), distinct under the common colour vision deficiencies.
GREY, BLACK, ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE = (
    "#999999", "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
CONTROL, OBSERVED, PREDICTED = GREY, BLUE, VERMILLION

LABEL_SIZE, LEGEND_SIZE = 0.85, 0.9  # of the size of the style's text
_LEAST_CONTRAST, _CONTRAST_OF_TEXT = 2.0, 4.5
_ANGLES = np.deg2rad([20, -20, 160, -160, 90, -90, 50, -50, 130, -130, 0, 180])
_RADII = np.array([4, 10, 18, 28, 40, 55, 75, 100])  # points between the mark and the edge of its label


def axes_or_new(ax: Axes | None, *, figsize: tuple[float, float]) -> Axes:
    """Return `ax`, or the axes of a new figure."""
    return plt.subplots(figsize=figsize, layout="constrained")[1] if ax is None else ax


def despine(ax: Axes) -> None:
    """Take away the frame's top and right."""
    ax.spines[["top", "right"]].set_visible(False)


@dataclass(frozen=True)
class Ink:
    """Colours that the style of some axes asks for, as (red, green, blue).

    Parameters
    ----------
    background
        What points and text inside of the axes stand on.
    foreground
        Text and lines on it: the colour of the axes' labels, or black or white where that could not be read.
    """

    background: tuple[float, float, float]
    foreground: tuple[float, float, float]

    def muted(self, share: float = 0.6) -> tuple[float, float, float]:
        """Return the colour of what is to stand back: so much of the foreground, and the rest background."""
        return _mixed(self.foreground, self.background, share)

    def visible(self, colour: object) -> tuple[float, float, float]:
        """Return a colour, mixed with so much of the foreground that it can be told from the background."""
        if colour == BLACK:  # stands for ink
            return self.foreground
        steps = (_mixed(self.foreground, to_rgb(colour), share) for share in np.linspace(0, 1, 21))
        return next((c for c in steps if contrast(c, self.background) >= _LEAST_CONTRAST), self.foreground)


def ink_of(ax: Axes) -> Ink:
    """Return the colours for what is drawn into these axes."""
    background = (1.0, 1.0, 1.0)
    for layer in (ax.get_figure(root=True).get_facecolor(), ax.get_facecolor()):
        *colour, alpha = to_rgba(layer)
        background = _mixed(tuple(colour), background, alpha)
    wanted = to_rgb(ax.xaxis.label.get_color())
    if contrast(wanted, background) < _CONTRAST_OF_TEXT:
        wanted = max(((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), key=lambda c: contrast(c, background))
    return Ink(background, wanted)


def contrast(one: object, other: object) -> float:
    """Contrast of two colours by the accessibility guidelines of the web, from 1, none, to 21, black on white."""
    dark, light = sorted(_luminance(to_rgb(c)) for c in (one, other))
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: tuple[float, float, float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def _mixed(one: Sequence[float], other: Sequence[float], share: float) -> tuple[float, float, float]:
    red, green, blue = (share * a + (1 - share) * b for a, b in zip(one, other, strict=True))
    return red, green, blue


def balanced_alphas(sizes: Sequence[int]) -> list[float]:
    """Return how opaque the points of each class are: the fewer, the more, so that large classes do not bury small."""
    fewest = min((n for n in sizes if n), default=1)
    return [float(np.clip(0.85 * (fewest / max(n, 1)) ** (1 / 3), 0.35, 0.85)) for n in sizes]


def write_title(ax: Axes, text: str) -> None:
    """Write a title whose lines are broken where the axes end, in smaller letters where it has several."""
    several = "\n" in text
    title = ax.set_title(text)
    size = title.get_fontsize() * (0.85 if several else 1.0)
    title.set_fontsize(size)
    width = title.get_window_extent().width
    room = 1.05 * ax.get_window_extent().width
    if width > room:
        longest = max(map(len, text.split("\n")))
        most = max(12, int(longest * room / width))
        broken = [piece for line in text.split("\n") for piece in textwrap.wrap(line, most, break_long_words=False)]
        title.set_text("\n".join(broken))
        title.set_fontsize(0.85 * size if not several else size)


def legend_below(ax: Axes, *, columns: int, title: str | None = None) -> None:
    """Put the legend under the axes, where it covers no data, in fewer columns or smaller where they are narrow."""
    # In points, so that low axes keep their tick labels and axis label clear of it too.
    size = LEGEND_SIZE * _font_size()
    figure = ax.get_figure(root=True)
    if not _has_room_around(ax):
        _legend_inside(ax, title=title)
        return
    below = offset_copy(ax.transAxes, figure, y=-3.6 * _font_size(), units="points")
    for n in range(columns, 0, -1):
        legend = ax.legend(
            loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, ncol=n, frameon=False, fontsize=size,
            handletextpad=0.5, columnspacing=1.5, labelcolor=outside_text(ax), title=title, title_fontsize=size,
        )  # fmt: skip
        legend.get_title().set_color(outside_text(ax))
        # A layout engine would squeeze the axes to the width that a wider legend leaves them.
        share = legend.get_window_extent().width / (1.15 * ax.get_window_extent().width)
        if share <= 1:
            return
    for text in (*legend.get_texts(), legend.get_title()):
        text.set_fontsize(max(size / share, 0.6 * size))


def legend_beside(ax: Axes, handles: Sequence[Artist]) -> None:
    """Put the legend at the right of the axes, or into them where it would cover others."""
    if not _has_room_around(ax):
        _legend_inside(ax, handles=handles)
        return
    ax.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=LEGEND_SIZE * _font_size(),
        labelcolor=outside_text(ax),
    )  # fmt: skip


def _has_room_around(ax: Axes) -> bool:
    """Whether something makes room for what stands beside the axes, or nothing else is there."""
    figure = ax.get_figure(root=True)
    return figure.get_layout_engine() is not None or len(figure.axes) == 1


def _legend_inside(ax: Axes, *, title: str | None = None, **handles: Sequence[Artist]) -> None:
    size, ink = 0.85 * LEGEND_SIZE * _font_size(), ink_of(ax)
    legend = ax.legend(
        loc="best", fontsize=size, labelcolor=ink.foreground, facecolor=ink.background, framealpha=0.7,
        edgecolor="none", title=title, title_fontsize=size, **handles,
    )  # fmt: skip
    legend.get_title().set_color(ink.foreground)


def outside_text(ax: Axes) -> str:
    """Return the colour of text around the axes, as their style has it."""
    return ax.xaxis.label.get_color()


def label_size() -> float:
    """Points of the names of genes and other text inside of the axes."""
    return LABEL_SIZE * _font_size()


def _font_size() -> float:
    """Points of the style's text, to which all others are in proportion."""
    return mpl.rcParams["font.size"]


def place_labels(
    ax: Axes,
    points: np.ndarray,
    texts: Sequence[str],
    *,
    avoid: np.ndarray | None = None,
    bold: Collection[str] = (),
) -> list[Annotation]:
    """Write each text beside its point: no two boxes overlap, all lie inside the axes, few of `avoid` are covered.

    Where the figure is drawn with axes of another size or other limits, they are placed again. A text for which there
    is no room is left out and counted in the log. `points` and `avoid` are (n, 2), data units.
    """
    ax.get_figure(root=True).draw_without_rendering()  # a layout engine sizes the axes only now
    ink, points = ink_of(ax), np.reshape(points, (-1, 2))
    labels = [
        ax.annotate(
            text, point, (0, 0), textcoords="offset points", ha="center", va="center", fontsize=label_size(), zorder=5,
            color=ink.foreground, path_effects=[effects.withStroke(linewidth=2, foreground=ink.background)],
            fontweight="bold" if text in bold else "normal", in_layout=False,
            arrowprops={"arrowstyle": "-", "lw": 0.6, "color": ink.muted(0.65), "shrinkA": 0, "shrinkB": 1},
        )
        for point, text in zip(points, texts, strict=True)
    ]  # fmt: skip
    placing = _Placing(ax, labels, points if avoid is None else np.vstack([avoid, *[points] * 5]))
    placing.place()
    placed = [label for label in labels if label.get_visible()]
    for label in labels:
        if label not in placed:
            label.remove()
    if len(placed) < len(texts):
        logger.info("%d of %d labels found no room; give a larger `ax`.", len(texts) - len(placed), len(texts))
    placing.labels = placed
    ax.add_artist(placing)
    return placed


class _Placing(Artist):
    """Draws nothing, but finds places for labels whenever axes are drawn otherwise than they were before.

    Parameters
    ----------
    ax
        The axes.
    labels
        Annotations of points, whose offsets are found.
    avoid
        What not to cover, (n, 2), data units.
    """

    def __init__(self, ax: Axes, labels: list[Annotation], avoid: np.ndarray) -> None:
        super().__init__()
        self.set(zorder=-1, in_layout=False)  # drawn before the labels
        self.ax, self.labels, self.avoid = ax, labels, avoid
        self._seen = np.empty(0)

    def draw(self, renderer: RendererBase) -> None:
        """Find places again, if the axes have another size or other limits."""
        if not np.array_equal(self._seen, self._look()):
            self.place(renderer)

    def _look(self) -> np.ndarray:
        """Size, in points, and limits of the axes, on which places depend; resolutions do not matter."""
        size = np.array(self.ax.get_window_extent().size) * 72 / self.ax.get_figure(root=True).dpi
        return np.array([*size.round(1), *self.ax.viewLim.extents])

    def place(self, renderer: RendererBase | None = None) -> None:
        """Find a place for each label; those without one are not seen."""
        ax, pixels = self.ax, self.ax.get_figure(root=True).dpi / 72
        frame, marks = ax.get_window_extent(), ax.transData.transform(self.avoid)
        taken = [Text.get_window_extent(t, renderer).extents for t in ax.texts if t.get_text() and t not in self.labels]
        if ax.get_legend() is not None:
            taken.append(ax.get_legend().get_window_extent(renderer).extents)
        radius, angle = (a.ravel() for a in np.meshgrid(_RADII * pixels, _ANGLES, indexing="ij"))
        direction = np.column_stack([np.cos(angle), np.sin(angle)])
        for label in self.labels:
            label.set_visible(True)  # text that is not has no size
            anchor = ax.transData.transform(label.xy)
            half = np.array(Text.get_window_extent(label, renderer).size) / 2 + pixels
            centre = anchor + direction * (radius[:, None] + half)
            boxes = np.hstack([centre - half, centre + half])  # (candidates, x0 y0 x1 y1)
            leaders = anchor + np.linspace(0, 1, 12)[:, None, None] * (centre - anchor)  # (12, candidates, 2)
            free = (boxes[:, :2] >= frame.min).all(1) & (boxes[:, 2:] <= frame.max).all(1)
            crossed = np.zeros(len(boxes))
            for x0, y0, x1, y1 in taken:
                free &= (boxes[:, 2] < x0) | (boxes[:, 0] > x1) | (boxes[:, 3] < y0) | (boxes[:, 1] > y1)
                crossed += ((leaders > (x0, y0)) & (leaders < (x1, y1))).all(-1).any(0)
            if not free.any():
                label.set_visible(False)
                continue
            covered = ((marks > boxes[:, None, :2]) & (marks < boxes[:, None, 2:])).all(-1).sum(1)
            best = np.flatnonzero(free)[np.argmin((covered + 20 * crossed + radius / pixels / 6)[free])]
            taken.append(boxes[best])
            marks = np.vstack([marks, np.repeat(leaders[:, best], 3, axis=0)])
            label.set_position((centre[best] - anchor) / pixels)
        self._seen = self._look()
