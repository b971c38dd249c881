from __future__ import annotations

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import virtualcell as vc


@pytest.fixture
def effects() -> pd.DataFrame:
    """Two groups of perturbations that move two groups of genes, mixed; one was not measured."""
    rng = np.random.default_rng(0)
    group = np.arange(12) % 2
    change = np.zeros((12, 60))
    change[:, :20] = np.where(group[:, None] == np.arange(20) % 2, 1.0, -0.5) + 0.05 * rng.normal(size=(12, 20))
    names, genes = [f"P{i}" for i in range(12)], [f"G{i}" for i in range(60)]
    observed = change + 0.1 * rng.normal(size=change.shape)
    observed[3] = np.nan
    table = pd.DataFrame(
        {
            "perturbation": pd.Categorical(np.repeat(names, 60), names),
            "gene": pd.Categorical(np.tile(genes, 12), genes),
            "log2_fold_change": change.ravel(),
            "shrunken": 0.5 * change.ravel(),
            "observed_log2_fold_change": observed.ravel(),
            "observed_shrunken": 0.5 * observed.ravel(),
        }
    )
    table.attrs["context"] = "K562"
    return table


def names_of(ax) -> tuple[list[str], list[str]]:
    return [t.get_text() for t in ax.get_yticklabels()], [t.get_text() for t in ax.get_xticklabels()]


def test_predicted_and_observed_have_one_order_and_one_scale(effects):
    predicted, observed = vc.pl.effect_heatmap(effects, n_genes=25)
    rows, columns = names_of(predicted)
    assert names_of(observed) == ([], columns)  # rows are named once
    assert predicted.images[0].get_clim() == observed.images[0].get_clim()
    low, high = predicted.images[0].get_clim()
    assert low == -high
    wide = effects.pivot(index="perturbation", columns="gene", values="log2_fold_change").loc[rows, columns]
    np.testing.assert_allclose(predicted.images[0].get_array(), wide)
    shown = observed.images[0].get_array()
    wide = effects.pivot(index="perturbation", columns="gene", values="observed_log2_fold_change").loc[rows, columns]
    np.testing.assert_allclose(shown.filled(np.nan), wide)
    assert shown.mask[rows.index("P3")].all()
    assert shown.mask.sum() == 25
    assert predicted.get_title() == "predicted, K562"
    assert observed.get_title() == "observed, K562 (1 not measured)"


def test_what_is_alike_stands_together_and_the_largest_are_shown(effects):
    ax, _ = vc.pl.effect_heatmap(effects, n_genes=20)
    rows, columns = names_of(ax)
    assert set(columns) == {f"G{i}" for i in range(20)}
    for names in (rows, columns):
        parity = [int(name[1:]) % 2 for name in names]
        assert np.abs(np.diff(parity)).sum() == 1  # one border between two blocks


@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_zero_has_the_colour_of_the_background(effects, style):
    with plt.style.context(style):
        (ax,) = vc.pl.effect_heatmap(effects.drop(columns=["observed_log2_fold_change", "observed_shrunken"]))
        zero = ax.images[0].cmap(ax.images[0].norm(0.0))
        np.testing.assert_allclose(zero[:3], plt.matplotlib.colors.to_rgb(plt.rcParams["axes.facecolor"]), atol=0.02)


def test_names_do_not_touch(effects):
    axes = vc.pl.effect_heatmap(effects, n_genes=40)
    axes[0].get_figure().canvas.draw()
    for ax in axes:
        boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
        assert all(b.x0 >= a.x1 - 1 for a, b in itertools.pairwise(boxes))


def test_axes_of_ones_own(effects):
    _, axes = plt.subplots(1, 2)
    found = vc.pl.effect_heatmap(effects, value="shrunken", n_perturbations=4, axes=axes)
    assert list(found) == list(axes)
    assert len(names_of(axes[0])[0]) == 4
    with pytest.raises(ValueError, match="axes= holds 1 axes for 2 heatmaps"):
        vc.pl.effect_heatmap(effects, axes=axes[0])


def test_what_is_wrong_is_named(effects):
    with pytest.raises(KeyError, match="value='p_value' is unknown"):
        vc.pl.effect_heatmap(effects, value="p_value")
    with pytest.raises(ValueError, match="n_genes=0"):
        vc.pl.effect_heatmap(effects, n_genes=0)
    effects["shrunken"] = np.nan
    with pytest.raises(ValueError, match="the model knows no errors"):
        vc.pl.effect_heatmap(effects, value="shrunken")
