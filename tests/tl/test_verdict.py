from __future__ import annotations

import logging
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
from scipy import sparse

import virtualcell as vc
from virtualcell.data._design import Design
from virtualcell.data._screen import Screen
from virtualcell.metrics import mae, pearson_delta
from virtualcell.models._closed_forms import additive
from virtualcell.models._effects import Effects
from virtualcell.models._stacking import WEIGHTS
from virtualcell.tl._questions import Asked, folds
from virtualcell.tl._verdict import compared, judge, outcome_of

CONTROL = "non-targeting"
BASELINES = {"NoChange", "ContextMean", "PerturbationMean", "Additive", "NearestContext"}
LOSES = {"validate": True, "training": {"max_steps": 1, "lr": 1e-9}, "network": {"head": "shift"}}


def dense(matrix) -> np.ndarray:
    return matrix.toarray() if sparse.issparse(matrix) else np.asarray(matrix)


def log1p_cp10k(counts) -> np.ndarray:
    return np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)


@pytest.fixture(scope="module")
def session_crippled(session_screen, fit):
    adata = session_screen.copy()
    return adata, fit(adata, split_key="split", **LOSES)


@pytest.fixture
def crippled(session_crippled):
    """An ST that has learned nothing, which any baseline beats; `crippled_screen` is what it was fitted on."""
    return session_crippled[1]


@pytest.fixture
def crippled_screen(session_crippled):
    return session_crippled[0].copy()


# -- what it says -----------------------------------------------------------------------------------------------------


def test_a_model_that_loses_is_told_so_in_one_line(screen, fit, capsys):
    st = fit(screen, split_key="split", **LOSES)
    (line,) = capsys.readouterr().out.splitlines()
    assert repr(st).endswith(f"parameters.\n{st.verdict}")
    table = screen.uns["virtualcell"]["validation"]
    assert line == f'{st.verdict} `predict_perturbation(..., fallback="best")` uses the baseline.'
    assert screen.uns["virtualcell"]["verdict"] == st.verdict
    ours = table.loc["ST"]
    assert st.verdict.startswith("On left-out contexts ST is worse than the best baseline: worse in Pearson delta, ")
    best = table.loc[type(st.fallback).__name__]  # in the metric that was lost
    assert best["pearson_delta"] == table["pearson_delta"].max()
    figures = f"{ours['pearson_delta']:.4g} against {best['pearson_delta']:.4g} of {best.name} (+-"
    assert f"worse in Pearson delta, {figures}" in st.verdict
    assert "level in MAE, " in st.verdict
    assert st.verdict.endswith("over folds). 10 pairs of context and perturbation were left out, in 2 folds.")
    assert "\n" not in st.verdict
    assert set(table.index) == {"ST", *BASELINES}
    assert table["mae"].is_monotonic_increasing
    # the five targets in each of the two contexts that the split does not hold out
    assert (table["n_groups"] == 10).all()
    assert (table["n_folds"] == 2).all()
    assert (table[["mae_spread", "pearson_delta_spread"]] >= 0).all(axis=None)


def test_scores_are_those_of_the_predictions(crippled_screen, crippled):
    """One baseline by hand: no change has the error of the mean control cell."""
    screen, table = crippled_screen, crippled.validation
    logs = log1p_cp10k(screen.X.toarray())[:, screen.var_names.get_indexer(crippled.genes)]
    obs, errors = screen.obs, []
    for context in ("type_1", "type_2"):
        here = obs["cell_type"] == context
        base = logs[(here & (obs["target_gene"] == CONTROL)).to_numpy()].mean(axis=0)
        for target in sorted(set(obs["target_gene"]) - {CONTROL}):
            cells = logs[(here & (obs["target_gene"] == target) & (obs["split"] == "train")).to_numpy()]
            errors.append(np.abs(cells.mean(axis=0) - base).mean())
    by_fold = np.reshape(errors, (2, 5)).mean(axis=1)
    assert table.loc["NoChange", "mae"] == pytest.approx(by_fold.mean(), rel=2e-3)
    assert table.loc["NoChange", "mae_spread"] == pytest.approx(by_fold.std(ddof=1), rel=0.05)
    assert table.loc["NoChange", "pearson_delta"] == pytest.approx(0, abs=0.05)
    assert table.loc["ST", "mae"] == pytest.approx(table.loc["NoChange", "mae"], rel=2e-3)  # it has learned nothing


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ([(2.0, 1.0), (0.5, 1.0)], "better"),
        ([(2.0, 1.0), (2.0, 1.0)], "better"),
        ([(0.5, 1.0), (-0.5, 1.0)], "level"),
        ([(2.0, 1.0), (-2.0, 1.0)], "level"),  # better in one metric and worse in the other
        ([(-2.0, 1.0), (0.5, 1.0)], "worse"),
        ([(-2.0, 1.0), (-2.0, 1.0)], "worse"),
        ([(0.0, 0.0), (0.0, 0.0)], "level"),
    ],
)
def test_better_and_worse_are_by_more_than_the_spread_over_folds(gains, expected):
    assert outcome_of(gains) == expected


