from __future__ import annotations

import numpy as np
import pytest

import virtualcell as vc
from virtualcell.data._screen import Screen
from virtualcell.models import Additive
from virtualcell.models._effects import Effects
from virtualcell.models._shrinkage import shrink_with_signs

CONTROL = "non-targeting"
N = 32
COLUMNS = ["log2_fold_change", "standard_error", "shrunken", "false_sign_rate"]


def test_a_row_for_every_perturbation_and_gene(fitted, model, targets):
    table = vc.tl.effects(fitted, targets[:2], context="type_1", n_cells=N)
    assert list(table) == ["perturbation", "gene", *COLUMNS]
    assert list(table["perturbation"].cat.categories) == targets[:2]
    assert len(table) == 2 * len(model.genes)
    assert table[COLUMNS].notna().all(axis=None)
    assert (table["standard_error"] >= 0).all()
    assert table["false_sign_rate"].between(0, 1).all()
    assert table.attrs["context"] == "type_1"


def test_changes_are_those_of_predicted_means(fitted, targets):
    means = vc.tl.predict_perturbation(fitted, targets[:1], context="type_3", n_cells=N, emit="mean")
    table = vc.tl.effects(fitted, targets[0], context="type_3", n_cells=N).set_index("gene")
    expected = (means.X - means.layers["control"]).toarray()[0] / np.log(2)
    np.testing.assert_allclose(table.loc[means.var_names, "log2_fold_change"], expected, atol=1e-5)


def test_shrunken_and_false_sign_rates_follow_from_change_and_error(fitted, targets):
    table = vc.tl.effects(fitted, targets[:2], context="type_1", n_cells=N)
    changes, errors = (table[c].to_numpy().reshape(2, -1) for c in COLUMNS[:2])
    found = shrink_with_signs(changes, errors**2)
    np.testing.assert_allclose(table["shrunken"].to_numpy().reshape(2, -1), found.mean, atol=1e-4)
    np.testing.assert_allclose(table["false_sign_rate"].to_numpy().reshape(2, -1), found.false_sign, atol=1e-3)
    assert (table["shrunken"].abs() <= table["log2_fold_change"].abs() + 1e-6).all()


def test_observed_effects_stand_beside(fitted, model, targets):
    table = vc.tl.effects(fitted, targets, context="type_3", n_cells=N, observed=True)
    assert [f"observed_{c}" for c in COLUMNS] == list(table)[6:]
    screen = Screen.from_anndata(fitted, model.design, genes=list(table["gene"].cat.categories))
    effects = Effects.measure(screen.take(np.asarray(screen.context == "type_3")))
    row = [name for _, name in effects.pairs()].index(targets[1])
    here = table[table["perturbation"] == targets[1]]
    np.testing.assert_allclose(here["observed_log2_fold_change"], effects.effects[row] / np.log(2), atol=1e-5)
    np.testing.assert_allclose(here["observed_standard_error"], np.sqrt(effects.variance[row]) / np.log(2), atol=1e-5)


def test_what_was_not_measured_is_missing(fitted, targets):
    fewer = fitted[~((fitted.obs["target_gene"] == targets[0]) & (fitted.obs["cell_type"] == "type_1"))].copy()
    table = vc.tl.effects(fewer, targets[:2], context="type_1", n_cells=N, observed=True)
    missing = table["observed_shrunken"].isna().groupby(table["perturbation"], observed=True).mean()
    assert missing.to_dict() == {targets[0]: 1, targets[1]: 0}
    alone = vc.tl.effects(fewer, targets[:1], context="type_1", n_cells=N, observed=True)
    assert alone.filter(like="observed").isna().all(axis=None)
    assert len(alone.filter(like="observed").columns) == 4


def test_genes_are_listed_in_the_order_that_is_asked_for(fitted, targets):
    whole = vc.tl.effects(fitted, targets, context="type_1", n_cells=N)
    genes = list(whole["gene"].cat.categories[[7, 2]])
    some = vc.tl.effects(fitted, targets, context="type_1", n_cells=N, genes=genes)
    assert list(some["gene"].cat.categories) == genes
    expected = whole[whole["gene"].isin(genes)].astype({"gene": str}).sort_values(["perturbation", "gene"])
    found = some.astype({"gene": str}).sort_values(["perturbation", "gene"])
    np.testing.assert_allclose(found[COLUMNS], expected[COLUMNS], atol=1e-6)
    with pytest.raises(KeyError, match="genes='nogene' is unknown"):
        vc.tl.effects(fitted, targets, context="type_1", genes=["nogene"])
    with pytest.raises(TypeError, match="must be a list"):
        vc.tl.effects(fitted, targets, context="type_1", genes="nogene")


def test_a_baseline_predicts_changes_without_errors(screen, targets):
    Additive.setup_anndata(
        screen, perturbation_key="target_gene", control=CONTROL, context_key="cell_type", scale="counts"
    )
    model = Additive(screen)
    model.train()
    table = vc.tl.effects(screen, targets[0], context="type_1", model=model, observed=True)
    assert table[COLUMNS[1:]].isna().all(axis=None)
    assert table["log2_fold_change"].abs().max() > 0.1
    correlation = table[["log2_fold_change", "observed_log2_fold_change"]].corr().iloc[0, 1]
    assert correlation > 0.8  # the effect of the context is shrunken
