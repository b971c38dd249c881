"""Draw what the page "How it works" explains: sets of cells, the sentence of a cell, the mixture and its verdict.

python scripts/concept_figures.py docs/_static
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

# Okabe & Ito (2008), distinct under the common colour vision deficiencies; those of the plots of the package
CONTROL, OBSERVED, PREDICTED, GREEN = "#999999", "#0072B2", "#D55E00", "#009E73"
INK, QUIET, LIGHT, EDGE = "#222222", "#666666", "#F3F3F3", "#BBBBBB"


def canvas(width: float, height: float) -> Axes:
    """Make axes in units of a tenth of an inch, without frame or ticks."""
    figure = plt.figure(figsize=(width / 10, height / 10))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(0, height))
    ax.axis("off")
    return ax


def box(ax: Axes, x: float, y: float, width: float, height: float, title: str, text: str = "") -> None:
    """Draw a frame with a title and a line or two below it."""
    style = {"boxstyle": "round,pad=0,rounding_size=1", "facecolor": LIGHT, "edgecolor": EDGE}
    ax.add_patch(FancyBboxPatch((x, y), width, height, **style))
    middle = y + height / 2
    ax.text(x + width / 2, middle + (1.5 if text else 0), title, ha="center", va="center", weight="bold", fontsize=11)
    if text:
        ax.text(x + width / 2, middle - 1.4, text, ha="center", va="center", fontsize=9, color=QUIET)


def arrow(
    ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK, style: str = "-|>"
) -> None:
    """Draw an arrow."""
    how = {"arrowstyle": style, "mutation_scale": 13, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.6}
    ax.add_patch(FancyArrowPatch(start, end, color=colour, **how))


def cells(ax: Axes, x: float, y: float, colour: str, *, tilt: float = 0.0, seed: int = 0) -> None:
    """Draw a set of cells around a point."""
    rng = np.random.default_rng(seed)
    places = rng.normal(size=(200, 2)) * (4.2, 2.4)
    kept: list[np.ndarray] = []
    for place in places:  # cells that do not touch
        if np.hypot(*(place / (9, 6))) < 1 and all(np.hypot(*(place - other)) > 1.9 for other in kept):
            kept.append(place)
    dots = np.array(kept)
    turned = dots @ np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
    ax.scatter(x + turned[:, 0], y + turned[:, 1], s=62, color=colour, edgecolor="white", linewidth=0.8)


def draw_sets() -> Axes:
    """Draw how control cells become perturbed cells, which training compares with real ones."""
    ax = canvas(84, 35.5)
    ax.set_ylim(-1.5, 34)
    cells(ax, 12, 21, CONTROL, seed=1)
    cells(ax, 72, 22.3, PREDICTED, tilt=0.3, seed=1)
    cells(ax, 72, 6.2, OBSERVED, tilt=0.2, seed=2)
    box(ax, 31, 15.5, 22, 11, "ST", "attention between the cells")
    box(ax, 31, 29, 22, 4.5, "perturbation: STAT1")
    arrow(ax, (23, 21), (30.4, 21))
    arrow(ax, (53.6, 21), (61, 21))
    arrow(ax, (42, 29), (42, 27.2))
    arrow(ax, (72, 15), (72, 12.2), QUIET, "<|-|>")
    ax.text(12, 29.5, "control cells", ha="center", fontsize=10, color=QUIET)
    ax.text(72, 30.5, "predicted cells", ha="center", fontsize=10, color=PREDICTED)
    ax.text(61.5, 6.2, "real perturbed cells\n(training only)", ha="right", va="center", fontsize=10, color=OBSERVED)
    ax.text(70.6, 13.6, "energy distance", ha="right", va="center", fontsize=9, color=QUIET)
    return ax


def draw_sentence() -> Axes:
    """Draw the genes of a cell in order of expression, which a transformer reads into a vector."""
    ax = canvas(84, 30)
    genes, level = ["B2M", "ACTB", "ISG15", "STAT1", "CD3E", "IL7R"], np.array([6.0, 5.1, 4.2, 2.6, 1.8, 1.2])
    colours = plt.get_cmap("cividis")(np.linspace(0.1, 0.9, 12))
    rng = np.random.default_rng(3)
    for i, (gene, height) in enumerate(zip(genes, level, strict=True)):
        x = 3 + 6.6 * i
        ax.add_patch(Rectangle((x + 1.1, 18.5), 3.2, height * 1.25, color=CONTROL))
        style = {"boxstyle": "round,pad=0,rounding_size=0.6", "facecolor": LIGHT, "edgecolor": EDGE}
        ax.add_patch(FancyBboxPatch((x, 13), 5.6, 3.6, **style))
        ax.text(x + 2.8, 14.8, gene, ha="center", va="center", fontsize=9, weight="bold")
        for k, shade in enumerate(rng.permutation(12)[:6]):
            ax.add_patch(Rectangle((x + 1.7, 4.4 + 1.25 * k), 2.2, 1.15, color=colours[shade]))
    ax.text(3, 28, "expression, in order", fontsize=10, color=QUIET)
    ax.text(22, 1.5, "a vector for each gene (ESM-2, or co-expression)", ha="center", fontsize=10, color=QUIET)
    arrow(ax, (43.5, 14.8), (48.4, 14.8))
    box(ax, 49, 9.5, 15, 10.5, "SE", "transformer")
    arrow(ax, (64.6, 14.8), (69.5, 14.8))
    for k, shade in enumerate(rng.permutation(12)[:10]):
        ax.add_patch(Rectangle((72.5, 8.2 + 1.3 * k), 3, 1.2, color=colours[shade]))
    ax.text(74, 22.8, "the cell", ha="center", fontsize=10, weight="bold")
    ax.text(74, 5.2, 'obsm["X_state"]', ha="center", fontsize=9, family="monospace", color=QUIET)
    return ax


def draw_mixture() -> Axes:
    """Draw the average of three predictions, and the cells left out that choose weights and give the verdict."""
    ax = canvas(84, 38)
    for i, (title, text) in enumerate(
        [("shift", "control + learned shift"), ("level", "from the hidden layer"), ("transferred", "effect elsewhere")]
    ):
        y = 30 - 8.5 * i
        box(ax, 2, y, 21, 7, title, text)
        arrow(ax, (23.6, y + 3.5), (34.4, 25 + (1 - i) * 1.6), PREDICTED)
    box(ax, 35, 20.5, 17, 9, "mixture", "weighted average")
    arrow(ax, (52.6, 25), (60, 25), PREDICTED)
    cells(ax, 71, 25, PREDICTED, tilt=0.4, seed=4)
    ax.text(71, 33, "predicted cells", ha="center", fontsize=10, color=PREDICTED)
    for fold in range(4):
        for k in range(4):
            x, y = 4 + 4.6 * k, 7.3 - 2.1 * fold
            ax.add_patch(Rectangle((x, y), 4, 1.6, color=GREEN if k == fold else "#D9D9D9"))
    ax.text(12.9, 10.6, "contexts, each left out once", ha="center", fontsize=10, color=GREEN)
    arrow(ax, (24.2, 4.8), (34.4, 4.8), GREEN)
    box(ax, 35, 0.8, 17, 8, "errors", "ST and baselines")
    arrow(ax, (43.5, 9.4), (43.5, 19.9), GREEN)
    ax.text(44.6, 14.4, "weights", fontsize=10, color=GREEN, va="center")
    arrow(ax, (52.6, 4.8), (60, 4.8), GREEN)
    box(ax, 60.6, 0.8, 21, 8, "verdict", "better, level or worse")
    return ax


FIGURES = {"concept_sets": draw_sets, "concept_sentence": draw_sentence, "concept_mixture": draw_mixture}


def main() -> None:
    """Draw all of them into a folder."""
    mpl.use("agg")
    mpl.rcParams |= {"svg.hashsalt": "virtualcell", "font.size": 10}  # the same file from the same code
    for name, draw in FIGURES.items():
        draw().figure.savefig(Path(sys.argv[1]) / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
