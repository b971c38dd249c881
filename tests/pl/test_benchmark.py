from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import virtualcell as vc
from virtualcell.pl._benchmark import _LOSSES, _NEUTRAL
from virtualcell.tl._scores import METRICS

VALUES = {"ST": (0.8, 0.05), "Additive": (0.7, 0.06), "NoChange": (0.0, 0.09), "PerturbationMean": (0.6, 0.07)}


@pytest.fixture
def scores() -> pd.DataFrame:
    """Two splits of two contexts, one of which has more perturbations; ST with three seeds."""
    rng, rows = np.random.default_rng(0), []
    for split in ("one", "other"):
        for model, (r, mae) in {**VALUES, "ceiling": (0.9, 0.04)}.items():
            source = {"ceiling": "ceiling", "NoChange": "floor", "PerturbationMean": "floor"}.get(model, "model")
            for seed in (0, 1, 2) if model in ("ST", "ceiling") else (0,):
                for context, n in (("a", 1), ("b", 4)):
                    for p in range(n):
                        for metric, value in (("pearson_delta", r), ("mae", mae)):
                            value = value * (1 + 0.05 * rng.normal())
                            rows.append((split, seed, source, model, context, f"p{p}", metric, value))
    names = ["split", "seed", "source", "model", "context", "perturbation", "metric", "value"]
    return pd.DataFrame(rows, columns=names)


def mean(scores, model, metric, **where) -> float:
    part = scores[(scores["model"] == model) & (scores["metric"] == metric)]
    for column, value in where.items():
        part = part[part[column] == value]
    return part.groupby("context")["value"].mean().mean()


def test_dots_are_means_over_contexts_of_each_split_and_seed(scores):
    axes = vc.pl.benchmark(scores)
    assert len(axes) == 2
    for ax, metric in zip(axes, ["pearson_delta", "mae"], strict=True):
        drawn = sorted(x for dots in ax.collections for x, _ in dots.get_offsets())
        expected = [
            mean(scores, model, metric, split=split, seed=seed)
            for split in ("one", "other")
            for model, seeds in (("ST", (0, 1, 2)), ("Additive", (0,)))
            for seed in seeds
        ]
        np.testing.assert_allclose(drawn, sorted(expected))
    assert [t.get_text() for t in axes[0].get_yticklabels()] == ["ST", "Additive"]
    assert axes[0].get_xlabel() == "Pearson delta (→ better)"
    assert axes[1].get_xlabel() == "mean absolute error (← better)"


def test_bars_and_bands(scores):
    ax = vc.pl.benchmark(scores, metrics=["mae"])
    lines = {line.get_label(): line.get_xdata()[0] for line in ax.lines}
    assert lines["mean over splits"] == pytest.approx(
        np.mean([np.mean([mean(scores, "ST", "mae", split=s, seed=i) for i in range(3)]) for s in ("one", "other")])
    )
    floor = [mean(scores, "PerturbationMean", "mae", split=s) for s in ("one", "other")]  # better than no change
    assert lines["best of the floor"] == pytest.approx(np.mean(floor))
    ceiling = np.mean([mean(scores, "ceiling", "mae", split=s, seed=i) for s in ("one", "other") for i in range(3)])
    bands = [p.get_extents().transformed(ax.transData.inverted()) for p in ax.patches]
    # an error: the floor reaches up from its mean, the ceiling down
    np.testing.assert_allclose([bands[0].x0, bands[0].x1], [np.mean(floor), ax.get_xlim()[1]])
    np.testing.assert_allclose([bands[1].x0, bands[1].x1], [ax.get_xlim()[0], ceiling])


def test_the_corrected_ceiling_is_drawn_where_there_is_one(scores):
    corrected = scores[(scores["source"] == "ceiling") & (scores["metric"] == "mae")].copy()
    corrected = corrected.assign(source="corrected ceiling", model="corrected ceiling", value=corrected["value"] / 2)
    axes = vc.pl.benchmark(pd.concat([scores, corrected]))
    lines = [{line.get_label(): line for line in ax.lines} for ax in axes]
    raw, half = lines[0]["ceiling of halves, not corrected"], lines[1]["ceiling, corrected for halves"]
    assert "ceiling, corrected for halves" not in lines[0]
    assert "ceiling of halves, not corrected" not in lines[1]
    assert half.get_xdata()[0] == pytest.approx(
        np.mean(
            [mean(corrected, "corrected ceiling", "mae", split=s, seed=i) for s in ("one", "other") for i in range(3)]
        )
    )
    assert raw.get_xdata()[0] > 0.8
    texts = [t.get_text() for t in axes[0].figure.legends[0].texts]
    assert {"ceiling of halves, not corrected", "ceiling, corrected for halves"} <= set(texts)  # of two panels
    assert len(texts) == len(set(texts))


def test_the_best_is_on_top_unless_models_are_named(scores):
    scores.loc[(scores["model"] == "ST") & (scores["metric"] == "mae"), "value"] = 0.08
    ax = vc.pl.benchmark(scores, metrics=["mae"])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["Additive", "ST"]
    ax = vc.pl.benchmark(scores, metrics=["mae"], models=["ST", "NoChange"])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["ST", "NoChange"]


def test_given_axes(scores):
    _, axes = plt.subplots(1, 2)
    assert list(vc.pl.benchmark(scores, axes=axes)) == list(axes)
    ax = plt.figure().subplots()
    assert vc.pl.benchmark(scores[scores["split"] == "one"], metrics=["mae"], axes=ax) is ax
    legend = ["mean over seeds", "best of the floor", "ceiling of halves, not corrected"]
    assert [t.get_text() for t in ax.get_legend().texts] == legend
    with pytest.raises(ValueError, match="axes holds 1 axes for 2 metrics"):
        vc.pl.benchmark(scores, axes=ax)


def test_without_floor_or_ceiling_and_with_undefined_values(scores):
    scores = scores[scores["source"] == "model"].copy()
    scores.loc[scores["model"] == "Additive", "value"] = np.nan
    ax = vc.pl.benchmark(scores, metrics=["mae"])
    assert not ax.patches
    assert [t.get_text() for t in ax.get_yticklabels()] == ["ST", "Additive"]


def test_the_legend_fits_into_the_figure(scores):
    axes = vc.pl.benchmark(scores)
    figure = axes[0].figure
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= 0
    assert legend.x1 <= figure.bbox.x1
    assert all(legend.y1 <= ax.get_tightbbox().y0 for ax in axes)


def test_errors(scores):
    with pytest.raises(KeyError, match=r"metrics='maee' is unknown\. Did you mean 'mae'.*Name it in the suite"):
        vc.pl.benchmark(scores, metrics=["maee"])
    with pytest.raises(KeyError, match=r"models='Aditive' is unknown\. Did you mean 'Additive'"):
        vc.pl.benchmark(scores, models=["Aditive"])
    with pytest.raises(ValueError, match=r"lacks the columns \['split'\].*vc\.tl\.benchmark"):
        vc.pl.benchmark(scores.drop(columns="split"))


def test_where_less_is_better_is_as_the_scores_have_it():
    best = {name: metric.best for name, metric in METRICS.items()}
    assert {name for name in best if best[name] == 0} == set(_LOSSES) & set(best)
    assert {name for name in best if best[name] is None} == set(_NEUTRAL)
