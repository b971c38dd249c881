from __future__ import annotations

import logging

import joblib
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import virtualcell as vc
from virtualcell._threads import count_threads
from virtualcell.models import Additive
from virtualcell.models._effects import Effects
from virtualcell.tl import _benchmark, benchmark

SUITE = ["pearson_delta", "mae"]
TINY_ST = {
    "training": {"max_steps": 5, "validate_every": 50},
    "network": {"n_hidden": 32, "n_feedforward": 64, "n_layers": 1, "set_size": 16},
}


@pytest.fixture
def run(screen, design):
    def run(models, data=None, **options) -> pd.DataFrame:
        if "splits" not in options:
            options["split_key"] = "split"
        options = {"suite": SUITE, "n_top_genes": 60, **options}
        return benchmark(screen if data is None else data, models, **design, **options)

    return run


def values(scores, model, metric="mae") -> np.ndarray:
    chosen = scores[(scores["model"] == model) & (scores["metric"] == metric)]
    return chosen.sort_values(["split", "seed", "context", "perturbation"])["value"].to_numpy()


def test_rows(run, targets):
    scores = run(["Additive"])
    assert list(scores) == ["split", "seed", "source", "model", "context", "perturbation", "metric", "value"]
    assert set(scores["split"]) == {"split"}
    assert set(scores["context"]) == {"type_3"}
    assert set(scores["perturbation"]) == set(targets)
    n = scores.groupby(["source", "model", "seed"]).size().to_dict()
    per_run = len(SUITE) * len(targets)
    assert n == {
        ("model", "Additive", 0): per_run,
        ("floor", "NoChange", 0): per_run,
        ("floor", "PerturbationMean", 0): per_run,
        **{(of, of, seed): per_run for seed in (0, 1, 2) for of in ("ceiling", "corrected ceiling")},
    }
    assert scores["value"].notna().all()
    assert scores.attrs["models"] == ["Additive"]
    assert 60 <= scores.attrs["n_genes"]["split"] <= 65
    assert (values(scores, "NoChange", "pearson_delta") == 0).all()


def test_the_numbers_are_those_of_evaluate(run, screen, design, targets):
    scores = run(["Additive"], n_top_genes=None, ceiling=False, floor=())
    logs = screen.copy()
    logs.X = logs.X.toarray()
    logs.X = np.log1p(1e4 * logs.X / logs.X.sum(axis=1, keepdims=True))
    Additive.setup_anndata(logs, **design, split_key="split")
    model = Additive(logs)
    model.train()
    predicted = vc.tl.predict_perturbation(logs, targets, context="type_3", model=model)
    test = (logs.obs["split"] == "test") | (logs.obs["target_gene"] == "non-targeting")
    expected = vc.tl.evaluate(predicted, logs[test.to_numpy()], **design, suite=SUITE, scale="log1p")
    both = scores.merge(expected, on=["context", "perturbation", "metric"])
    assert len(both) == len(scores) == len(expected)
    np.testing.assert_allclose(both["value_x"], both["value_y"], atol=1e-5)


def test_several_splits_by_name_and_by_what_is_held_out(run, screen, targets):
    screen.obs["mine"] = np.where(screen.obs["target_gene"] == targets[0], "test", "train")
    splits = {"type_1 unseen": {"contexts": ["type_1"]}, "by column": "mine"}
    scores = run(["ContextMean"], splits=splits, ceiling=False)
    found = scores.groupby("split")[["context", "perturbation"]].agg(lambda names: sorted(set(names)))
    assert found.loc["type_1 unseen"].tolist() == [["type_1"], targets]
    assert found.loc["by column"].tolist() == [["type_1", "type_2", "type_3"], [targets[0]]]


