from __future__ import annotations

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc

import virtualcell as vc

LOSES = {"training": {"max_steps": 1, "lr": 1e-9}, "network": {"head": "shift"}}


@pytest.fixture
def crippled(screen, fit):
    """An ST that has learned nothing, which any baseline beats."""
    return fit(screen, split_key="split", **LOSES)


def test_a_model_that_loses_is_told_so_in_one_line(screen, fit, caplog):
    with caplog.at_level(logging.WARNING, logger="virtualcell"):
        st = fit(screen, split_key="split", **LOSES)
    (line,) = [r.getMessage() for r in caplog.records if "does not beat" in r.getMessage()]
    table = screen.uns["virtualcell"]["validation"]
    best = table.index[0]
    assert best != "ST"
    assert f"ST does not beat the baseline {best}: Pearson delta" in line
    assert "\n" not in line
    assert set(table.index) == {"ST", "NoChange", "ContextMean", "PerturbationMean", "Additive", "NearestContext"}
    assert table["pearson_delta"].is_monotonic_decreasing
    assert (table["n_groups"] == 10).all()  # five targets in the two contexts that are not held out
    assert table.loc["NoChange", "pearson_delta"] == pytest.approx(0, abs=0.2)
    assert type(st.fallback).__name__ == best


def test_scores_are_those_of_the_predictions(screen, crippled):
    """One baseline by hand: no change has the error of the mean control cell."""
    st, table = crippled, crippled.validation
    counts = screen.X.toarray()
    logs = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)[:, screen.var_names.get_indexer(st.genes)]
    obs = screen.obs
    errors = []
    for context in ("type_1", "type_2"):
        here = obs["cell_type"] == context
        base = logs[(here & (obs["target_gene"] == "non-targeting")).to_numpy()].mean(axis=0)
        for target in sorted(set(obs["target_gene"]) - {"non-targeting"}):
            cells = logs[(here & (obs["target_gene"] == target) & (obs["split"] == "val")).to_numpy()]
            errors.append(np.abs(cells.mean(axis=0) - base).mean())
    assert table.loc["NoChange", "mae"] == pytest.approx(np.mean(errors), rel=2e-3)


def test_test_cells_take_no_part(screen, fit):
    other = screen.copy()
    rows = np.flatnonzero(other.obs["split"] == "test")
    other.X[rows] = other.X[rows[::-1]] * 3
    options = {"split_key": "split", "n_top_genes": None, **LOSES}
    fit(screen, **options)
    fit(other, **options)
    pd.testing.assert_frame_equal(*(d.uns["virtualcell"]["validation"] for d in (screen, other)))


def test_validation_contexts_may_bring_their_own_controls(screen, fit):
    screen.obs["split"] = np.where(screen.obs["cell_type"] == "type_3", "val", "train")
    fit(screen, split_key="split", **LOSES)
    assert screen.uns["virtualcell"]["validation"].loc["NoChange", "n_groups"] > 0
    assert "ST" in screen.uns["virtualcell"]["validation"].index


@pytest.mark.parametrize("n_targets", [2, 5])
def test_control_cells_are_read_once_per_context(screen, fit, targets, rows_read, n_targets):
    kept = screen[screen.obs["target_gene"].isin([*targets[:n_targets], "non-targeting"])].copy()
    n = []
    for validate in (False, True):
        rows_read.clear()
        fit(kept, split_key="split", validate=validate)
        n.append(sum(rows_read))
    # the validation cells, and the control cells of the two contexts that have some
    assert n[1] - n[0] == (kept.obs["split"] == "val").sum() + 2 * 40


def test_many_groups_are_drawn_from(screen, fit, monkeypatch):
    from virtualcell.tl import _verdict

    monkeypatch.setattr(_verdict, "_MOST_GROUPS", 4)
    one, again, other = (fit(screen, split_key="split", seed=seed).validation for seed in (0, 0, 1))
    assert (one["n_groups"] == 4).all()
    pd.testing.assert_frame_equal(one, again)
    assert one.loc["NoChange", "mae"] != other.loc["NoChange", "mae"]  # other groups


