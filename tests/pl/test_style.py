from __future__ import annotations

import logging

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.patches import Patch
from matplotlib.text import Text

import virtualcell as vc
from virtualcell.pl._style import balanced_alphas, contrast, ink_of, legend_beside, place_labels, write_title


def test_labels_of_crowded_points_do_not_collide(assert_readable):
    _, ax = plt.subplots(figsize=(5, 4), layout="constrained")
    points = np.random.default_rng(0).normal(size=(20, 2)) * 0.05
    ax.scatter(*points.T)
    ax.set(xlim=(-1, 1), ylim=(-1, 1), xlabel="a label that the layout must make room for", title="title")
    placed = place_labels(ax, points, [f"GENE{i}" for i in range(20)], avoid=points)
    assert [t.get_text() for t in placed] == [f"GENE{i}" for i in range(20)]
    np.testing.assert_allclose([t.xy for t in placed], points)
    assert_readable(ax)


def test_forty_labels_have_room_in_a_figure_of_the_default_size(assert_readable):
    _, ax = plt.subplots(figsize=(5.2, 5.2))
    points = np.random.default_rng(0).normal(size=(300, 2))
    ax.scatter(*points.T, s=5)
    outermost = points[np.argsort(-np.abs(points).max(axis=1))[:40]]
    placed = place_labels(ax, outermost, [f"GENE{i:03d}" for i in range(40)], avoid=points)
    assert len(placed) == 40
    assert_readable(ax)


def test_labels_are_placed_again_where_the_axes_turn_out_smaller(assert_readable):
    figure, (ax, other) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    points = np.random.default_rng(0).normal(size=(8, 2)) * 0.3
    ax.scatter(*points.T)
    ax.set(xlim=(-1, 1), ylim=(-1, 1))
    labels = place_labels(ax, points, [f"GENE{i}" for i in range(8)], avoid=points)
    width, before = ax.get_window_extent().width, [label.get_position() for label in labels]
    figure.canvas.draw()
    assert [label.get_position() for label in labels] == before
    other.set_yticks([0, 1], ["a name that is so long that the panel beside it must give way"] * 2)
    figure.canvas.draw()
    assert ax.get_window_extent().width < 0.75 * width
    assert all(label.get_visible() for label in labels)
    assert [label.get_position() for label in labels] != before
    assert_readable(ax)


def test_a_legend_beside_axes_covers_no_others():
    _, (ax, other) = plt.subplots(1, 2)  # nothing makes room between them
    ax.plot([0, 1])
    legend_beside(ax, [Patch(label="train (12,345 cells)")])
    assert not ax.get_legend().get_window_extent().overlaps(other.get_window_extent())
    figure, (ax, other) = plt.subplots(1, 2, layout="constrained")
    legend_beside(ax, [Patch(label="train (12,345 cells)")])
    figure.canvas.draw()
    box = ax.get_legend().get_window_extent()
    assert not box.overlaps(other.get_window_extent())
    assert box.x0 >= ax.get_window_extent().x1 - 1


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


@pytest.mark.parametrize("style", ["default", "dark_background", "ggplot", "seaborn-v0_8-darkgrid", "Solarize_Light2"])
def test_everything_can_be_told_from_the_background_of_the_style(style, papalexi, predicted):
    with plt.style.context(style):
        axes = [
            vc.pl.perturbation_shift(predicted, papalexi),
            vc.pl.de_agreement(predicted, papalexi),
            vc.pl.de_volcano(predicted),
            vc.pl.target_expression(papalexi, perturbation="STAT1"),
        ]
        for ax in axes:
            ink = ink_of(ax)
            for points in (c for c in ax.collections if len(c.get_facecolor())):
                assert all(contrast(c[:3], ink.background) >= 2 for c in np.unique(points.get_facecolor(), axis=0))
            for label in (t for t in ax.texts if t.get_text()):
                halo = label.get_path_effects()[0]._gc["foreground"]
                assert contrast(label.get_color(), ink.background) >= 4.5
                assert contrast(halo, ink.background) == pytest.approx(1)
            assert "STAT1 in rep_" in ax.get_title()
    assert contrast("black", "white") == pytest.approx(21)


def test_large_classes_are_fainter_than_small_ones():
    alphas = balanced_alphas([10_000, 100, 20, 0])
    assert alphas[0] < alphas[1] < alphas[2]
    assert min(alphas) >= 0.35


def test_a_title_is_broken_where_the_axes_end():
    _, axes = plt.subplots(2, 3, figsize=(9, 6))
    write_title(
        axes[0, 0], "a perturbation with a long name in a context with a long name: expression at 20% of control"
    )
    title = axes[0, 0].title
    assert "\n" in title.get_text()
    assert title.get_window_extent().width <= 1.1 * axes[0, 0].get_window_extent().width
