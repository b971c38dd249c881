from __future__ import annotations

import logging

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.text import Text

from virtualcell.pl._style import place_labels


def test_labels_of_crowded_points_do_not_collide(assert_readable):
    _, ax = plt.subplots(figsize=(5, 4), layout="constrained")
    points = np.random.default_rng(0).normal(size=(20, 2)) * 0.05
    ax.scatter(*points.T)
    ax.set(xlim=(-1, 1), ylim=(-1, 1), xlabel="a label that the layout must make room for", title="title")
    placed = place_labels(ax, points, [f"GENE{i}" for i in range(20)], avoid=points)
    assert [t.get_text() for t in placed] == [f"GENE{i}" for i in range(20)]
    np.testing.assert_allclose([t.xy for t in placed], points)
    assert_readable(ax)


def test_label_keeps_off_existing_text_legend_and_points(assert_readable):
    _, ax = plt.subplots(figsize=(5, 4))
    ax.set(xlim=(-1, 1), ylim=(-1, 1))
    cloud = np.column_stack([np.linspace(0.02, 0.5, 400), np.zeros(400)])  # to the right of the labelled point
    ax.plot(*cloud.T, label="cloud")
    legend = ax.legend(loc="upper left")
    ax.text(-0.15, 0, "already here", ha="right", va="center")
    (label,) = place_labels(ax, np.zeros((1, 2)), ["GENE"], avoid=cloud)
    assert_readable(ax)
    box = Text.get_window_extent(label)
    assert not box.overlaps(legend.get_window_extent())
    assert not any(box.contains(x, y) for x, y in ax.transData.transform(cloud))


def test_labels_without_room_are_counted(caplog, assert_readable):
    _, ax = plt.subplots(figsize=(0.8, 0.8))
    with caplog.at_level(logging.INFO, logger="virtualcell.pl"):
        placed = place_labels(ax, np.full((9, 2), 0.5), ["LONGGENENAME"] * 9)
    assert f"{9 - len(placed)} of 9 labels found no room" in caplog.text
    assert_readable(ax)
