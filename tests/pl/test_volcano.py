from __future__ import annotations

import matplotlib.pyplot as plt
import mudata
import numpy as np
import pytest
from scipy import stats

import virtualcell as vc
from virtualcell.data._design import Design
from virtualcell.data._screen import Screen


def drawn(ax) -> np.ndarray:
    """All genes as drawn, (genes, 2), sorted."""
    points = np.vstack([c.get_offsets() for c in ax.collections])
    return points[np.lexsort(points.T)]


def by_scipy(treated, reference) -> np.ndarray:
    """Benjamini-Hochberg written out, Mann-Whitney by scipy."""
    p = stats.mannwhitneyu(treated, reference, method="asymptotic", axis=0).pvalue
    p = np.where(np.isnan(p), 1, p)
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum.accumulate((p[order] * len(p) / np.arange(1, len(p) + 1))[::-1])[::-1]
    points = np.column_stack([(treated.mean(0) - reference.mean(0)) / np.log(2), -np.log10(np.minimum(adjusted, 1))])
    return points[np.lexsort(points.T)]


@pytest.mark.parametrize("context", [None, "rep_2"])
def test_observed_points_are_wilcoxon_and_log2_fold_change(papalexi, context):
    ax = vc.pl.de_volcano(papalexi, perturbation="STAT1", context=context)
    x = Screen.from_anndata(papalexi, Design.from_data(papalexi)).expression.rows().toarray().astype(float)
    here = (papalexi.obs["batch"] == context).to_numpy() if context else np.ones(papalexi.n_obs, dtype=bool)
    target = papalexi.obs["target_gene"].to_numpy()
    expected = by_scipy(x[here & (target == "STAT1")], x[here & (target == "non-targeting")])
    np.testing.assert_allclose(drawn(ax), expected, rtol=1e-4, atol=1e-5)
    assert ax.get_title().startswith(f"STAT1 in {context or 'rep_1, rep_2, rep_3'}\nobserved, ")


def test_known_targets_are_named_and_labels_do_not_collide(papalexi, assert_readable):
    ax = vc.pl.de_volcano(papalexi, perturbation="STAT1")
    named = {t.get_text(): t.xy for t in ax.texts}
    assert len(named) == 10
    assert {"STAT1", "PSMB9", "UBE2L6", "JAK2"} <= set(named)
    assert all(named[g][0] < 0 for g in ("STAT1", "PSMB9", "UBE2L6", "JAK2"))
    assert_readable(ax)


def test_a_prediction_is_drawn_by_its_change_and_error(predicted, assert_readable):
    ax = vc.pl.de_volcano(predicted, context="rep_1")
    change, error = predicted.varm["change"][:, 0], predicted.varm["standard_error"][:, 0]
    expected = np.column_stack([change / np.log(2), np.abs(change) / error])
    np.testing.assert_allclose(drawn(ax), expected[np.lexsort(expected.T)], rtol=1e-4, atol=1e-5)
    assert ax.get_title() == "STAT1 in rep_1\npredicted, change and its standard error"
    assert "standard errors" in ax.get_ylabel()
    assert_readable(ax)
    both = drawn(vc.pl.de_volcano(predicted))  # contexts count the same
    means = predicted.varm["change"].mean(axis=1) / np.log(2)
    np.testing.assert_allclose(np.sort(both[:, 0]), np.sort(means), rtol=1e-4, atol=1e-6)


def test_more_predicted_cells_do_not_make_a_weak_effect_sure(predicted):
    weak = predicted.copy()
    weak.varm["change"] = 0.02 * weak.varm["change"]
    ax = vc.pl.de_volcano(weak)
    assert ax.get_legend().texts[0].get_text() == f"not significant ({predicted.n_vars})"
    assert not ax.texts
    many = weak[np.tile(np.arange(weak.n_obs), 20)].copy()
    np.testing.assert_array_equal(drawn(ax), drawn(vc.pl.de_volcano(many)))


def test_genes_that_change_without_an_error_are_left_out_and_counted(predicted):
    predicted = predicted.copy()
    error = predicted.varm["standard_error"] = predicted.varm["standard_error"].copy()
    change = predicted.varm["change"]
    error[np.flatnonzero(change[:, 0])[:7], 0] = 0
    ax = vc.pl.de_volcano(predicted, context="rep_1")
    assert ax.get_title().replace("\n", " ").endswith("its standard error; 7 genes without one are left out")
    assert len(drawn(ax)) == predicted.n_vars - 7
    assert np.isfinite(drawn(ax)).all()


def test_predictions_without_errors_say_how_to_get_them(predicted):
    blind = predicted.copy()
    blind.varm["standard_error"] = np.full(blind.varm["change"].shape, np.nan)
    with pytest.raises(ValueError, match=r"knows no standard error.*n_samples=20"):
        vc.pl.de_volcano(blind)
    del blind.varm["change"]
    with pytest.raises(ValueError, match=r"no varm\['change'\].*anndata\.concat"):
        vc.pl.de_volcano(blind)
    with pytest.raises(KeyError, match=r"perturbation='STAT2' is unknown. Did you mean 'STAT1'"):
        vc.pl.de_volcano(predicted, perturbation="STAT2")
    with pytest.raises(KeyError, match=r"context='rep_3' is unknown.*'STAT1' has cells only there"):
        vc.pl.de_volcano(predicted, context="rep_3")


def test_pooled_controls_come_from_the_contexts_of_the_perturbation(papalexi):
    part = papalexi[(papalexi.obs["target_gene"] != "STAT1") | (papalexi.obs["batch"] == "rep_1")].copy()
    whole = vc.pl.de_volcano(part, perturbation="STAT1")
    one = vc.pl.de_volcano(part, perturbation="STAT1", context="rep_1")
    np.testing.assert_array_equal(drawn(whole), drawn(one))


def test_nothing_is_named_where_nothing_is_significant(papalexi):
    null = papalexi[papalexi.obs["target_gene"] == "non-targeting"].copy()
    null.obs["target_gene"] = np.where(np.random.default_rng(1).random(null.n_obs) < 0.5, "STAT1", "non-targeting")
    ax = vc.pl.de_volcano(null, perturbation="STAT1")
    assert not ax.texts
    assert ax.get_legend().texts[0].get_text() == f"not significant ({papalexi.n_vars})"


def test_mudata_gives_the_same_picture_in_the_given_axes(papalexi):
    _, ax = plt.subplots()
    assert vc.pl.de_volcano(mudata.MuData({"rna": papalexi.copy()}), perturbation="JAK2", ax=ax) is ax
    assert len(plt.get_fignums()) == 1
    np.testing.assert_array_equal(drawn(ax), drawn(vc.pl.de_volcano(papalexi, perturbation="JAK2")))


def test_errors(papalexi):
    with pytest.raises(KeyError, match=r"perturbation='STAT2' is unknown. Did you mean 'STAT1'\? Name one that has"):
        vc.pl.de_volcano(papalexi, perturbation="STAT2")
    with pytest.raises(KeyError, match=r"perturbation='non-targeting' is unknown.*is not the control"):
        vc.pl.de_volcano(papalexi, perturbation="non-targeting")
    with pytest.raises(KeyError, match=r"context='rep_9' is unknown. Did you mean 'rep_3', 'rep_2', 'rep_1'\?"):
        vc.pl.de_volcano(papalexi, perturbation="STAT1", context="rep_9")
    with pytest.raises(ValueError, match=r"adata holds 2 perturbations \(JAK2, STAT1\)\. Name one: perturbation="):
        vc.pl.de_volcano(papalexi)
