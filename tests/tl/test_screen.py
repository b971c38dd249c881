from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest

import virtualcell as vc
from virtualcell.models import Additive, PerturbationMean
from virtualcell.tl import _changes

CONTROL = "non-targeting"
N = 32  # two sets of 16 control cells


def quiet_screen(*data, **options) -> pd.DataFrame:
    return vc.tl.screen(*data, **{"progress_bar": False, "n_cells": N, **options})


@pytest.fixture(scope="session")
def baseline():
    """Fit a baseline on raw counts."""

    def baseline(data, kind):
        keys = {"perturbation_key": "target_gene", "control": CONTROL, "context_key": "cell_type"}
        kind.setup_anndata(data, **keys, scale="counts")
        model = kind(data)
        model.train()
        return model

    return baseline


@pytest.fixture(scope="session")
def featured(session_screen, targets, fit):
    """An ST with features, of the targets and of 12 genes that were not measured."""
    names = [*targets, *(f"NEW{i}" for i in range(12))]
    features = pd.DataFrame(np.random.default_rng(0).normal(size=(len(names), 4)), index=names)
    data = session_screen.copy()
    return data, fit(data, perturbation_features=features, training={"max_steps": 20})


# -- effects ----------------------------------------------------------------------------------------------------------


def test_changes_are_those_of_predicted_means(fitted, targets):
    means = vc.tl.predict_perturbation(fitted, targets, context="type_3", n_cells=N, emit="mean")
    changes = pd.DataFrame((means.X - means.layers["control"]).toarray() / np.log(2), targets, means.var_names)
    seen = []

    def largest(frame):
        seen.append(frame)
        return frame.abs().max(axis=1)

    table = quiet_screen(fitted, context="type_3", objective=largest)
    pd.testing.assert_frame_equal(seen[0][means.var_names], changes, atol=1e-5, check_dtype=False, check_names=False)
    np.testing.assert_allclose(table["score"], changes.abs().max(axis=1)[table.index], atol=1e-5)
    np.testing.assert_allclose(table["effect"], np.sqrt((changes**2).mean(axis=1))[table.index], atol=1e-5)
    assert table["score"].is_monotonic_decreasing
    assert table["score_error"].isna().all()


def test_the_table_of_a_screen_follows_from_that_of_effects(fitted, targets):
    table = quiet_screen(fitted, context="type_1", alpha=0.2)
    effects = vc.tl.effects(fitted, context="type_1", n_cells=N)
    by_name = effects.groupby("perturbation", observed=True)
    size = by_name["log2_fold_change"].agg(lambda x: np.sqrt((x**2).mean()))
    np.testing.assert_allclose(table["effect"], size[table.index], rtol=1e-5)
    n_genes = by_name["false_sign_rate"].agg(lambda x: (x < 0.2).sum())
    assert (table["n_genes"] == n_genes[table.index]).all()
    assert table["n_genes"].max() > 0
    pd.testing.assert_series_equal(table["score"], table["effect"], check_names=False)
    pd.testing.assert_series_equal(table["score_error"], table["effect_error"], check_names=False)
    assert (table["effect_error"] > 0).all()
    assert (table["measured"] == "here").all()
    assert (table["extrapolation"] == 0).all()
    wide = effects.pivot(index="perturbation", columns="gene", values="log2_fold_change")
    correlation = np.corrcoef(wide)
    assert table.attrs["mean_correlation"] == pytest.approx(correlation[np.triu_indices(len(wide), 1)].mean(), abs=1e-4)
    assert {k: table.attrs[k] for k in ("objective", "context", "alpha")} == {
        "objective": "effect", "context": "type_1", "alpha": 0.2,
    }  # fmt: skip


