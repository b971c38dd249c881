from __future__ import annotations

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgba

import virtualcell as vc
from virtualcell.data._design import Design
from virtualcell.data._screen import Screen
from virtualcell.pl._style import OBSERVED, PREDICTED


def arrows(ax, colour):
    """(start, end) of each arrow of a colour."""
    found = [t for t in ax.texts if getattr(t, "arrow_patch", None) is not None and not t.get_text()]
    return [(np.array(t.xyann), np.array(t.xy)) for t in found if t.arrow_patch.get_edgecolor() == to_rgba(colour)]


def planes(adata, predicted, contexts):
    """Project by the singular vectors of the centred observed matrix: what PCA is."""
    use = adata[adata.obs["batch"].isin(contexts) & adata.obs["target_gene"].isin(["STAT1", "non-targeting"])]
    screen = Screen.from_anndata(use, Design.from_data(use), genes=predicted.var_names)
    x = screen.expression.rows().toarray().astype(float)
    _, _, v = np.linalg.svd(x - x.mean(0), full_matrices=False)
    return use, (x - x.mean(0)) @ v[:2].T, (predicted.X - x.mean(0)) @ v[:2].T


def test_arrows_join_the_means_of_the_projected_cells(papalexi, predicted, assert_readable):
    ax = vc.pl.perturbation_shift(predicted, papalexi)
    use, observed, guess = planes(papalexi, predicted, ["rep_1", "rep_2"])
    seen, made = arrows(ax, OBSERVED), arrows(ax, PREDICTED)
    assert len(seen) == len(made) == 2
    for i, context in enumerate(["rep_1", "rep_2"]):
        here = (use.obs["batch"] == context).to_numpy()
        is_control = (use.obs["target_gene"] == "non-targeting").to_numpy()
        expected = [observed[here & is_control].mean(0), observed[here & ~is_control].mean(0)]
        predicted_end = guess[(predicted.obs["batch"] == context).to_numpy()].mean(0)
        # The sign of a component is free.
        sign = np.sign(expected[0] * seen[i][0])
        np.testing.assert_allclose(seen[i], sign * expected, atol=2e-3)
        np.testing.assert_allclose(made[i], sign * [expected[0], predicted_end], atol=2e-3)
    points = ax.collections[0]
    assert len(points.get_offsets()) == use.n_obs + predicted.n_obs
    labels = [t.get_text() for t in ax.texts if t.get_text()]
    assert labels == ["rep_1", "rep_2"]
    assert_readable(ax)


def test_prediction_without_measurement_draws_control_and_prediction(papalexi, predicted):
    unseen = papalexi[papalexi.obs["target_gene"] != "STAT1"].copy()
    ax = vc.pl.perturbation_shift(predicted, unseen, context="rep_1")
    n = int(((unseen.obs["target_gene"] == "non-targeting") & (unseen.obs["batch"] == "rep_1")).sum())
    assert [t.get_text() for t in ax.get_legend().texts] == [f"control ({n})", "predicted (60)"]
    assert (len(arrows(ax, OBSERVED)), len(arrows(ax, PREDICTED))) == (0, 1)


def test_order_of_cells_and_genes_does_not_matter(papalexi, predicted):
    shuffled = papalexi[::-1, ::-1].copy()
    ends = [arrows(vc.pl.perturbation_shift(predicted, a), PREDICTED) for a in (papalexi, shuffled)]
    np.testing.assert_allclose(np.abs(ends[0]), np.abs(ends[1]), atol=2e-3)


def test_given_axes_are_used_and_data_is_left_alone(papalexi, predicted):
    _, ax = plt.subplots()
    before, predicted_before = papalexi.X.data.copy(), predicted.X.copy()
    assert vc.pl.perturbation_shift(predicted, papalexi, components=(2, 3), ax=ax) is ax
    assert len(plt.get_fignums()) == 1
    assert ax.get_xlabel().startswith("PC2 (")
    assert ax.get_ylabel().startswith("PC3 (")
    assert np.array_equal(papalexi.X.data, before)
    assert np.array_equal(predicted.X, predicted_before)


