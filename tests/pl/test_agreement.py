from __future__ import annotations

import re

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pytest

import virtualcell as vc
from virtualcell.data._design import Design
from virtualcell.data._screen import Screen


def log_expression(adata, genes):
    return Screen.from_anndata(adata, Design.from_data(adata), genes=genes).expression.rows().toarray()


def effects(papalexi, predicted, contexts):
    """Predicted and observed effects against the measured control cells, mean over contexts."""
    x = log_expression(papalexi, predicted.var_names).astype(float)
    target, batch = papalexi.obs["target_gene"].to_numpy(), papalexi.obs["batch"].to_numpy()
    made, seen = [], []
    for c in contexts:
        control = x[(batch == c) & (target == "non-targeting")].mean(0)
        made.append(predicted.X[(predicted.obs["batch"] == c).to_numpy()].astype(float).mean(0) - control)
        seen.append(x[(batch == c) & (target == "STAT1")].mean(0) - control)
    return np.mean(made, axis=0) / np.log(2), np.mean(seen, axis=0) / np.log(2)


@pytest.mark.parametrize("context", [None, "rep_2"])
def test_points_correlation_and_overlap(papalexi, predicted, context):
    ax = vc.pl.de_agreement(predicted, papalexi, perturbation="STAT1", context=context, n_top=30)
    made, seen = effects(papalexi, predicted, [context] if context else ["rep_1", "rep_2"])
    points = np.vstack([c.get_offsets() for c in ax.collections])
    order, expected = np.argsort(points[:, 0]), np.column_stack([seen, made])
    np.testing.assert_allclose(points[order], expected[np.argsort(seen)], atol=1e-5)
    r, shared = re.search(r"Pearson r = (\S+), top 30: (\d+) shared \(3.0 by chance\)", ax.get_title()).groups()
    assert r == f"{np.corrcoef(made, seen)[0, 1]:.2f}"
    top = [set(np.argsort(-np.abs(e))[:30]) for e in (made, seen)]
    assert int(shared) == len(top[0] & top[1])
    assert ax.get_legend().texts[3].get_text() == f"both ({shared})"
    assert ax.get_xlim() == ax.get_ylim()


def test_largest_changes_are_named_at_their_points(papalexi, predicted, assert_readable):
    ax = vc.pl.de_agreement(predicted, papalexi, perturbation="STAT1", n_labels=12)
    made, seen = effects(papalexi, predicted, ["rep_1", "rep_2"])
    top = np.argsort(-np.maximum(np.abs(made), np.abs(seen)))[:12]
    assert {t.get_text() for t in ax.texts} == set(predicted.var_names[top])
    stat1 = next(t for t in ax.texts if t.get_text() == "STAT1")
    gene = predicted.var_names.get_loc("STAT1")
    np.testing.assert_allclose(stat1.xy, [seen[gene], made[gene]], atol=1e-5)
    assert_readable(ax)


def test_perfect_prediction_lies_on_the_identity(papalexi, predicted):
    perfect = predicted.copy()
    x = log_expression(papalexi, predicted.var_names)
    for c in ("rep_1", "rep_2"):
        treated = ((papalexi.obs["batch"] == c) & (papalexi.obs["target_gene"] == "STAT1")).to_numpy()
        perfect.X[(perfect.obs["batch"] == c).to_numpy()] = x[treated].mean(0)
    ax = vc.pl.de_agreement(perfect, papalexi, perturbation="STAT1", n_top=20)
    points = np.vstack([c.get_offsets() for c in ax.collections])
    np.testing.assert_allclose(points[:, 0], points[:, 1], atol=1e-5)
    assert "Pearson r = 1.00, top 20: 20 shared" in ax.get_title()


def test_prediction_of_no_effect_has_no_correlation(papalexi, predicted):
    observed = papalexi[papalexi.obs["batch"] == "rep_1"].copy()
    observed.X = observed.X.toarray()
    observed.X[(observed.obs["target_gene"] == "non-targeting").to_numpy()] = 0
    flat = predicted[predicted.obs["batch"] == "rep_1"].copy()
    flat.X[:] = 0
    ax = vc.pl.de_agreement(flat, observed, perturbation="STAT1")
    assert "Pearson r undefined (constant effect), top 50: " in ax.get_title()


def test_all_perturbations_by_default(papalexi, predict, assert_readable):
    made = {name: predict(papalexi, name, contexts=["rep_1"]) for name in ("JAK2", "STAT1")}
    both = ad.concat(made.values(), index_unique="-")
    both.uns["virtualcell"] = papalexi.uns["virtualcell"]
    ax = vc.pl.de_agreement(both, papalexi, n_labels=6)
    found, r = np.vstack([c.get_offsets() for c in ax.collections]), []
    singles = []
    for name, one in made.items():
        single = vc.pl.de_agreement(one, papalexi, perturbation=name)
        points = np.vstack([c.get_offsets() for c in single.collections])
        r.append(np.corrcoef(points.T)[0, 1])
        singles.append(points)
    np.testing.assert_allclose(np.sort(found, axis=0), np.sort(np.vstack(singles), axis=0), atol=1e-5)
    assert ax.get_title().replace("\n", " ").startswith(f"JAK2, STAT1 in rep_1 mean Pearson r = {np.mean(r):.2f}")
    assert {t.get_text().split(" ")[1] for t in ax.texts} <= {"(JAK2)", "(STAT1)"}
    assert_readable(ax)


def test_given_axes_are_used(papalexi, predicted):
    _, ax = plt.subplots()
    assert vc.pl.de_agreement(predicted, papalexi, perturbation="STAT1", ax=ax) is ax
    assert len(plt.get_fignums()) == 1


def test_errors(papalexi, predicted, predict):
    with pytest.raises(ValueError, match="n_top=400 must lie between 1 and 303, the number of predicted genes"):
        vc.pl.de_agreement(predicted, papalexi, perturbation="STAT1", n_top=400)
    with pytest.raises(KeyError, match=r"perturbation='JAK2' is unknown. Known: 'STAT1'. Predict it first"):
        vc.pl.de_agreement(predicted, papalexi, perturbation="JAK2")
    unseen = papalexi[papalexi.obs["target_gene"] != "STAT1"].copy()
    with pytest.raises(KeyError, match=r"perturbation='STAT1' is unknown. Known: 'JAK2'. It was predicted, but there"):
        vc.pl.de_agreement(predicted, unseen, perturbation="STAT1")
    elsewhere = papalexi[(papalexi.obs["target_gene"] != "STAT1") | (papalexi.obs["batch"] == "rep_3")].copy()
    with pytest.raises(ValueError, match=r"predicted in \['rep_1', 'rep_2'\], but measured only in \['rep_3'\]"):
        vc.pl.de_agreement(predicted, elsewhere, perturbation="STAT1")