def test_models_are_scored_on_counts_by_the_challenge(run, screen, targets):
    pytest.importorskip("cell_eval2")
    options = {"suite": "vcc2026", "seeds": (0,), "floor": ("NoChange",), "n_cells": 20}
    scores = run({"Additive": "Additive", "ST": ("ST", TINY_ST)}, **options)
    assert {"Additive", "ST", "NoChange"} <= set(scores["model"])
    assert scores.loc[scores["model"] == "Additive", "metric"].nunique() > 3
    logs = screen.copy()
    counts = logs.X.toarray().astype(np.float64)
    logs.X = sparse.csr_matrix(np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True)).astype(np.float32))
    again = run(["Additive"], logs, scale="log1p", **options)
    both = [s[s["model"] == "Additive"].set_index(["perturbation", "metric"])["value"] for s in (scores, again)]
    pd.testing.assert_series_equal(*(scores.sort_index() for scores in both))
    logs.X.data *= np.random.default_rng(0).uniform(0.9, 1, logs.X.nnz).astype(np.float32)
    with pytest.raises(ValueError, match="are not made of whole counts"):
        run(["Additive"], logs, scale="log1p", **options)


def test_without_counts_what_models_return_is_scored_with_a_warning(run, screen, caplog, monkeypatch):
    log = np.log1p(screen.X.toarray() / screen.X.sum(axis=1).A1[:, None] * 1e4)
    screen.X = (log * np.random.default_rng(0).uniform(0.9, 1, log.shape)).astype(np.float32)
    kept, evaluate = [], _benchmark.evaluate
    monkeypatch.setattr(_benchmark, "evaluate", lambda p, *args, **kw: kept.append(p.X) or evaluate(p, *args, **kw))
    with caplog.at_level(logging.WARNING):
        scores = run(["Additive"], scale="log1p", ceiling=False, floor=())
    assert "What models return is scored as it is" in caplog.text
    assert isinstance(kept[0], np.ndarray)
    assert np.isfinite(values(scores, "Additive")).all()


def test_what_test_cells_hold_changes_no_prediction(run, screen, monkeypatch):
    kept, evaluate = [], _benchmark.evaluate
    monkeypatch.setattr(_benchmark, "evaluate", lambda p, *args, **kw: kept.append(p.X) or evaluate(p, *args, **kw))
    models = ["Additive", "NearestContext", "ContextMean"]
    before = run(models, ceiling=False)
    x = screen.X.toarray()
    test = (screen.obs["split"] == "test").to_numpy()
    x[test] = np.random.default_rng(0).permuted(x[test], axis=1)
    screen.X = sparse.csr_matrix(x)
    after = run(models, ceiling=False)
    assert before.attrs["n_genes"] == after.attrs["n_genes"]
    for one, other in zip(kept[:5], kept[5:], strict=True):
        np.testing.assert_array_equal(one.toarray(), other.toarray())
    assert not np.allclose(values(before, "Additive"), values(after, "Additive"))


def test_st_once_with_each_seed_and_baselines_once(run, targets):
    scores = run({"ST": ("ST", TINY_ST), "mine": Additive}, seeds=(3, 4), floor=["NoChange"])
    assert scores.groupby("model")["seed"].agg(lambda s: sorted(set(s))).to_dict() == {
        "ST": [3, 4],
        "mine": [3],
        "NoChange": [3],
        "ceiling": [3, 4],
        "corrected ceiling": [3, 4],
    }
    one, other = (values(scores[scores["seed"] == s], "ST") for s in (3, 4))
    assert not np.allclose(one, other)


def test_a_summary_puts_models_beside_each_other(run):
    scores = run({"ST": ("ST", TINY_ST), "Additive": "Additive"}, seeds=(0, 1), suite=["mae", "pearson_delta"])
    table = vc.tl.summarize(scores)
    assert list(table) == ["split", "model", "mae", "mae_spread", "pearson_delta", "pearson_delta_spread"]
    assert set(table["model"]) == set(scores["model"])
    assert list(table["model"])[-2:] == ["ceiling", "corrected ceiling"]
    of_st = scores[scores["model"] == "ST"].query("metric == 'mae'").groupby("seed")["value"].mean()
    row = table.set_index("model").loc["ST"]
    assert (row["mae"], row["mae_spread"]) == (pytest.approx(of_st.mean()), pytest.approx(of_st.std()))
    assert np.isnan(table.set_index("model").loc["Additive", "mae_spread"])
    once = vc.tl.summarize(scores[scores["seed"] == 0])
    assert list(once) == ["split", "model", "mae", "pearson_delta"]
    shuffled = vc.tl.summarize(scores.sample(frac=1, random_state=0)).set_index("model")
    pd.testing.assert_frame_equal(
        shuffled.loc[table["model"], list(table)[2:]], table.set_index("model")[list(table)[2:]]
    )