def test_several_perturbations_are_drawn_and_named(papalexi, predict, assert_readable):
    two = ad.concat([predict(papalexi, name, contexts=["rep_1"]) for name in ("STAT1", "JAK2")], index_unique="-")
    two.uns["virtualcell"] = papalexi.uns["virtualcell"]
    ax = vc.pl.perturbation_shift(two, papalexi)
    assert ax.get_title() == "JAK2, STAT1 in rep_1"
    assert {t.get_text() for t in ax.texts if t.get_text()} == {"JAK2", "STAT1"}
    assert (len(arrows(ax, OBSERVED)), len(arrows(ax, PREDICTED))) == (2, 2)
    assert_readable(ax)


def test_a_shift_shorter_than_an_arrow_head_is_not_drawn(papalexi, predicted):
    weak = predicted.copy()
    weak.X = weak.layers["control"] + 0.01 * (weak.X - weak.layers["control"])
    weak = weak[(weak.obs["batch"] == "rep_1").to_numpy()].copy()
    same = papalexi.copy()  # the controls are those that the prediction started from
    is_control = (same.obs["target_gene"] == "non-targeting") & (same.obs["batch"] == "rep_1")
    same = same[(~is_control | same.obs_names.isin(weak.obs["control_barcode"])).to_numpy()].copy()
    ax = vc.pl.perturbation_shift(weak, same)
    assert (len(arrows(ax, OBSERVED)), len(arrows(ax, PREDICTED))) == (1, 0)
    labels = [t.get_text() for t in ax.get_legend().texts]
    assert labels[-1] == f"predicted ({weak.n_obs}), shift too small to draw"
    assert "too small" not in labels[1]


def test_columns_that_no_call_noted_for_the_data_are_those_of_the_prediction(papalexi, predicted):
    bare = papalexi.copy()
    del bare.uns["virtualcell"]
    ax = vc.pl.perturbation_shift(predicted, bare, scale="counts", library_size_key="total_counts")
    noted = vc.pl.perturbation_shift(predicted, papalexi)
    np.testing.assert_array_equal(ax.collections[0].get_offsets(), noted.collections[0].get_offsets())


def test_errors(papalexi, predicted):
    with pytest.raises(KeyError, match=r"perturbation='STAT2' is unknown. Did you mean 'STAT1'\? Predict it first"):
        vc.pl.perturbation_shift(predicted, papalexi, perturbation="STAT2")
    with pytest.raises(KeyError, match=r"context='rep_3' is unknown.*Predict it first"):
        vc.pl.perturbation_shift(predicted, papalexi, context="rep_3")
    no_control = papalexi[(papalexi.obs["target_gene"] == "STAT1") | (papalexi.obs["batch"] == "rep_2")].copy()
    with pytest.raises(KeyError, match=r"context='rep_1' is unknown.*control cells \('non-targeting'\) of the same"):
        vc.pl.perturbation_shift(predicted, no_control)
    with pytest.raises(KeyError, match=r"control='NT' is unknown"):
        vc.pl.perturbation_shift(predicted, papalexi.copy(), control="NT")
    with pytest.raises(ValueError, match=r"components=\(0, 1\) must lie between 1 and 302"):
        vc.pl.perturbation_shift(predicted, papalexi, components=(0, 1))
    bare, predicted = papalexi.copy(), predicted.copy()
    del bare.uns["virtualcell"], predicted.uns["virtualcell"]
    keys = {"perturbation_key": "target_gene", "control": "non-targeting"}
    with pytest.raises(ValueError, match="context='rep_1' was given, but the design has no contexts"):
        vc.pl.perturbation_shift(predicted, bare, context="rep_1", **keys)
