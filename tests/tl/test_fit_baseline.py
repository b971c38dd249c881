from __future__ import annotations

import mudata as md
import numpy as np
import pandas as pd
import pytest

import virtualcell as vc
from virtualcell.data._design import Design
from virtualcell.data._screen import Screen

CONTROL = "non-targeting"
NAMES = ["NoChange", "PerturbationMean", "ContextMean", "Additive", "NearestContext"]


def changes(predicted) -> np.ndarray:
    """Predicted mean minus that of the control cells, (n_genes,)."""
    return np.asarray(predicted.X.mean(axis=0) - predicted.layers["control"].mean(axis=0)).ravel()


@pytest.mark.parametrize("name", NAMES)
def test_a_baseline_predicts_cells_in_one_line(screen, design, targets, name):
    baseline = vc.tl.fit_baseline(screen, name, **design, split_key="split")
    predicted = vc.tl.predict_perturbation(screen, targets[0], context="type_3", model=baseline)
    assert predicted.n_obs == 40  # one for each control cell of the context that is held out
    assert predicted.uns["virtualcell"]["predicted_by"] == name
    counts = predicted.layers["counts"].data
    np.testing.assert_array_equal(counts, np.rint(counts))
    mean = vc.tl.predict_perturbation(screen, targets[0], context="type_3", model=baseline, emit="mean")
    assert (np.abs(changes(mean)).max() > 0.1) == (name != "NoChange")


def test_perturbation_mean_is_the_mean_of_the_effects_by_hand(screen, design, targets):
    logs = np.log1p(screen.X.toarray() / screen.X.sum(axis=1).A1[:, None] * 1e4)
    obs, effects = screen.obs, []
    for target in targets:
        of_contexts = []
        for context in ("type_1", "type_2"):
            here = (obs["cell_type"] == context).to_numpy()
            control, treated = (here & (obs["target_gene"] == label).to_numpy() for label in (CONTROL, target))
            of_contexts.append(logs[treated].mean(axis=0) - logs[control].mean(axis=0))
        effects.append(np.mean(of_contexts, axis=0))
    baseline = vc.tl.fit_baseline(screen, "PerturbationMean", **design, split_key="split", n_top_genes=None)
    wanted = np.mean(effects, axis=0)[screen.var_names.get_indexer(baseline.genes)]
    np.testing.assert_allclose(baseline.arrays["mean"], wanted, atol=1e-5)


@pytest.mark.parametrize("split_key", ["split", None])
def test_genes_are_those_of_fit_state(screen, design, fit, split_key):
    st = fit(screen, split_key=split_key, n_top_genes=40, training={"max_steps": 1}, seed=3)
    baseline = vc.tl.fit_baseline(screen, **design, split_key=split_key, n_top_genes=40, seed=3)
    assert baseline.genes == st.genes
    assert len(st.genes) < screen.n_vars


def test_only_the_design_is_written_and_a_fitted_st_stays(fitted, design, targets):
    before, stored = fitted.copy(), fitted.uns["virtualcell"]["st"]
    vc.tl.fit_baseline(fitted, **design, batch_key="batch")
    assert fitted.uns["virtualcell"]["st"] is stored
    assert fitted.uns["virtualcell"]["design"]["batch_key"] == "batch"
    fitted.uns["virtualcell"]["design"] |= {"dose_key": "dose", "layer": "raw"}  # of an earlier fit
    vc.tl.fit_baseline(fitted, **design)
    assert not {"batch_key", "dose_key", "layer"} & set(fitted.uns["virtualcell"]["design"])
    assert set(fitted.uns["virtualcell"]) == set(before.uns["virtualcell"])
    pd.testing.assert_frame_equal(fitted.obs, before.obs)
    assert (fitted.X != before.X).nnz == 0
    assert set(fitted.obsm) == set(before.obsm)


def test_what_is_predicted_is_scored_without_another_word_on_the_design(screen, design, targets):
    baseline = vc.tl.fit_baseline(screen, **design, split_key="split")
    predicted = vc.tl.predict_perturbation(screen, targets, context="type_3", model=baseline)
    scores = vc.tl.evaluate(predicted, screen, genes=predicted.var_names, suite=["pearson_delta"])
    assert scores["value"].mean() > 0.2


def test_features_reach_what_was_never_measured(screen, design, targets):
    features = pd.DataFrame(np.random.default_rng(0).normal(size=(6, 3)), index=[*targets, "new"])
    for name in ("Ridge", "NearestPerturbations"):
        baseline = vc.tl.fit_baseline(screen, name, **design, perturbation_features=features)
        assert vc.tl.predict_perturbation(screen, "new", model=baseline, n_cells=3).n_obs == 9


def test_mudata_gives_the_same(screen, design, targets):
    data = md.MuData({"rna": screen.copy()})
    one, other = (vc.tl.fit_baseline(d, "Additive", **design) for d in (screen, data))
    for name, values in one.arrays.items():
        np.testing.assert_array_equal(other.arrays[name], values)
    assert data.mod["rna"].uns["virtualcell"]["design"]["control"] == CONTROL


def test_saved_and_read_it_predicts_the_same(screen, design, targets, tmp_path):
    baseline = vc.tl.fit_baseline(screen, "NearestContext", **design)
    baseline.save(tmp_path / "baseline")
    again = vc.io.load(tmp_path / "baseline")
    one, other = (vc.tl.predict_perturbation(screen, targets[0], model=m).X.toarray() for m in (baseline, again))
    np.testing.assert_array_equal(one, other)


def test_few_cells_and_panels_are_noticed(screen, design, caplog):
    panel = screen[:, :30].copy()
    panel.obs["total_counts"] = np.asarray(screen.X.sum(axis=1)).ravel()
    vc.tl.fit_baseline(panel, **design)
    assert "library_size_key='total_counts'" in caplog.text
    with pytest.raises(ValueError, match=r"no perturbation has min_cells=999 training cells"):
        vc.tl.fit_baseline(screen, **design, min_cells=999)


def test_errors(screen, design, targets):
    features = pd.DataFrame(np.eye(5), index=targets)
    with pytest.raises(KeyError, match=r"^model='Aditive' is unknown\. Did you mean 'Additive'\? Fit an ST with `vc"):
        vc.tl.fit_baseline(screen, "Aditive", **design)
    with pytest.raises(KeyError, match=r"^model='Transfer' is unknown"):
        vc.tl.fit_baseline(screen, "Transfer", **design)
    with pytest.raises(ValueError, match=r"^model='Ridge' predicts from features of perturbations: give"):
        vc.tl.fit_baseline(screen, "Ridge", **design)
    with pytest.raises(ValueError, match=r"^perturbation_features have no use with model='Additive': leave them out"):
        vc.tl.fit_baseline(screen, "Additive", **design, perturbation_features=features)
    with pytest.raises(ValueError, match=r"^library_size_key='n' has no use with scale='log1p'"):
        vc.tl.fit_baseline(screen, **design, scale="log1p", library_size_key="n")
    assert "st" not in screen.uns["virtualcell"]


def test_effects_are_those_of_a_baseline_that_is_set_up_by_hand(screen, design):
    """Test cells are left out, and validation cells are not."""
    found = vc.tl.fit_baseline(screen, "Additive", **design, split_key="split", n_top_genes=None)
    by_hand = vc.models.Additive(Screen.from_anndata(screen, Design(**design, split_key="split")).select(found.genes))
    by_hand.train()
    for name, values in by_hand.arrays.items():
        np.testing.assert_allclose(found.arrays[name], values, atol=1e-6)