def test_data_is_left_as_it_was(run, screen):
    before = screen.copy()
    run({"ST": ("ST", TINY_ST)}, seeds=(0,), splits={"a": {"contexts": ["type_1"]}})
    assert list(screen.obs) == list(before.obs)
    assert set(screen.uns) == set(before.uns)
    assert (screen.X != before.X).nnz == 0


def test_order_of_cells_and_genes_changes_nothing(run, screen):
    rng = np.random.default_rng(0)
    permuted = screen[rng.permutation(screen.n_obs), rng.permutation(screen.n_vars)].copy()
    one, other = (run(["NearestContext"], data) for data in (screen, permuted))
    keys = ["seed", "source", "model", "context", "perturbation", "metric"]
    one, other = (s.sort_values(keys).reset_index(drop=True) for s in (one, other))
    assert one[keys].equals(other[keys])
    np.testing.assert_allclose(one["value"], other["value"], atol=1e-5)


def test_a_model_that_cannot_predict_is_left_out_with_a_warning(run, screen, targets, caplog):
    names = sorted(screen.var_names)
    features = pd.DataFrame(np.random.default_rng(0).normal(size=(len(names), 3)), index=names)
    with caplog.at_level(logging.WARNING):
        scores = run(
            ["Additive", "Ridge"],
            splits={"unseen": {"perturbations": [targets[0]]}},
            perturbation_features=features,
            min_cells=1,
        )
    assert set(scores["model"]) == {"Ridge", "NoChange", "PerturbationMean", "ceiling", "corrected ceiling"}
    assert f"Additive is left out of split 'unseen': perturbation='{targets[0]}' is unknown" in caplog.text


def test_errors(run, screen, design):
    with pytest.raises(KeyError, match=r"models='Aditive' is unknown\. Did you mean 'Additive'"):
        run(["Aditive"])
    with pytest.raises(TypeError, match=r"models='Additive' must be a list of names, \['Additive'\]"):
        run("Additive")
    with pytest.raises(ValueError, match=r"either split_key=, .* or splits="):
        benchmark(screen, ["Additive"], **design)
    with pytest.raises(ValueError, match=r"seeds=\(\) is empty"):
        run(["Additive"], seeds=())
    for none in ([], {}):
        with pytest.raises(ValueError, match="names no model"):
            run(none)
    with pytest.raises(ValueError, match=r"splits={} holds nothing"):
        run(["Additive"], split_key=None, splits={})
    with pytest.raises(ValueError, match="n_top_genes=0: at least one gene"):
        run(["Additive"], n_top_genes=0)
    with pytest.raises(ValueError, match="n_cells=0 is not a whole number of at least 1"):
        run(["Additive"], n_cells=0)
    in_test = ((screen.obs["cell_type"] == "type_3") & (screen.obs["target_gene"] == "non-targeting")).to_numpy()
    with pytest.raises(ValueError, match=r"context 'type_3' has no control cells .* to start from"):
        run(["Additive"], screen[~in_test].copy())
    screen.obs["split"] = "train"
    with pytest.raises(ValueError, match="split 'split' has no test cells"):
        run(["Additive"])


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        (
            {"ST": ("ST", {"trainin": {}})},
            {},
            r"^models\['ST'\]: argument='trainin' is unknown\. Did you mean 'training'",
        ),
        ({"ST": ("ST", {"split_key": "split"})}, {}, r"argument='split_key' is unknown.*are the same for all models"),
        ({"ST": ("ST", {"training": {"max_step": 5}})}, {}, r"option='max_step' is unknown\. Did you mean 'max_steps'"),
        ({"ST": ("ST", {"network": {"n_hiden": 5}})}, {}, r"option='n_hiden' is unknown\. Did you mean 'n_hidden'"),
        ({"ST": ("ST", {"network": {"use_rep": "X_pca"}})}, {}, r"^use_rep='X_pca' has no use here"),
        ({"ST": ("ST", {"training": {"val_fraction": 0.2}})}, {}, r"^val_fraction=0\.2 has no use with split_key"),
        ({"ST": ("ST", {"size": "tiny"})}, {}, r"^size='tiny' is unknown"),
        ({"ST": ("ST", {"training": {"freeze": ["project_out"]}})}, {}, r"^freeze and lora need init_from="),
        ({"mine": ("Ridge", {"k": 5})}, {}, r"^models\['mine'\]: argument='k' is unknown"),
        (["Ridge"], {}, r"^models\['Ridge'\] predicts from features of perturbations: give perturbation_features="),
        (["Additive"], {"floor": ["NoChang"]}, r"^floor='NoChang' is unknown\. Did you mean 'NoChange'"),
        (["Additive"], {"suite": ["peason_delta"]}, r"^suite='peason_delta' is unknown\. Did you mean 'pearson_delta'"),
        (["Additive"], {"n_jobs": 0}, r"^n_jobs=0 must be a number of threads"),
    ],
)
def test_what_is_wrong_shows_before_anything_is_fitted(run, monkeypatch, models, options, message):
    monkeypatch.setattr(vc.models.ST, "train", lambda *_, **__: pytest.fail("a model is trained"))
    with pytest.raises((KeyError, ValueError), match=message):
        run(
            {"first": ("ST", TINY_ST), **(models if isinstance(models, dict) else dict.fromkeys(models, models[0]))},
            **options,
        )