def test_the_order_of_a_file_changes_no_bit_of_the_verdict(screen, fit):
    rng = np.random.default_rng(0)
    other = screen[rng.permutation(screen.n_obs), rng.permutation(screen.n_vars)].copy()
    options = {"split_key": "split", "n_top_genes": 60}
    pd.testing.assert_frame_equal(fit(screen, **options).validation, fit(other, **options).validation, check_exact=True)


def test_features_bring_ridge_and_unseen_validation_perturbations(screen, fit, targets, caplog):
    features = pd.DataFrame(np.random.default_rng(0).normal(size=(5, 3)), index=targets)
    screen.obs["split"] = np.where(screen.obs["target_gene"] == targets[0], "val", "train")
    with caplog.at_level(logging.INFO, logger="virtualcell"):
        st = fit(screen, split_key="split", perturbation_features=features)
    assert {"ST", "Ridge", "NoChange"} <= set(st.validation.index)
    assert not {"Additive", "NearestContext"} & set(st.validation.index)
    assert "Additive cannot predict all that is validated on and is left out" in caplog.text


def test_new_combinations_are_validated_on(screen, fit, targets):
    pair = f"{targets[0]}+{targets[1]}"
    labels = screen.obs["target_gene"].astype(str)
    is_pair = labels == targets[2]
    screen.obs["target_gene"] = labels.where(~is_pair, pair)
    screen.obs["split"] = np.where(is_pair, "val", "train")
    st = fit(screen, split_key="split")
    assert pair not in st.table.names
    assert set(st.validation.index) == {
        "ST",
        "NoChange",
        "ContextMean",
        "PerturbationMean",
        "Additive",
        "NearestContext",
    }
    assert (st.validation["n_groups"] == 3).all()


def test_batches_are_no_hindrance(screen, fit, targets):
    """Validation cells of a batch that was not learned from are left out, with their control cells."""
    screen.obs["batch"] = np.where(screen.obs["cell_type"] == "type_3", "late", screen.obs["batch"].astype(str))
    screen.obs["split"] = np.where(screen.obs["cell_type"] == "type_3", "val", screen.obs["split"].astype(str))
    st = fit(screen, split_key="split", batch_key="batch")
    assert (st.validation["n_groups"] == 10).all()
    with pytest.raises(KeyError, match="batch='late' is unknown"):
        vc.tl.predict_perturbation(screen, targets[0], context="type_3")


def test_fallback_is_asked_for_and_said(screen, crippled, targets, caplog):
    plain = vc.tl.predict_perturbation(screen, targets[0], context="type_3")
    assert plain.uns["virtualcell"]["predicted_by"] == "ST"
    np.testing.assert_allclose(plain.X, plain.layers["control"], atol=1e-4)  # it has learned nothing
    with caplog.at_level(logging.WARNING, logger="virtualcell"):
        better = vc.tl.predict_perturbation(screen, targets[0], context="type_3", fallback="best")
    name = type(crippled.fallback).__name__
    assert better.uns["virtualcell"]["predicted_by"] == name
    assert any(r.getMessage().startswith(f"{name} predicts") for r in caplog.records)
    own = vc.tl.predict_perturbation(screen, targets[0], context="type_3", model=crippled.fallback)
    np.testing.assert_array_equal(better.X, own.X)
    assert not np.array_equal(better.X, plain.X)


def test_fallback_predicts_what_st_can_and_its_baseline_too(screen, crippled, targets, monkeypatch):
    monkeypatch.setattr(crippled, "fallback", vc.models.ContextMean.__new__(vc.models.ContextMean))  # takes any name
    with pytest.raises(KeyError, match="perturbation='GENE_TYPO' is unknown"):
        vc.tl.predict_perturbation(screen, "GENE_TYPO", model=crippled, fallback="best")
    monkeypatch.setattr(crippled, "check_perturbation", lambda name: None)  # as with features
    log = screen.copy()
    sc.pp.normalize_total(log, target_sum=1e4)
    sc.pp.log1p(log)
    vc.models.Additive.setup_anndata(log, perturbation_key="target_gene", control="non-targeting")
    additive = vc.models.Additive(log)
    additive.train()
    monkeypatch.setattr(crippled, "fallback", additive)
    with pytest.raises(KeyError, match=r"better model, Additive, cannot predict 'NEW'\. Leave fallback out"):
        vc.tl.predict_perturbation(screen, "NEW", model=crippled, fallback="best")