def test_neither_chunks_nor_order_matter(fitted, targets, monkeypatch):
    whole = quiet_screen(fitted, context="type_2")
    monkeypatch.setattr(_changes, "_AT_ONCE", 2)
    rng = np.random.default_rng(0)
    shuffled = fitted[rng.permutation(fitted.n_obs), rng.permutation(fitted.n_vars)].copy()
    shuffled.uns = fitted.uns
    found = quiet_screen(shuffled, targets[::-1], context="type_2")
    pd.testing.assert_frame_equal(found, whole, rtol=1e-4, atol=1e-6)
    assert found.attrs["mean_correlation"] == pytest.approx(whole.attrs["mean_correlation"], abs=1e-6)


def test_all_control_cells_can_be_started_from(fitted, targets):
    everywhere = quiet_screen(fitted, targets, context="type_3", n_cells=None)
    n = int(((fitted.obs["target_gene"] == CONTROL) & (fitted.obs["cell_type"] == "type_3")).sum())
    pd.testing.assert_frame_equal(everywhere, quiet_screen(fitted, targets, context="type_3", n_cells=n))


def test_untreated_cells_need_no_column_of_perturbations(fitted, targets, model):
    controls = fitted[fitted.obs["target_gene"] == CONTROL].copy()
    atlas = controls.copy()
    atlas.obs = atlas.obs.drop(columns="target_gene")
    how = {"context": "type_3", "model": model}
    pd.testing.assert_frame_equal(
        quiet_screen(atlas, targets, untreated=True, **how), quiet_screen(controls, targets, **how)
    )
    listed = [vc.tl.effects(a, targets, untreated=a is atlas, **how) for a in (atlas, controls)]
    pd.testing.assert_frame_equal(*listed)
    with pytest.raises(KeyError, match=r"perturbation_key='target_gene' is unknown.*untreated=True"):
        quiet_screen(atlas, targets, **how)
    with pytest.raises(ValueError, match="observed=True needs perturbed cells"):
        vc.tl.effects(atlas, targets, untreated=True, observed=True, **how)


def test_the_data_stays_as_it_is(fitted):
    before = fitted.copy()
    quiet_screen(fitted, context="type_1")
    pd.testing.assert_frame_equal(fitted.obs, before.obs)
    assert (fitted.X != before.X).nnz == 0
    assert set(fitted.uns) == set(before.uns)


# -- targets ----------------------------------------------------------------------------------------------------------


def test_a_population_is_reached_by_the_perturbation_that_made_it(fitted, targets):
    for name in targets[:2]:
        table = quiet_screen(fitted, context="type_1", objective="toward", target=name)
        assert table.index[0] == name
        assert table["score"].iloc[0] == pytest.approx(1, abs=0.3)
        assert table["distance"].idxmin() == name
        assert table.loc[name, "distance"] < 0.6
        assert table.loc[name, "score_error"] < 0.3


def test_progress_and_distance_are_those_of_the_triangle(fitted, targets):
    """Change, what is left of it, and the way to the target: the law of cosines, in units of the way."""
    table = quiet_screen(fitted, context="type_1", objective="toward", target="type_2")
    control = quiet_screen(fitted, context="type_1")["effect"][table.index]
    left = table["distance"] ** 2 - 1 + 2 * table["score"]  # squared length of the change
    ratio = control**2 / left
    np.testing.assert_allclose(ratio, ratio.iloc[0], rtol=1e-3)


def test_a_signature_is_the_mean_change_of_its_genes(fitted, targets):
    effects = vc.tl.effects(fitted, context="type_1", n_cells=N)
    wide = effects.pivot(index="perturbation", columns="gene", values="log2_fold_change")
    up, down = list(wide.columns[:3]), list(wide.columns[5:9])
    options = {"context": "type_1", "objective": "toward"}
    table = quiet_screen(fitted, **options, target={"up": up, "down": down})
    expected = wide[up].mean(axis=1) - wide[down].mean(axis=1)
    np.testing.assert_allclose(table["score"], expected[table.index], atol=1e-6)
    assert "distance" not in table
    reverse = quiet_screen(fitted, **options, target={"up": down, "down": up})
    np.testing.assert_allclose(reverse["score"][table.index], -table["score"], atol=1e-6)
    np.testing.assert_allclose(reverse["score_error"][table.index], table["score_error"], rtol=1e-6)
    listed = quiet_screen(fitted, **options, target=[*up, up[0]])
    np.testing.assert_allclose(listed["score"], wide[up].mean(axis=1)[listed.index], atol=1e-6)