@pytest.mark.parametrize("n_targets", [2, 5])
def test_cells_are_read_once_whatever_is_fitted(run, screen, targets, rows_read, monkeypatch, n_targets):
    scored, evaluate = [], _benchmark.evaluate

    def counted(*args, **kwargs):
        before = len(rows_read)
        scores = evaluate(*args, **kwargs)
        scored.append(sum(rows_read[before:]))
        return scores

    monkeypatch.setattr(_benchmark, "evaluate", counted)
    kept = screen[screen.obs["target_gene"].isin([*targets[:n_targets], "non-targeting"])].copy()
    models = ["Additive", "NearestContext", "ContextMean"]
    run(models, kept, ceiling=False, n_top_genes=None)
    n = kept.obs["split"].value_counts()
    # effects of training and control cells, and with validation cells for baselines; test and control cells to score;
    # control cells to start from
    assert sum(rows_read) - sum(scored) == 2 * n["train"] + n["val"] + (n["test"] + 120) + 120
    predicted = n_targets * 40
    assert scored == [predicted + n["test"] + 40] * 5  # of the context with test cells, for each model and the floor


def test_effects_are_measured_once_for_all_models(run, monkeypatch):
    calls, measure = [], Effects.measure
    monkeypatch.setattr(Effects, "measure", lambda *args: calls.append(args) or measure(*args))
    run({"ST": ("ST", TINY_ST), "Additive": Additive, "NearestContext": "NearestContext"}, seeds=(0, 1), ceiling=False)
    assert len(calls) == 2  # what ST transfers, of training cells; what baselines learn from, with validation cells


def test_baselines_learn_from_all_cells_that_are_not_test(run, screen, design):
    scores = run(["Additive"], ceiling=False, n_top_genes=None)
    moved = screen.copy()
    moved.obs["split"] = moved.obs["split"].astype(str).replace("val", "train")
    again = run(["Additive"], moved, ceiling=False, n_top_genes=None)
    np.testing.assert_array_equal(*(s.loc[s["model"] == "Additive", "value"] for s in (scores, again)))


def test_all_cores_give_the_same_scores(run, monkeypatch):
    asked, count = [], count_threads
    monkeypatch.setattr("virtualcell.tl._evaluate.count_threads", lambda n: asked.append((n, count(n))) or count(n))
    one = run(["Additive"], seeds=(0,))
    every = run(["Additive"], seeds=(0,), n_jobs=-1)
    assert set(asked) == {(1, 1), (-1, joblib.cpu_count())}
    pd.testing.assert_frame_equal(one, every)


def test_predictions_beyond_all_counts_of_a_cell_are_cut_with_a_warning(run, monkeypatch, caplog):
    monkeypatch.setattr(Additive, "predict_cells", lambda self, cells, *args, **kwargs: cells + 8)
    with caplog.at_level(logging.WARNING):
        scores = run(["Additive"], ceiling=False)
    assert "predicts more than all counts of a cell" in caplog.text
    assert np.isfinite(values(scores, "Additive")).all()