def pairs_of(gains: dict[int, list[float]]) -> pd.DataFrame:
    """Errors of ST, and of a baseline A with 1 everywhere that ST is better than by so much, by fold."""
    of_st = [(fold, 1 - gain) for fold, some in gains.items() for gain in some]
    rows = [("ST", fold, i, error) for i, (fold, error) in enumerate(of_st)]
    rows += [(name, fold, i, error) for name, error in (("A", 1.0), ("B", 2.0)) for _, fold, i, _ in rows]
    return pd.DataFrame(rows, columns=["model", "fold", "pair", "mae"])


def test_the_gain_is_over_the_best_baseline_fold_by_fold():
    found = pairs_of({0: [0.1], 1: [0.5]})
    best, gain, spread = compared(found, "mae", -1)
    assert (best, gain) == ("A", pytest.approx(0.3))
    # a further fold lies within the spread two times of three, and two folds tell little of that
    draws = np.random.default_rng(0).normal(size=(100_000, 3))
    two = draws[:, :2].std(axis=1, ddof=1) * spread / np.std([0.1, 0.5], ddof=1)
    assert np.mean(np.abs(draws[:, 2] - draws[:, :2].mean(axis=1)) < two) == pytest.approx(0.68, abs=0.01)
    assert compared(found, "mae", 1)[0] == "B"
    # of a single pair nothing is known, and a hundredth of the error is nothing
    assert compared(pairs_of({0: [0.2]}), "mae", -1)[2] == pytest.approx(0.01)


def test_two_folds_that_are_alike_by_luck_are_not_trusted():
    draws = np.random.default_rng(0).normal(scale=0.3, size=(500, 2, 6))
    draws[:, 1] += draws[:, 0].mean(axis=-1, keepdims=True) - draws[:, 1].mean(axis=-1, keepdims=True)  # alike
    said = [compared(pairs_of({0: list(a), 1: list(b)}), "mae", -1)[1:] for a, b in draws]
    assert np.mean([abs(gain) > spread for gain, spread in said]) < 0.32


# -- the weight of the networks ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_context():
    """A screen of four contexts, and its folds."""
    adata = vc.datasets.synthetic(
        n_contexts=4, n_perturbations=6, n_genes=60, n_cells_per_group=20, n_control_cells=40, effect_size=0.5, seed=3
    )
    design = Design(perturbation_key="target_gene", control=CONTROL, context_key="cell_type", scale="counts")
    screen = Screen.from_anndata(adata, design)
    effects = Effects.measure(screen, screen.is_known)
    return folds(screen, effects, Asked("contexts")), effects


def stub(parts):
    """What trains an ST whose networks and transferred effect predict `parts(fold, start, perturbation)`."""

    def train(fold):
        def apart(start, perturbation, **_):
            return parts(fold, start, perturbation)

        def rows_from(start, **_):
            return np.arange(len(start.names))

        return SimpleNamespace(transferred=object(), apart=apart, rows_from=rows_from, forget_data=lambda: None)

    return train


def closed_form(fold, start, perturbation) -> np.ndarray:
    effects = fold.effects
    return start.base + additive(effects).effect([effects.perturbations.index(perturbation)])


def noise(perturbation: str, size: float, n: int = 60) -> np.ndarray:
    return size * np.random.default_rng(int(perturbation[-1])).normal(size=n)


