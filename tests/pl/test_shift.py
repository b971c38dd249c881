from __future__ import annotations

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
    ax = vc.pl.perturbation_shift(papalexi, predicted)
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
    ax = vc.pl.perturbation_shift(unseen, predicted, context="rep_1")
    n = int(((unseen.obs["target_gene"] == "non-targeting") & (unseen.obs["batch"] == "rep_1")).sum())
    assert [t.get_text() for t in ax.get_legend().texts] == [f"control ({n})", "predicted (60)"]
    assert (len(arrows(ax, OBSERVED)), len(arrows(ax, PREDICTED))) == (0, 1)


def test_order_of_cells_and_genes_does_not_matter(papalexi, predicted):
    shuffled = papalexi[::-1, ::-1].copy()
    ends = [arrows(vc.pl.perturbation_shift(a, predicted), PREDICTED) for a in (papalexi, shuffled)]
    np.testing.assert_allclose(np.abs(ends[0]), np.abs(ends[1]), atol=2e-3)


def test_given_axes_are_used_and_data_is_left_alone(papalexi, predicted):
    _, ax = plt.subplots()
    before, predicted_before = papalexi.X.data.copy(), predicted.X.copy()
    assert vc.pl.perturbation_shift(papalexi, predicted, components=(2, 3), ax=ax) is ax
    assert len(plt.get_fignums()) == 1
    assert ax.get_xlabel().startswith("PC2 (")
    assert ax.get_ylabel().startswith("PC3 (")
    assert np.array_equal(papalexi.X.data, before)
    assert np.array_equal(predicted.X, predicted_before)


def test_errors(papalexi, predicted):
    with pytest.raises(KeyError, match=r"perturbation='STAT2' is unknown. Did you mean 'STAT1'\? Predict it first"):
        vc.pl.perturbation_shift(papalexi, predicted, perturbation="STAT2")
    with pytest.raises(KeyError, match=r"context='rep_3' is unknown.*'STAT1' has cells only there"):
        vc.pl.perturbation_shift(papalexi, predicted, context="rep_3")
    no_control = papalexi[(papalexi.obs["target_gene"] == "STAT1") | (papalexi.obs["batch"] == "rep_2")].copy()
    with pytest.raises(KeyError, match=r"context='rep_1' is unknown.*control cells \('non-targeting'\) of the same"):
        vc.pl.perturbation_shift(no_control, predicted)
    with pytest.raises(KeyError, match=r"control='NT' is unknown"):
        vc.pl.perturbation_shift(papalexi, predicted, control="NT")
    with pytest.raises(ValueError, match=r"components=\(0, 1\) must lie between 1 and 302"):
        vc.pl.perturbation_shift(papalexi, predicted, components=(0, 1))
    two = predicted.copy()
    two.obs["target_gene"] = np.where(np.arange(two.n_obs) < 9, "JAK2", "STAT1")
    with pytest.raises(ValueError, match=r"predicted holds 2 perturbations \(JAK2, STAT1\). Name one"):
        vc.pl.perturbation_shift(papalexi, two)
    bare = papalexi.copy()
    del bare.uns["virtualcell"]
    keys = {"perturbation_key": "target_gene", "control": "non-targeting"}
    with pytest.raises(ValueError, match="context='rep_1' was given, but the design has no contexts"):
        vc.pl.perturbation_shift(bare, predicted, context="rep_1", **keys)