def test_genes_that_lack_are_named(fitted, caplog):
    gene = vc.tl.effects(fitted, context="type_1", n_cells=N)["gene"].iloc[0]
    with caplog.at_level(logging.WARNING):
        quiet_screen(fitted, context="type_1", objective="toward", target={"down": [gene, "ISG15"]})
    assert "target['down']: 1 of 2 genes are not among those of model and data, and do not count: ISG15." in caplog.text


# -- which perturbations ----------------------------------------------------------------------------------------------


def test_every_gene_with_features_can_be_asked_for(featured, targets):
    data, model = featured
    table = quiet_screen(data, "features", context="type_1", model=model)
    assert set(table.index) == {*targets, *(f"NEW{i}" for i in range(12))}
    assert set(table.index[table["measured"] == "here"]) == set(targets)
    assert (table.loc[[f"NEW{i}" for i in range(12)], "measured"] == "no").all()
    some = quiet_screen(data, ["NEW3", targets[0], CONTROL], context="type_1", model=model)
    assert set(some.index) == {"NEW3", targets[0]}
    pd.testing.assert_frame_equal(some, table.loc[some.index], rtol=1e-4)


def test_predictions_in_one_direction_are_said_to_be(session_screen, baseline, caplog):
    data = vc.datasets.synthetic(
        n_contexts=2, n_perturbations=12, n_genes=40, n_cells_per_group=15, n_control_cells=30, effect_size=1, seed=0
    )
    with caplog.at_level(logging.WARNING):
        apart = quiet_screen(data, context="type_1", model=baseline(data, Additive))
    assert "one direction" not in caplog.text
    assert apart.attrs["mean_correlation"] < 0.8
    with caplog.at_level(logging.WARNING):
        same = quiet_screen(data, context="type_1", model=baseline(data, PerturbationMean))
    assert same.attrs["mean_correlation"] == pytest.approx(1)
    assert "12 perturbations point in one direction (mean correlation 1.00)" in caplog.text


def test_a_baseline_knows_no_errors(screen, targets, baseline):
    table = quiet_screen(screen, context="type_1", model=baseline(screen, Additive))
    assert set(table.index) == set(targets)
    assert table[["score_error", "effect_error", "n_genes"]].isna().all(axis=None)
    assert (table["measured"] == "somewhere").all()
    assert (table["effect"] > 0).all()


@pytest.mark.parametrize("network", [{"preset": "published"}, {"use_rep": "X_state"}])
def test_a_network_alone_knows_no_errors(screen, targets, fit, network):
    """Neither in genes nor in embeddings, of which the predicted means are those of decoded cells."""
    se = {"max_steps": 2} if "use_rep" in network else False
    model = fit(screen, network=network, se=se, n_top_genes=40)
    table = quiet_screen(screen, context="type_1", model=model)
    assert table[["score_error", "effect_error", "n_genes"]].isna().all(axis=None)
    means = vc.tl.predict_perturbation(screen, targets, context="type_1", model=model, n_cells=N, emit="mean")
    changes = (means.X - means.layers["control"]).toarray() / np.log(2)
    sizes = pd.Series(np.sqrt((changes**2).mean(axis=1)), targets)
    np.testing.assert_allclose(table["effect"], sizes[table.index], rtol=1e-3)


# -- real cells -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def papalexi_screen(papalexi_halves, fit):
    """An ST of one half of the cells; it copies what was measured there, so that few steps do."""
    data = papalexi_halves[0].copy()
    design = {"context_key": None, "batch_key": "batch", "library_size_key": "total_counts"}
    return data, fit(data, **design)