def test_networks_that_are_right_get_all_the_weight_and_win(by_context):
    left_out, _ = by_context

    def parts(fold, start, perturbation):
        return fold.observed[start.context, perturbation], closed_form(fold, start, perturbation)

    found = judge(stub(parts), left_out, Asked("contexts"), None)
    assert (found.outcome, found.weight) == ("better", 1.0)
    assert found.scores.index[0] == "ST"
    assert found.scores.loc["ST", "mae"] == pytest.approx(0, abs=1e-6)
    start = "On left-out contexts ST is better than the best baseline: better in Pearson delta, 1 against 0."
    assert found.sentence.startswith(start)
    assert found.best == found.scores.index[1]


def test_networks_that_are_noise_get_none_and_st_is_what_is_left(by_context):
    left_out, _ = by_context

    def parts(fold, start, perturbation):
        known = closed_form(fold, start, perturbation)
        return known + noise(perturbation, 3.0), known

    found = judge(stub(parts), left_out, Asked("contexts"), None)
    assert found.weight == 0
    assert found.outcome != "better"
    assert found.scores.loc["ST", "mae"] == pytest.approx(found.scores.loc["Additive", "mae"], rel=0.02)


def test_a_model_that_is_wrong_in_all_parts_is_worse(by_context):
    left_out, _ = by_context
    found = judge(
        stub(lambda fold, start, p: (start.base + noise(p, 3.0), start.base - noise(p, 3.0))),
        left_out, Asked("contexts"), None,
    )  # fmt: skip
    assert found.outcome == "worse"


def test_no_fold_is_scored_with_a_weight_that_it_took_part_in_choosing(by_context):
    """Networks are right in one context and wrong in the others: that one is scored without them all the same."""
    left_out, _ = by_context
    wrong = 1.0

    def parts(fold, start, perturbation):
        real = fold.observed[start.context, perturbation]
        is_first = fold is left_out[0]
        return real + (0 if is_first else wrong), real + (wrong if is_first else 0)

    found = judge(stub(parts), left_out, Asked("contexts"), None)
    assert found.weight < 1
    # of the first fold by the others, which say 0: wrong by all; of each other one by a mix
    of_first = wrong
    assert found.scores.loc["ST", "mae"] * len(left_out) >= of_first - 1e-4
    every = [(fold, pair) for fold in left_out for pair in fold.observed]
    assert found.scores.loc["ST", "n_groups"] == len(every)
    assert found.weight in WEIGHTS


def test_scores_are_those_of_the_metrics(by_context):
    left_out, _ = by_context
    by_fold = []

    def parts(fold, start, perturbation):
        known = closed_form(fold, start, perturbation)
        real = fold.observed[start.context, perturbation]
        by_fold.append((id(fold), pearson_delta(known, real, start.base), mae(known, real)))
        return known, known

    found = judge(stub(parts), left_out, Asked("contexts"), None)
    expected = pd.DataFrame(by_fold, columns=["fold", "pearson_delta", "mae"]).groupby("fold").mean()
    for name in ("pearson_delta", "mae"):
        assert found.scores.loc["ST", name] == pytest.approx(expected[name].mean())
        assert found.scores.loc["ST", f"{name}_spread"] == pytest.approx(expected[name].std())


