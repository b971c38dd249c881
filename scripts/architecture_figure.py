"""Draw how data flows through virtualcell, and which floor of the package rests on which.

python scripts/architecture_figure.py docs/_static/architecture.svg
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

# Okabe & Ito (2008), distinct under the common colour vision deficiencies
BLUE, VERMILLION, GREY, LIGHT = "#0072B2", "#D55E00", "#666666", "#F3F3F3"
TRAINING, PREDICTION, BOTH = BLUE, VERMILLION, "#444444"


class Box(NamedTuple):
    """A thing: lower left corner and size, name, file, what it is, whether it is one of the four and has a frame."""

    x: float
    y: float
    width: float
    height: float
    name: str
    file: str
    text: str
    is_main: bool = False
    has_frame: bool = True


W, H = 23.0, 10.0
FIRST, SECOND, THIRD, FOURTH = 0.0, 25.67, 51.33, 77.0  # columns
BOXES = {
    "adata": Box(FIRST, 48, W, H, "AnnData", "or MuData", "obs, X, layers"),
    "screen": Box(SECOND, 46, 100 - SECOND, 14, "", "", "", is_main=True),
    "screen, words": Box(
        SECOND + 11.6, 48, W, H, "Screen", "data/_screen.py", "labels, split, groups", has_frame=False
    ),
    "expression": Box(72, 48, W, H, "Expression", "data/_expression.py", "rows, blocks, moments", is_main=True),
    "sets": Box(FIRST, 31, W, H, "SetSampler", "data/_cell_sets.py", "row numbers of a step"),
    "packed": Box(SECOND, 31, W, H, "PackedRows", "data/_packed.py", "the model's genes"),
    "start": Box(THIRD, 31, W, H, "Start", "models/_start.py", "control cells"),
    "effects": Box(FOURTH, 31, W, H, "Effects", "models/_effects.py", "measured, with errors"),
    "run": Box(FIRST, 15.5, W, H, "Run", "train/_run.py", "steps, loss, history", is_main=True),
    "network": Box(SECOND, 15.5, W, H, "STNetwork", "modules/_st.py", "cells by each head"),
    "transferred": Box(FOURTH, 15.5, W, H, "Transferred", "models/_transferred.py", "from other contexts"),
    "mixture": Box(THIRD, 0, W, H, "Mixture", "models/_mixture.py", "parts, weights, errors", is_main=True),
    "cells": Box(FOURTH, 0, W, H, "AnnData", "tl/_predict.py", "predicted cells"),
}
# from where, to where, as shares of the two boxes, in which colour
ARROWS = [
    ("adata", (1, 0.5), "screen", (0, 0.5), BOTH),
    ("screen", (0.02, 0), "sets", (0.85, 1), TRAINING),
    ("screen", (0.155, 0), "packed", (0.5, 1), TRAINING),
    ("screen", (0.5, 0), "start", (0.5, 1), PREDICTION),
    ("screen", (0.845, 0), "effects", (0.5, 1), TRAINING),
    ("sets", (1, 0.5), "packed", (0, 0.5), TRAINING),
    ("packed", (0.5, 0), "network", (0.5, 1), TRAINING),
    ("start", (0.3, 0), "network", (0.85, 1), PREDICTION),
    ("run", (1, 0.5), "network", (0, 0.5), TRAINING),
    ("effects", (0.5, 0), "transferred", (0.5, 1), TRAINING),
    ("network", (0.85, 0), "mixture", (0.2, 1), PREDICTION),
    ("transferred", (0.15, 0), "mixture", (0.8, 1), PREDICTION),
    ("mixture", (1, 0.5), "cells", (0, 0.5), PREDICTION),
]
# from the ground up; what stands on one floor does not import each other
FLOORS = [
    [("data", "reads"), ("datasets", "examples"), ("metrics", "scores"), ("modules", "torch alone"), ("train", "runs")],
    [("pp", "prepares"), ("io", "files")],
    [("models", "learn and predict from Screens")],
    [("tl", "what people call"), ("pl", "figures")],
]


def draw_box(ax: Axes, box: Box) -> None:
    """Draw one thing."""
    edge, face = ("#222222", "white") if box.is_main else ("#BBBBBB", LIGHT)
    style = {"boxstyle": "round,pad=0,rounding_size=1", "edgecolor": edge, "linewidth": 1.8 if box.is_main else 1}
    if box.has_frame:
        ax.add_patch(FancyBboxPatch((box.x, box.y), box.width, box.height, facecolor=face, **style))
    middle, top = box.x + box.width / 2, box.y + box.height
    ax.text(middle, top - 2.2, box.name, ha="center", va="center", weight="bold", fontsize=11)
    ax.text(middle, top - 5, box.file, ha="center", va="center", family="monospace", fontsize=8.5, color=GREY)
    ax.text(middle, top - 7.9, box.text, ha="center", va="center", fontsize=9.5)


def draw_arrow(ax: Axes, start: str, leave: tuple, end: str, reach: tuple, colour: str) -> None:
    """Draw an arrow from one box to another."""
    points = [(b.x + b.width * x, b.y + b.height * y) for b, (x, y) in ((BOXES[start], leave), (BOXES[end], reach))]
    how = {"arrowstyle": "-|>", "mutation_scale": 13, "shrinkA": 1, "shrinkB": 1, "linewidth": 1.6}
    ax.add_patch(FancyArrowPatch(*points, color=colour, **how))


def draw_flow(ax: Axes) -> None:
    """Draw the things and what goes from one to the next."""
    for box in BOXES.values():
        draw_box(ax, box)
    for arrow in ARROWS:
        draw_arrow(ax, *arrow)
    for y, colour, text in ((8, TRAINING, "in training"), (5, PREDICTION, "in prediction"), (2, BOTH, "in both")):
        ax.plot([0, 5], [y, y], color=colour, linewidth=1.6)
        ax.text(6.5, y, text, va="center")
    ax.set(xlim=(-0.5, 100.5), ylim=(-0.5, 60.5), aspect="equal")


def draw_floors(ax: Axes) -> None:
    """Draw the floors of the package as those of a house."""
    width, height, gap = 100.0, 5.5, 1.0
    for i, floor in enumerate(FLOORS):
        each = (width - gap * (len(floor) - 1)) / len(floor)
        for k, (name, text) in enumerate(floor):
            x, y = k * (each + gap), i * (height + gap)
            style = {"boxstyle": "round,pad=0,rounding_size=0.8", "facecolor": LIGHT, "edgecolor": "#BBBBBB"}
            ax.add_patch(FancyBboxPatch((x, y), each, height, **style))
            ax.text(x + each / 2, y + height / 2 + 1.1, name, ha="center", va="center", weight="bold", fontsize=11)
            ax.text(x + each / 2, y + height / 2 - 1.5, text, ha="center", va="center", fontsize=9.5, color=GREY)
    ax.set(xlim=(-0.5, 100.5), ylim=(-0.5, len(FLOORS) * (height + gap)), aspect="equal")


def main() -> None:
    """Draw both, one above the other."""
    mpl.use("agg")
    mpl.rcParams |= {"svg.hashsalt": "virtualcell", "font.size": 10}  # the same file from the same code
    path = Path(sys.argv[1])
    figure, (above, below) = plt.subplots(2, 1, figsize=(8.4, 8.2), height_ratios=[61, 26.5], layout="constrained")
    draw_flow(above)
    draw_floors(below)
    above.set_title("Data flows one way", loc="left", weight="bold")
    below.set_title("A floor imports only floors below it", loc="left", weight="bold")
    for ax in (above, below):
        ax.axis("off")
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
