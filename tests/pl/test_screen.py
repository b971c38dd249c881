from __future__ import annotations

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import virtualcell as vc
from virtualcell.pl._style import contrast, ink_of


def table_of(n: int, **attrs) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    score = rng.gamma(1, 0.1, n)  # not sorted
    kinds = rng.choice(["here", "no"], n)
    frame = pd.DataFrame({"score": score, "score_error": 0.1 * score, "measured": kinds})
    frame.index = [f"GENE{i}" for i in range(n)]
    frame.attrs = {"objective": "effect", "context": "K562", **attrs}
    return frame


def drawn(ax) -> dict[str, np.ndarray]:
    """Points of each class, and the ends of its error bars, by label."""
    return {
        box.get_label(): (np.column_stack(box.lines[0].get_data()), np.stack(box.lines[2][0].get_segments()))
        for box in ax.containers
    }


def test_rows_are_sorted_and_have_error_bars():
    table = table_of(45)
    ax = vc.pl.screen(table)
    names = [t.get_text() for t in ax.get_yticklabels()]
    assert names == list(table.sort_values("score", ascending=False).index)
    here = table[table["measured"] == "here"]
    points, bars = drawn(ax)[f"measured here ({len(here)})"]
    found = pd.Series(points[:, 0], [names[int(y) - 1] for y in points[:, 1]])
    np.testing.assert_allclose(found[here.index], here["score"])
    length = pd.Series(np.ptp(bars[:, :, 0], axis=1), found.index)
    np.testing.assert_allclose(length[here.index], 2 * here["score_error"])
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the best on top
    assert ax.get_title() == "Screen of 45 perturbations, K562"


@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_names_of_many_rows_do_not_touch(style):
    with plt.style.context(style):
        ax = vc.pl.screen(table_of(60), highlight=["GENE7"])
        ax.get_figure().canvas.draw()
        boxes = [label.get_window_extent() for label in ax.get_yticklabels()]
        assert all(a.y0 >= b.y1 - 1 for a, b in itertools.pairwise(boxes))
        bold = [t.get_text() for t in ax.get_yticklabels() if t.get_fontweight() == "bold"]
        assert bold == ["GENE7"]
        line = ax.lines[-1]
        assert contrast(line.get_color(), ink_of(ax).background) > 1.5
        points = [bars.lines[0].get_color() for bars in ax.containers]
        assert all(contrast(colour, ink_of(ax).background) >= 2 for colour in points)


def test_of_many_the_first_are_named(assert_readable):
    table = table_of(2000)
    worst = table["score"].idxmin()
    ax = vc.pl.screen(table, n_labels=8, highlight=[worst])
    best = table["score"].nlargest(8).index
    assert {t.get_text() for t in ax.texts} == {*best, worst}
    bold = {t.get_text() for t in ax.texts if t.get_fontweight() == "bold"}
    assert bold == {worst}
    assert_readable(ax)
    points = np.vstack([points for points, _ in drawn(ax).values()])
    order = np.argsort(points[:, 0])
    assert (np.diff(points[order, 1]) <= 0).all()
    assert len(points) == 2000


def test_forty_names_have_room(assert_readable):
    n = 300
    score = np.sort(np.random.default_rng(0).gamma(2, 0.1, n))[::-1]
    names = [f"GENE{i:03d}" for i in range(n)]
    table = pd.DataFrame({"score": score, "score_error": 0.02, "measured": "here"}, index=names)
    ax = vc.pl.screen(table, n_labels=40)
    assert sorted(t.get_text() for t in ax.texts if t.get_text()) == names[:40]
    assert_readable(ax)


def test_scores_without_errors_and_axes_of_ones_own():
    table = table_of(5, objective="own", context="(all)")
    table["score_error"] = np.nan
    _, ax = plt.subplots()
    assert vc.pl.screen(table, ax=ax) is ax
    assert ax.get_xlabel() == "score"
    assert ax.get_title() == "Screen of 5 perturbations"


def test_what_is_wrong_is_named():
    with pytest.raises(KeyError, match="highlight='nobody' is unknown"):
        vc.pl.screen(table_of(5), highlight=["nobody"])
    with pytest.raises(KeyError, match="table='score_error' is unknown"):
        vc.pl.screen(table_of(5).drop(columns="score_error"))