def test_the_weight_that_was_chosen_is_that_of_the_question_alone(screen, fit):
    st = fit(screen, split_key="split", validate=True)
    before = fit(screen, split_key="split")
    assert {k: v for k, v in st.mixture.networks.items() if k != "contexts"} == {
        k: v for k, v in before.mixture.networks.items() if k != "contexts"
    }
    assert st.mixture.networks["contexts"] in WEIGHTS
    # and the model is the one that was trained on all
    for a, b in zip(st.module.state_dict().values(), before.module.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert st.n_steps == before.n_steps


# -- what takes part --------------------------------------------------------------------------------------------------


def test_test_cells_take_no_part(screen, fit):
    other = screen.copy()
    rows = np.flatnonzero(other.obs["split"] == "test")
    other.X[rows] = other.X[rows[::-1]] * 3
    options = {"split_key": "split", "n_top_genes": None, **LOSES}
    fit(screen, **options)
    fit(other, **options)
    pd.testing.assert_frame_equal(*(d.uns["virtualcell"]["validation"] for d in (screen, other)))
    assert len({d.uns["virtualcell"]["verdict"] for d in (screen, other)}) == 1


def test_the_order_of_a_file_changes_no_bit_of_the_verdict(screen, fit):
    rng = np.random.default_rng(0)
    other = screen[rng.permutation(screen.n_obs), rng.permutation(screen.n_vars)].copy()
    options = {"split_key": "split", "n_top_genes": 60, "validate": True}
    one, two = fit(screen, **options), fit(other, **options)
    pd.testing.assert_frame_equal(one.validation, two.validation, check_exact=True)
    assert (one.verdict, one.mixture) == (two.verdict, two.mixture)


def test_features_bring_ridge_and_neighbours_and_new_perturbations(screen, fit, targets, caplog):
    features = pd.DataFrame(np.random.default_rng(0).normal(size=(5, 3)), index=targets)
    screen.obs["split"] = np.where(screen.obs["target_gene"] == targets[0], "test", "train")
    with caplog.at_level(logging.INFO, logger="virtualcell"):
        st = fit(screen, split_key="split", perturbation_features=features, validate=True)
    of_any = {"NoChange", "ContextMean", "PerturbationMean"}
    assert set(st.validation.index) == {"ST", *of_any, "Ridge", "NearestPerturbations"}
    assert "On left-out perturbations ST is" in st.verdict
    assert (st.validation["n_groups"] == 12).all()  # the four others in three contexts
    assert (st.validation["n_folds"] == 4).all()
    assert "Additive cannot predict all that is left out and is not compared with" in caplog.text


def test_new_combinations_are_asked_for(screen, fit, targets):
    a, b, c, d, e = targets
    labels = screen.obs["target_gene"].astype(str).replace({d: f"{a}+{b}", e: f"{b}+{c}"})
    # a third pair, of some cells of each of its parts, is held out
    third = f"{a}+{c}"
    rows = [np.flatnonzero((labels == part) & (screen.obs["cell_type"] == "type_1"))[:5] for part in (a, c)]
    labels.iloc[np.concatenate(rows)] = third
    screen.obs["target_gene"] = labels
    screen.obs["split"] = np.where(labels == third, "test", "train")
    st = fit(screen, split_key="split", validate=True)
    assert set(st.validation.index) == {"ST", *BASELINES}
    assert "On left-out perturbations ST is" in st.verdict
    assert (st.validation["n_groups"] == 6).all()  # two pairs in three contexts
    assert (st.validation["n_folds"] == 2).all()


def test_measured_pairs_are_asked_for(screen, fit):
    st = fit(screen, split_key="split", validate="cells")
    assert "On left-out cells of measured pairs ST is" in st.verdict
    assert (st.validation["n_folds"] == 2).all()
    assert (st.validation["n_groups"] == 20).all()  # ten pairs, each half of their cells
    assert set(st.validation.index) == {"ST", *BASELINES}


def test_in_embedding_space_st_is_judged_on_genes(screen, fit):
    network = {"use_rep": "X_pca", "decoder_hidden": (16,)}
    screen.obsm["X_pca"] = np.random.default_rng(0).normal(size=(screen.n_obs, 5)).astype(np.float32)
    st = fit(screen, split_key="split", network=network, validate=True)
    assert set(st.validation.index) == {"ST", *BASELINES}
    assert st.validation["mae"].between(0, 10).all()


def test_what_the_data_does_not_allow_to_ask_is_said(screen, fit, caplog):
    one = screen[(screen.obs["cell_type"] == "type_1").to_numpy()].copy()
    with caplog.at_level(logging.WARNING, logger="virtualcell"):
        st = fit(one, context_key=None, validate="contexts")
    (line,) = [r.getMessage() for r in caplog.records if "does not allow to ask" in r.getMessage()]
    assert "contexts" in line
    assert 'validate="cells"' in line
    assert (st.validation, st.verdict, st.fallback) == (None, None, None)
    assert not {"validation", "verdict"} & set(one.uns["virtualcell"])
    assert fit(one, context_key=None, validate="cells").verdict is not None  # the remedy works


def test_new_perturbations_without_features_are_no_reason_to_stop(screen, fit, targets):
    """ST cannot predict them; what it can be asked for is new contexts."""
    screen.obs["split"] = np.where(screen.obs["target_gene"] == targets[0], "test", "train")
    st = fit(screen, split_key="split", validate=True)
    assert st.verdict.startswith("On left-out contexts ST is")
    assert (st.validation["n_groups"] == 12).all()


def test_control_cells_are_read_no_more_often_the_more_targets_there_are(screen, fit, targets, rows_read):
    n = {}
    for n_targets in (2, 5):
        kept = screen[screen.obs["target_gene"].isin([*targets[:n_targets], CONTROL])].copy()
        n_perturbed = ((kept.obs["split"] == "train") & (kept.obs["target_gene"] != CONTROL)).sum()
        reads = []
        for validate in (False, "contexts"):
            rows_read.clear()
            fit(kept, split_key="split", validate=validate)
            reads.append(sum(rows_read))
        n[n_targets] = (reads[1] - reads[0], n_perturbed)
    (few, few_cells), (many, many_cells) = n.values()
    # what grows is the reading of perturbed cells: a few times in each of two folds
    assert many - few <= 6 * 2 * (many_cells - few_cells)
    assert few <= 8 * (120 + few_cells)


# -- the fallback -----------------------------------------------------------------------------------------------------


def test_fallback_is_asked_for_and_said(crippled_screen, crippled, targets, caplog):
    screen = crippled_screen
    plain = vc.tl.predict_perturbation(screen, targets[0], context="type_3")
    assert plain.uns["virtualcell"]["predicted_by"] == "ST"
    np.testing.assert_allclose(dense(plain.X), dense(plain.layers["control"]), atol=1e-4)  # it has learned nothing
    with caplog.at_level(logging.WARNING, logger="virtualcell"):
        better = vc.tl.predict_perturbation(screen, targets[0], context="type_3", fallback="best")
    name = type(crippled.fallback).__name__
    assert better.uns["virtualcell"]["predicted_by"] == name
    assert any(r.getMessage().startswith(f"{name} predicts") for r in caplog.records)
    own = vc.tl.predict_perturbation(screen, targets[0], context="type_3", model=crippled.fallback)
    np.testing.assert_array_equal(dense(better.X), dense(own.X))
    assert not np.array_equal(dense(better.X), dense(plain.X))


def test_the_fallback_has_learned_from_all_training_cells(crippled_screen, crippled, targets):
    """And not from a fold: it is the baseline that one would fit oneself."""
    log = crippled_screen[:, crippled.genes].copy()
    log.X = log1p_cp10k(crippled_screen.X.toarray())[:, crippled_screen.var_names.get_indexer(crippled.genes)]
    log.obs["split"] = log.obs["split"].astype(str).replace({"val": "test"})  # of which it has seen nothing
    kind = type(crippled.fallback)
    kind.setup_anndata(log, perturbation_key="target_gene", control=CONTROL, context_key="cell_type", split_key="split")
    own = kind(log)
    own.train()
    for context in ("type_1", "type_3"):
        one = own.predict(log, targets[0], context=context)
        other = crippled.fallback.predict(crippled_screen, targets[0], context=context)
        np.testing.assert_allclose(one, other[one.columns], atol=1e-4)


def test_fallback_predicts_what_st_can_and_its_baseline_too(crippled_screen, crippled, monkeypatch):
    screen = crippled_screen
    monkeypatch.setattr(crippled, "fallback", vc.models.ContextMean.__new__(vc.models.ContextMean))  # takes any name
    with pytest.raises(KeyError, match="perturbation='GENE_TYPO' is unknown"):
        vc.tl.predict_perturbation(screen, "GENE_TYPO", model=crippled, fallback="best")
    monkeypatch.setattr(crippled, "check_perturbation", lambda name: None)  # as with features
    log = screen.copy()
    sc.pp.normalize_total(log, target_sum=1e4)
    sc.pp.log1p(log)
    vc.models.Additive.setup_anndata(log, perturbation_key="target_gene", control=CONTROL)
    model = vc.models.Additive(log)
    model.train()
    monkeypatch.setattr(crippled, "fallback", model)
    with pytest.raises(KeyError, match=r"better model, Additive, cannot predict 'NEW'\. Leave fallback out"):
        vc.tl.predict_perturbation(screen, "NEW", model=crippled, fallback="best")


def test_files_keep_the_verdict(crippled_screen, crippled, targets, tmp_path):
    screen = crippled_screen
    expected = vc.tl.predict_perturbation(screen, targets[0], fallback="best")
    screen.write_h5ad(tmp_path / "screen.h5ad")
    again = ad.read_h5ad(tmp_path / "screen.h5ad")
    got = vc.tl.predict_perturbation(again, targets[0], fallback="best")
    np.testing.assert_array_equal(dense(got.X), dense(expected.X))
    pd.testing.assert_frame_equal(again.uns["virtualcell"]["validation"], crippled.validation, check_names=False)
    assert again.uns["virtualcell"]["verdict"] == crippled.verdict
    crippled.save(tmp_path / "model")
    loaded = vc.models.ST.load(tmp_path / "model")
    pd.testing.assert_frame_equal(loaded.validation, crippled.validation)
    assert (loaded.verdict, loaded.mixture) == (crippled.verdict, crippled.mixture)
    got = vc.tl.predict_perturbation(screen, targets[0], model=loaded, fallback="best")
    np.testing.assert_array_equal(dense(got.X), dense(expected.X))


def test_files_keep_the_weight_that_was_chosen(screen, fit, tmp_path):
    st = fit(screen, split_key="split", validate=True)
    st.mixture = st.mixture.with_networks("contexts", 0.25)
    st.save(tmp_path / "model")
    assert vc.models.ST.load(tmp_path / "model").mixture.networks == st.mixture.networks


def test_a_model_that_wins_or_is_level_needs_no_fallback(screen, fit, targets):
    # by default ST falls back on its transferred effect where networks of five steps are of no use
    st = fit(screen, split_key="split", validate=True)
    assert "worse than" not in st.verdict
    assert st.fallback is None
    predicted = vc.tl.predict_perturbation(screen, targets[0], fallback="best")
    assert predicted.uns["virtualcell"]["predicted_by"] == "ST"


def test_what_was_not_validated_has_no_better_one(screen, fit, targets):
    st = fit(screen)
    assert (st.validation, st.verdict) == (None, None)
    assert not {"validation", "verdict"} & set(screen.uns["virtualcell"])
    with pytest.raises(ValueError, match="fallback='best' needs an ST with a verdict"):
        vc.tl.predict_perturbation(screen, targets[0], fallback="best")
    with pytest.raises(ValueError, match="fallback='worst' is unknown; valid are 'best' and None"):
        vc.tl.predict_perturbation(screen, targets[0], fallback="worst")


def test_standard_errors_of_a_prediction(screen, fit, targets):
    fit(screen, split_key="split", training={"max_steps": 40, "lr": 3e-3})
    predicted = vc.tl.predict_perturbation(screen, targets[:2], n_samples=8)
    groups = predicted.obs.groupby(["target_gene", "cell_type"], observed=True).indices
    error, named = predicted.varm["standard_error"], predicted.uns["virtualcell"]["groups"]
    assert error.shape == (predicted.n_vars, len(groups)) == predicted.varm["change"].shape
    assert (error > 0).any(axis=0).all()
    assert list(named) == ["perturbation", "context"]
    for column, group in enumerate(named.itertuples(index=False)):
        rows = groups[tuple(group)]
        expected = np.sqrt(2 / np.pi) * error[:, column].mean()
        np.testing.assert_allclose(predicted.obs["expected_error"].to_numpy()[rows], expected, rtol=1e-5)
        moved = dense(predicted.X)[rows].mean(axis=0) - dense(predicted.layers["control"])[rows].mean(axis=0)
        assert np.corrcoef(moved, predicted.varm["change"][:, column])[0, 1] > 0.8  # cells are drawn
    again = vc.tl.predict_perturbation(screen, targets[:2], n_samples=8)
    np.testing.assert_array_equal(again.varm["standard_error"], error)
    # without draws, the error of cells that were left out, which is a part of the other
    known = vc.tl.predict_perturbation(screen, [*targets[:2], "non-targeting"])
    assert "expected_error" not in known.obs
    of_control = (known.uns["virtualcell"]["groups"]["perturbation"] == "non-targeting").to_numpy()
    assert not known.varm["standard_error"][:, of_control].any()
    assert (known.varm["standard_error"][:, ~of_control] > 0).any(axis=0).all()
    assert known.varm["standard_error"][:, ~of_control].sum() < error.sum()
    with pytest.raises(ValueError, match="n_samples=1: at least 2 draws"):
        vc.tl.predict_perturbation(screen, targets[0], n_samples=1)