def test_regulators_of_interferon_come_first(papalexi_screen):
    """Knockouts in cells under interferon gamma: without its pathway, UBE2L6, PSMB9 and BTG1 are not induced."""
    data, model = papalexi_screen
    induced = ["UBE2L6", "PSMB9", "BTG1"]
    table = quiet_screen(data, model=model, objective="toward", target={"down": induced})
    assert set(table.index[:4]) == {"STAT1", "JAK2", "IFNGR1", "IRF1"}
    others = table.loc[["CUL3", "ATF2", "SPI1"]]
    assert (table["score"].iloc[:4] - 2 * table["score_error"].iloc[:4] > 0).all()
    assert (others["score"] < 0.1 * table["score"].iloc[0]).all()
    sizes = quiet_screen(data, model=model)
    assert sizes.index[0] == "STAT1"
    assert sizes.loc["STAT1", "n_genes"] > 30
    assert sizes.loc["ATF2", "n_genes"] <= 2


def test_errors_cover_what_other_cells_show(papalexi_screen, papalexi_halves):
    data, model = papalexi_screen
    predicted = vc.tl.effects(data, model=model, n_cells=N).set_index(["perturbation", "gene"])
    measured = vc.tl.effects(papalexi_halves[1], model=model, observed=True, n_cells=N)
    measured = measured.set_index(["perturbation", "gene"]).loc[predicted.index]
    off = predicted["log2_fold_change"] - measured["observed_log2_fold_change"]
    error = np.hypot(predicted["standard_error"], measured["observed_standard_error"])
    expressed = measured["observed_standard_error"] > 0.005
    covered = (off.abs() < 2 * error)[expressed].groupby("perturbation", observed=True).mean()
    assert (covered > 0.9).all(), covered


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"context": None}, ValueError, "context=None, but there are control cells of .*type_1"),
        ({"context": "type_9"}, KeyError, "context='type_9' is unknown"),
        ({"objective": "size"}, KeyError, "objective='size' is unknown"),
        ({"objective": "toward"}, ValueError, "needs a target="),
        ({"target": ["A"]}, ValueError, "has no use with objective='effect'"),
        ({"objective": "toward", "target": "nobody"}, KeyError, "target='nobody' is unknown"),
        ({"objective": "toward", "target": CONTROL}, KeyError, f"target='{CONTROL}' is unknown"),
        ({"objective": "toward", "target": {"upward": ["A"]}}, KeyError, "target='upward' is unknown"),
        ({"objective": "toward", "target": {"up": "A"}}, TypeError, "must be a list of names of genes"),
        ({"objective": "toward", "target": ["no gene"]}, KeyError, "None of the genes of the signature"),
        ({"alpha": 0}, ValueError, "alpha=0 must be above 0"),
        ({"n_cells": 0}, ValueError, "n_cells=0"),
        ({"perturbations": "features"}, ValueError, "fitted without features"),
        ({"perturbations": [CONTROL]}, ValueError, "nothing but the control"),
        ({"perturbations": ["nobody"]}, KeyError, "perturbation='nobody' is unknown"),
        ({"objective": lambda frame: frame.to_numpy()}, ValueError, "returns one number for each row"),
    ],
)
def test_what_is_wrong_is_named(fitted, options, error, message):
    with pytest.raises(error, match=message):
        quiet_screen(fitted, **{"context": "type_1", **options})


def test_a_gene_cannot_go_both_ways(fitted):
    gene = vc.tl.effects(fitted, context="type_1", n_cells=N)["gene"].iloc[0]
    with pytest.raises(ValueError, match=f"{gene}' among the genes that go up and those that go down"):
        quiet_screen(fitted, context="type_1", objective="toward", target={"up": [gene], "down": [gene]})


def test_one_bar_counts_perturbations(fitted, targets, capsys):
    quiet_screen(fitted, context="type_1", progress_bar=True)
    assert capsys.readouterr().err.count("Screen, perturbation 5 of 5") >= 1