def test_files_keep_the_verdict(screen, crippled, targets, tmp_path):
    expected = vc.tl.predict_perturbation(screen, targets[0], fallback="best")
    screen.write_h5ad(tmp_path / "screen.h5ad")
    again = ad.read_h5ad(tmp_path / "screen.h5ad")
    np.testing.assert_array_equal(vc.tl.predict_perturbation(again, targets[0], fallback="best").X, expected.X)
    pd.testing.assert_frame_equal(again.uns["virtualcell"]["validation"], crippled.validation, check_names=False)
    crippled.save(tmp_path / "model")
    loaded = vc.models.ST.load(tmp_path / "model")
    pd.testing.assert_frame_equal(loaded.validation, crippled.validation)
    got = vc.tl.predict_perturbation(screen, targets[0], model=loaded, fallback="best")
    np.testing.assert_array_equal(got.X, expected.X)


def test_a_model_that_wins_needs_no_fallback(screen, fit, targets, monkeypatch):
    # ridge and its like are still fitted, but the best of them is compared with a perfect score
    from virtualcell.tl import _fit

    def won(st, *args, **kwargs):
        table = pd.DataFrame({"pearson_delta": [1.0, 0.0], "mae": [0.0, 1.0], "n_groups": 1}, index=["ST", "NoChange"])
        return table, vc.models.NoChange.__new__(vc.models.NoChange)

    monkeypatch.setattr(_fit, "compare_with_baselines", won)
    st = fit(screen, split_key="split")
    assert st.fallback is None
    predicted = vc.tl.predict_perturbation(screen, targets[0], fallback="best")
    assert predicted.uns["virtualcell"]["predicted_by"] == "ST"


def test_what_was_not_validated_has_no_better_one(screen, fit, targets, caplog):
    st = fit(screen, validate=False)
    assert st.validation is None
    assert "validation" not in screen.uns["virtualcell"]
    with pytest.raises(ValueError, match="fallback='best' needs an ST that was validated"):
        vc.tl.predict_perturbation(screen, targets[0], fallback="best")
    with pytest.raises(ValueError, match="fallback='worst' is unknown; valid are 'best' and None"):
        vc.tl.predict_perturbation(screen, targets[0], fallback="worst")
    with caplog.at_level(logging.WARNING, logger="virtualcell"):
        fit(screen, training={"val_fraction": 0.0})
    assert any("no perturbed validation cells" in r.getMessage() for r in caplog.records)


def test_standard_errors_of_a_prediction(screen, fit, targets):
    fit(screen, split_key="split", training={"max_steps": 40, "lr": 3e-3})
    predicted = vc.tl.predict_perturbation(screen, targets[:2], n_samples=8)
    error = predicted.layers["standard_error"]
    assert error.shape == predicted.shape
    assert (error >= 0).all()
    for _, rows in predicted.obs.groupby(["target_gene", "cell_type"], observed=True).indices.items():
        assert np.ptp(error[rows], axis=0).max() == 0  # one for the mean of a perturbation in a context
        expected = np.sqrt(2 / np.pi) * error[rows[0]].mean()
        np.testing.assert_allclose(predicted.obs["expected_error"].to_numpy()[rows], expected, rtol=1e-5)
    assert "standard_error" not in vc.tl.predict_perturbation(screen, targets[0]).layers
    again = vc.tl.predict_perturbation(screen, targets[:2], n_samples=8)
    np.testing.assert_array_equal(again.layers["standard_error"], error)
    with pytest.raises(ValueError, match="n_samples=1: at least 2 draws"):
        vc.tl.predict_perturbation(screen, targets[0], n_samples=1)
