from __future__ import annotations

import logging
import sys
import threading
import time

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest
import torch

import virtualcell as vc
from virtualcell import metrics
from virtualcell.tl import _scores

CONTROL = "non-targeting"
KEYS = {"perturbation_key": "target_gene", "control": CONTROL}
IN_CONTEXTS = {**KEYS, "context_key": "cell_type"}
# seven digits of distances, of which the energy distance is a difference
LOOSE = {"rtol": 1e-4, "atol": 1e-5}


def perturbed(adata: ad.AnnData) -> ad.AnnData:
    return adata[(adata.obs["target_gene"] != CONTROL).to_numpy()].copy()


def table(scores: pd.DataFrame) -> pd.Series:
    return scores.set_index(["source", "context", "perturbation", "metric"])["value"].sort_index()


@pytest.fixture(scope="module")
def halves(papalexi_log_halves):
    predicted, observed = papalexi_log_halves
    return perturbed(predicted), observed


@pytest.fixture(scope="module")
def no_effect(papalexi_log_halves):
    """Control cells of the first half as every perturbation: the floor."""
    control = papalexi_log_halves[0][(papalexi_log_halves[0].obs["target_gene"] == CONTROL).to_numpy()]
    names = sorted(set(papalexi_log_halves[1].obs["target_gene"]) - {CONTROL})
    parts = {n: control.copy() for n in names}
    for name, part in parts.items():
        part.obs["target_gene"] = name
    return ad.concat(parts, index_unique="-")


@pytest.fixture(scope="module")
def full(halves, no_effect):
    return vc.tl.evaluate(*halves, **KEYS, scale="log1p", suite="full", ceiling=True, baseline=no_effect)


# -- values -----------------------------------------------------------------------------------------------------------


def test_the_result_is_tidy(full, halves):
    assert list(full) == ["source", "context", "perturbation", "metric", "value"]
    assert not full.duplicated(["source", "context", "perturbation", "metric"]).any()
    model = full[full["source"] == "model"]
    assert set(model["metric"]) == set(_scores.METRICS)
    assert len(model) == 7 * (len(_scores.METRICS) - 2) + 2  # two have one value for all
    assert set(full["context"]) == {"(all)"}
    assert full.attrs["suite"] == "full"
    assert full.attrs["control"] == CONTROL
    assert full.attrs["n_cells"]["predicted"] == halves[0].n_obs
    assert full.attrs["n_cells"]["control"] == (halves[1].obs["target_gene"] == CONTROL).sum()
    assert set(full.attrs["versions"]) == {"virtualcell"}


def test_values_are_the_functions_of_metrics_on_dense_means(full, halves):
    predicted, observed = (
        {n: h[rows].X.toarray().astype(np.float64) for n, rows in h.obs.groupby("target_gene").indices.items()}
        for h in halves
    )
    control = observed[CONTROL].mean(axis=0)
    names = sorted(predicted)
    values = table(full)["model"]["(all)"]
    for name in names:
        x, y = predicted[name], observed[name]
        expected = {
            "mae": metrics.mae(x.mean(0), y.mean(0)),
            "mse": metrics.mse(x.mean(0), y.mean(0)),
            "pearson_delta": metrics.pearson_delta(x.mean(0), y.mean(0), control),
            "top50_overlap": metrics.top_overlap(x.mean(0), y.mean(0), control),
            "energy_distance": metrics.energy_distance(x, y),
            "variance_ratio": x.var(axis=0, ddof=1).sum() / y.var(axis=0, ddof=1).sum(),
        }
        for metric, value in expected.items():
            assert values[name, metric] == pytest.approx(value, rel=1e-4, abs=1e-6), (name, metric)
    means = [np.stack([side[n].mean(0) for n in names]) for side in (predicted, observed)]
    genes = list(halves[1].var_names)
    targets = [genes.index(n) if n in genes else -1 for n in names]
    assert max(targets) >= 0
    for metric in ("l1", "l2", "cosine"):
        scores = metrics.discrimination_score(*means, control, metric=metric, target_genes=targets)
        np.testing.assert_allclose(values.unstack()[f"discrimination_{metric}"].drop("(all)"), scores)
    norm = values.unstack()["pdisc_norm_l1"].drop("(all)")
    np.testing.assert_allclose(norm, 2 * values.unstack()["discrimination_l1"].drop("(all)") - 1)


def test_real_controls_are_the_reference_of_both_sides(full, halves):
    predicted, observed = halves
    one = "STAT1"
    stacked = ad.concat(
        [predicted[predicted.obs["target_gene"] == one], observed[observed.obs["target_gene"] == CONTROL]]
    )
    de = metrics.differential_expression(stacked.X, stacked.obs["target_gene"], control=CONTROL)
    real = metrics.differential_expression(observed.X, observed.obs["target_gene"], control=CONTROL)
    real = real[real["perturbation"] == one]
    found = metrics.de_overlap(
        de["log2_fold_change"], real["log2_fold_change"], predicted_fdr=de["fdr"], observed_fdr=real["fdr"]
    )
    assert table(full)["model", "(all)", one, "de_overlap"] == pytest.approx(found)


def test_the_truth_is_perfect(halves):
    observed = halves[1]
    scores = vc.tl.evaluate(perturbed(observed), observed, **KEYS, scale="log1p", suite="full")
    mean = scores.groupby("metric")["value"].mean()
    for name, metric in _scores.METRICS.items():
        if metric.best is None or name in ("de_overlap", "de_precision") or name.startswith(("de_overlap_", "de_prec")):
            continue
        # the estimate of MMD is unbiased, so that identical samples lie below 0
        assert mean[name] == pytest.approx(metric.best, abs=0.02 if name == "mmd" else 1e-5), name
    some = scores[(scores["metric"] == "de_n_observed") & (scores["value"] > 0)]["perturbation"]
    overlap = scores[(scores["metric"] == "de_overlap")].set_index("perturbation")["value"]
    assert (overlap[some] == 1).all()
    assert mean["variance_ratio"] == pytest.approx(1)


def test_the_ceiling_lies_between_the_floor_and_perfect(full):
    mean = full.groupby(["source", "metric"])["value"].mean().unstack("source")
    for name in (
        "pearson_delta",
        "discrimination_l1",
        "discrimination_cosine",
        "de_overlap",
        "top50_overlap",
        "roc_auc",
    ):
        assert mean.loc[name, "baseline"] < mean.loc[name, "ceiling"] < 1, name
    assert mean.loc["energy_distance", "ceiling"] > 0
    # the prediction is another half of the same cells, with twice as many of them
    assert mean.loc["pearson_delta", "model"] > mean.loc["pearson_delta", "ceiling"]
    assert mean.loc["mae", "model"] < mean.loc["mae", "ceiling"]


def test_the_ceiling_is_half_against_half_with_the_same_controls(halves):
    """Again by hand, for one perturbation, whose halves differ in each of five splits."""
    _, observed = halves
    one = observed[observed.obs["target_gene"].isin(["STAT1", CONTROL]).to_numpy()].copy()
    options = {**KEYS, "scale": "log1p", "suite": ["mae"], "ceiling": True}
    scores = vc.tl.evaluate(perturbed(one), one, **options)
    ceiling = table(scores)["ceiling", "(all)", "STAT1", "mae"]
    cells = perturbed(one).X.toarray()
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(200):
        rows = rng.permutation(len(cells))
        first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        draws.append(np.abs(cells[first].mean(0) - cells[second].mean(0)).mean())
    assert abs(ceiling - np.mean(draws)) < 4 * np.std(draws) / np.sqrt(5)
    again = vc.tl.evaluate(perturbed(one), one, **options, seed=1)
    assert table(again)["ceiling", "(all)", "STAT1", "mae"] != ceiling
    pd.testing.assert_frame_equal(scores, vc.tl.evaluate(perturbed(one), one, **options))


def test_perturbations_compete_within_their_context(screen):
    """Scoring all contexts at once is scoring one after the other."""
    options = {**IN_CONTEXTS, "scale": "counts", "predicted_scale": "counts", "suite": "full"}
    rng = np.random.default_rng(0)
    first = perturbed(screen)
    first = first[rng.permutation(first.n_obs) < first.n_obs // 2].copy()
    together = table(vc.tl.evaluate(first, screen, **options))
    for context in ("type_1", "type_2", "type_3"):
        here = [a[(a.obs["cell_type"] == context).to_numpy()].copy() for a in (first, screen)]
        alone = table(vc.tl.evaluate(*here, **options))
        np.testing.assert_allclose(together["model"][context], alone["model"][context], rtol=1e-9, atol=1e-9)


# -- what must not matter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drawn", [False, True])
def test_the_order_of_cells_and_genes_does_not_matter(halves, drawn, monkeypatch):
    if drawn:
        for name, n in (("MAX_CELLS", 50), ("MAX_CELLS_PCA", 30), ("_CELLS_OF_PCA", 300)):
            monkeypatch.setattr(_scores, name, n)
    options = {**KEYS, "scale": "log1p", "suite": "full", "ceiling": True}
    rng = np.random.default_rng(0)
    mixed = [h[rng.permutation(h.n_obs), rng.permutation(h.n_vars)].copy() for h in halves]
    scores = [table(vc.tl.evaluate(*pair, **options)) for pair in (halves, mixed)]
    np.testing.assert_allclose(*scores, **LOOSE)


def test_the_number_of_threads_and_the_format_do_not_matter(halves, full):
    dense = halves[0].copy()
    dense.X = dense.X.toarray()
    scores = vc.tl.evaluate(dense, halves[1], **KEYS, scale="log1p", suite="full", n_jobs=2)
    np.testing.assert_allclose(table(scores), table(full)["model"], **LOOSE)


def test_counts_are_what_they_are_normalised_to(papalexi_halves, halves, full):
    scores = vc.tl.evaluate(
        halves[0], papalexi_halves[1], **KEYS, scale="counts", library_size_key="total_counts", suite="full"
    )
    np.testing.assert_allclose(table(scores)["model"], table(full)["model"], **LOOSE)


def test_counts_of_both_sides_are_divided_by_the_same_totals(papalexi_halves, caplog):
    predicted, observed = perturbed(papalexi_halves[1]), papalexi_halves[1].copy()
    options = {**KEYS, "scale": "counts", "predicted_scale": "counts", "suite": ["mae"]}
    with_totals = vc.tl.evaluate(predicted, observed, **options, library_size_key="total_counts")
    assert observed.uns.pop("virtualcell")["design"]["library_size_key"] == "total_counts"  # noted, see above
    np.testing.assert_allclose(with_totals["value"], 0, atol=1e-6)
    nameless = predicted.copy()
    del nameless.obs["total_counts"]
    with pytest.raises(KeyError, match=r"library_size_key='total_counts' is unknown.*predicted\.obs has none"):
        vc.tl.evaluate(nameless, observed, **options, library_size_key="total_counts")
    panel = list(observed.var_names[:150])
    with caplog.at_level(logging.WARNING, logger="virtualcell"):
        vc.tl.evaluate(predicted, observed[:, panel].copy(), **options, genes=panel)
    assert "predicted has 303 genes and observed has 150: library sizes" in caplog.text
    with pytest.raises(ValueError, match="library_size_key='total_counts' has no use with scale='log1p'"):
        vc.tl.evaluate(predicted, observed, **KEYS, scale="log1p", library_size_key="total_counts")


def test_one_perturbation_cannot_be_told_apart(halves):
    predicted = halves[0][(halves[0].obs["target_gene"] == "STAT1").to_numpy()].copy()
    scores = vc.tl.evaluate(predicted, halves[1], **KEYS, scale="log1p", suite="vcc2025", baseline=predicted)
    told = scores["metric"].str.startswith("pdisc")
    assert told.any()
    assert scores.loc[told, "value"].isna().all()
    assert scores.loc[~told, "value"].notna().all()
    total = vc.tl.summarize(scores).set_index("metric").loc["challenge_score"]
    assert np.isnan(total["score"])


def test_the_default_suite_begins_with_what_the_guide_recommends(halves):
    scores = vc.tl.evaluate(*halves, **KEYS, scale="log1p")
    metrics_of = list(dict.fromkeys(scores["metric"]))
    assert metrics_of[:2] == ["pearson_delta", "mae"]
    assert {"energy_distance", "variance_ratio", "discrimination_cosine"} <= set(metrics_of)
    assert scores["value"].notna().all()


def test_what_is_not_defined_has_no_ceiling_either(halves, no_effect):
    options = {**KEYS, "scale": "log1p", "suite": ["de_spearman_n", "pearson_edistance", "mae"], "ceiling": True}
    found = {}
    for name, predicted in (("nothing", no_effect), ("half", halves[0])):
        scores = vc.tl.evaluate(predicted, halves[1], **options)
        scores = scores[scores["perturbation"] == "(all)"]
        found[name] = scores.pivot(index="metric", columns="source", values="value").isna()
    assert not found["half"].loc["pearson_edistance"].any()
    assert found["nothing"].loc["de_spearman_n", "model"]
    assert (found["nothing"]["model"] == found["nothing"]["ceiling"]).all()
    assert not found["half"].loc["de_spearman_n", "ceiling"]


def test_the_design_is_noted_for_later_calls(halves):
    predicted, observed = (half.copy() for half in halves)
    observed.uns.pop("virtualcell", None)
    with pytest.raises(ValueError, match=r"perturbation_key and control must be given: no earlier call, such as"):
        vc.tl.evaluate(predicted, observed, scale="log1p")
    first = vc.tl.evaluate(predicted, observed, **KEYS, scale="log1p", suite=["mae"])
    pd.testing.assert_frame_equal(vc.tl.evaluate(predicted, observed, suite=["mae"]), first)
    part = observed[observed.obs["target_gene"].isin(["STAT1", CONTROL]).to_numpy()]
    one = predicted[(predicted.obs["target_gene"] == "STAT1").to_numpy()]
    part = ad.AnnData(part.X, obs=part.obs, var=part.var)[:]
    vc.tl.evaluate(one, part, **KEYS, scale="log1p", suite=["mae"])
    assert part.is_view  # it was not copied to be written to
    assert not part.uns


def test_a_baseline_must_have_been_scored_on_the_same_genes_and_cells(halves):
    predicted, observed = halves
    options = {**KEYS, "scale": "log1p", "suite": ["mae"]}
    for other in ({"genes": observed.var_names[:30]}, {}):
        cells = observed if other else observed[::2].copy()
        before = vc.tl.evaluate(predicted, cells, **options, **other)
        with pytest.raises(ValueError, match=r"baseline was scored with .*on the same observed"):
            vc.tl.evaluate(predicted, observed, **options, baseline=before)


def test_predictions_of_the_package_are_scored_with_its_own_design(screen, fit, targets):
    fit(screen)
    predicted = vc.tl.predict_perturbation(screen, targets, context="type_3")
    scores = vc.tl.evaluate(predicted, screen, genes=list(predicted.var_names))
    assert set(scores["context"]) == {"type_3"}
    assert set(scores["perturbation"]) == set(targets)
    assert scores["value"].notna().all()
    assert scores.attrs["scale"] == "counts"
    assert scores.attrs["n_genes"] == predicted.n_vars


def test_the_genes_that_a_model_predicts_are_scored_unless_others_are_named(screen, fit, targets, design, caplog):
    st = fit(screen, n_top_genes=50)
    predicted = vc.tl.predict_perturbation(screen, targets, model=st, context="type_3")
    assert predicted.n_vars < screen.n_vars
    quick = {"suite": ["mae"], "scale": "counts"}
    with caplog.at_level("INFO", logger="virtualcell"):
        scores = vc.tl.evaluate(predicted, screen, **quick)
    assert f"Scored are the {len(st.genes)} genes that the model predicts, of 90 in observed." in caplog.text
    named = vc.tl.evaluate(predicted, screen, **quick, genes=st.genes)
    assert scores["value"].tolist() == named["value"].tolist()
    predicted.uns.clear()  # of somebody else, who may have lost genes
    with pytest.raises(KeyError, match="predicted lacks"):
        vc.tl.evaluate(predicted, screen, **design, scale="counts")


def test_one_bar_shows_what_is_scored(halves, capfd):
    vc.tl.evaluate(*halves, **KEYS, scale="log1p", suite=["mae"], ceiling=True)
    (line,) = capfd.readouterr().err.rstrip("\n").split("\n")
    assert line.split("\r")[-1].startswith("evaluation, 2 of 2, ceiling of (all) |")


def test_threads_of_torch_are_left_alone(halves):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    vc.tl.evaluate(*halves, **KEYS, scale="log1p", suite="full", n_jobs=1)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


def test_mudata_and_another_modality(halves):
    predicted, observed = halves
    mdata = md.MuData({"gex": observed})
    scores = vc.tl.evaluate(md.MuData({"gex": predicted}), mdata, **KEYS, scale="log1p", modality="gex")
    pd.testing.assert_frame_equal(scores, vc.tl.evaluate(predicted, observed, **KEYS, scale="log1p"))


def test_genes_restrict_both_sides_and_library_sizes_stay(screen):
    options = {**IN_CONTEXTS, "scale": "counts", "predicted_scale": "counts", "suite": ["mae", "pearson_delta"]}
    predicted, some = perturbed(screen), list(screen.var_names[10:40])
    scores = vc.tl.evaluate(predicted, screen, **options, genes=some)
    assert scores.attrs["n_genes"] == 30
    assert (scores.loc[scores["metric"] == "mae", "value"] == 0).all()
    # totals over 30 genes would have been smaller, and the error not 0
    cut = screen[:, some].copy()
    assert (vc.tl.evaluate(predicted, cut, **options, genes=some)["value"] > 0).any()
    with pytest.raises(KeyError, match=r"genes='.*' is unknown.*that observed lacks"):
        vc.tl.evaluate(predicted, cut, **options)


def test_a_baseline_may_be_scored_before(halves, no_effect, full):
    options = {**KEYS, "scale": "log1p", "suite": "full"}
    before = vc.tl.evaluate(no_effect, halves[1], **options)
    scores = vc.tl.evaluate(*halves, **options, baseline=before)
    np.testing.assert_allclose(table(scores)["baseline"], table(full)["baseline"])
    with pytest.raises(ValueError, match="baseline was scored on other contexts, perturbations or metrics"):
        vc.tl.evaluate(*halves, **KEYS, scale="log1p", suite="vcc2025", baseline=before)
    fewer = no_effect[(no_effect.obs["target_gene"] != "STAT1").to_numpy()].copy()
    with pytest.raises(ValueError, match="baseline has other perturbations or contexts than predicted"):
        vc.tl.evaluate(*halves, **options, baseline=fewer)


def test_perturbations_of_one_cell_have_no_ceiling(halves, caplog):
    _, observed = halves
    rows = np.flatnonzero(observed.obs["target_gene"] == "CUL3")[1:]
    cut = observed[np.setdiff1d(np.arange(observed.n_obs), rows)].copy()
    scores = vc.tl.evaluate(perturbed(cut), cut, **KEYS, scale="log1p", suite="full", ceiling=True)
    assert "1 perturbations of (all) have one cell and no ceiling" in caplog.text
    assert "CUL3" not in set(scores.loc[scores["source"] == "ceiling", "perturbation"])
    assert np.isnan(table(scores)["model", "(all)", "CUL3", "mmd"])


def wrong_in_its_target(predicted):
    """The prediction for a gene that was perturbed is far off in that gene."""
    cells = predicted.X.toarray()
    for i, name in enumerate(predicted.obs["target_gene"]):
        if name in predicted.var_names:
            cells[i, predicted.var_names.get_loc(name)] = 8.5
    predicted = predicted.copy()
    predicted.X = cells
    return predicted


def test_a_label_that_names_the_control_too_is_of_the_same_gene(halves):
    options = {**KEYS, "scale": "log1p", "suite": ["discrimination_l1", "discrimination_cosine"]}
    names = {"STAT1": f"STAT1+{CONTROL}", "JAK2": f"{CONTROL}+JAK2"}
    written = [h.copy() for h in halves]
    for half in written:
        half.obs["target_gene"] = half.obs["target_gene"].replace(names)
    predicted = wrong_in_its_target(halves[0])
    written[0].X = predicted.X
    expected = vc.tl.evaluate(predicted, halves[1], **options).set_index(["perturbation", "metric"])["value"]
    found = vc.tl.evaluate(*written, **options).set_index(["perturbation", "metric"])["value"]
    np.testing.assert_allclose(found.rename(index={v: k for k, v in names.items()})[expected.index], expected)


def test_genes_of_another_name_are_found_by_the_design_that_was_noted(halves):
    options = {"scale": "log1p", "suite": ["discrimination_l1", "discrimination_cosine"]}
    halves = wrong_in_its_target(halves[0]), halves[1]
    renamed = [h.copy() for h in halves]
    for half in renamed:
        half.var["symbol"] = half.var_names
        half.var_names = [f"ENSG{i:05d}" for i in range(half.n_vars)]
    renamed[1].uns["virtualcell"] = {"design": {**KEYS, "gene_key": "symbol"}}
    del renamed[0].var["symbol"]  # measured cells say how genes are called
    np.testing.assert_array_equal(
        vc.tl.evaluate(*renamed, **options)["value"], vc.tl.evaluate(*halves, **KEYS, **options)["value"]
    )
    del renamed[1].uns["virtualcell"]
    kept = vc.tl.evaluate(*renamed, **KEYS, **options)["value"]
    assert (kept != vc.tl.evaluate(*halves, **KEYS, **options)["value"]).any()


def test_totals_of_predicted_cells_may_scatter_and_those_of_measured_cells_not(halves):
    predicted, observed = (h.copy() for h in halves)
    for half in (predicted, observed):
        totals = np.random.default_rng(0).uniform(11_000, 15_000, half.n_obs)
        counts = half.X.expm1()
        counts = counts.multiply((totals / np.asarray(counts.sum(axis=1)).ravel())[:, None]).tocsr()
        half.X = counts.log1p().astype(np.float32)
    options = {**KEYS, "scale": "log1p", "suite": ["mae"]}
    assert vc.tl.evaluate(predicted, halves[1], **options)["value"].notna().all()
    with pytest.raises(ValueError, match=r"X of observed was normalised to 1\S+ counts per cell"):
        vc.tl.evaluate(halves[0], observed, **options)


def test_calls_in_threads_leave_stderr_alone(halves, capfd, monkeypatch):
    monkeypatch.setattr(vc.settings, "progress", False)
    stderr, found = sys.stderr, []
    options = {**KEYS, "scale": "log1p", "suite": ["de_overlap"]}
    expected = vc.tl.evaluate(*halves, **options)
    calls = [
        threading.Thread(target=lambda n=n: found.append(vc.tl.evaluate(*halves, **options, n_jobs=n))) for n in (1, -1)
    ]
    for call in calls:
        call.start()
    while any(c.is_alive() for c in calls):
        assert sys.stderr is stderr
        time.sleep(1e-3)
    for scores in found:
        pd.testing.assert_frame_equal(scores, expected)
    assert len(found) == 2
    assert capfd.readouterr().err == ""


# -- errors -----------------------------------------------------------------------------------------------------------


def test_errors_name_the_argument_and_the_remedy(halves, papalexi_log_halves, screen):
    predicted, observed = (half.copy() for half in halves)
    observed.uns.pop("virtualcell", None)
    stated = {**KEYS, "scale": "log1p"}
    with pytest.raises(ValueError, match="scale must be given"):
        vc.tl.evaluate(predicted, observed, **KEYS)
    with pytest.raises(ValueError, match=r"^scale='counts' was stated, but X of observed holds fractions"):
        vc.tl.evaluate(predicted, observed, **KEYS, scale="counts")
    with pytest.raises(ValueError, match="perturbation_key must be given"):
        vc.tl.evaluate(predicted, observed, control=CONTROL, scale="log1p")
    with pytest.raises(KeyError, match=r"suite='vcc2024' is unknown. Did you mean 'vcc202"):
        vc.tl.evaluate(predicted, observed, **stated, suite="vcc2024")
    with pytest.raises(KeyError, match="suite='pearson' is unknown"):
        vc.tl.evaluate(predicted, observed, **stated, suite=["mae", "pearson"])
    with pytest.raises(KeyError, match=r"suite='mae' is unknown.*in a list: suite=\['mae'\]"):
        vc.tl.evaluate(predicted, observed, **stated, suite="mae")
    with pytest.raises(ValueError, match="predicted_scale='raw' is unknown"):
        vc.tl.evaluate(predicted, observed, **stated, predicted_scale="raw")
    with pytest.raises(ValueError, match=r"^predicted_scale='counts' was stated, but X of predicted holds fractions"):
        vc.tl.evaluate(predicted, observed, **stated, predicted_scale="counts")
    for genes in ("STAT1", []):
        with pytest.raises(ValueError, match="must be a list of one or more names"):
            vc.tl.evaluate(predicted, observed, **stated, genes=genes)
    with pytest.raises(ValueError, match="names no metric"):
        vc.tl.evaluate(predicted, observed, **stated, suite=[])
    with pytest.raises(KeyError, match="control='DMSO' is unknown"):
        vc.tl.evaluate(predicted, observed, **{**stated, "control": "DMSO"})
    with pytest.raises(KeyError, match="predicted: context_key='donor' is unknown"):
        vc.tl.evaluate(predicted, observed, **stated, context_key="donor")
    with pytest.raises(ValueError, match=r"predicted has 'non-targeting' cells.*predicted_control=True"):
        vc.tl.evaluate(papalexi_log_halves[0], observed, **stated)
    with pytest.raises(ValueError, match="predicted_control=True, but predicted has no 'non-targeting' cells"):
        vc.tl.evaluate(predicted, observed, **stated, predicted_control=True)
    only = papalexi_log_halves[0][(papalexi_log_halves[0].obs["target_gene"] == CONTROL).to_numpy()].copy()
    with pytest.raises(ValueError, match="predicted holds no perturbed cells"):
        vc.tl.evaluate(only, observed, **stated, predicted_control=True)
    odd = predicted.copy()
    odd.obs["target_gene"] = odd.obs["target_gene"].replace("STAT1", "STAT11")
    with pytest.raises(KeyError, match=r"predicted: perturbation='STAT11' is unknown. Did you mean 'STAT1'"):
        vc.tl.evaluate(odd, observed, **stated)
    with pytest.raises(KeyError, match=r"predicted lacks 3 of 303.*genes=observed.var_names.intersection"):
        vc.tl.evaluate(predicted[:, 3:].copy(), observed, **stated)
    with pytest.raises(KeyError, match="predicted has 3 that observed lacks"):
        vc.tl.evaluate(predicted, observed[:, 3:].copy(), **stated)
    twice = predicted.copy()
    twice.var_names = [twice.var_names[1], *twice.var_names[1:]]
    with pytest.raises(ValueError, match=r"var_names of predicted repeats.*var_names_make_unique"):
        vc.tl.evaluate(twice, observed, **stated)
    with pytest.raises(TypeError, match="baseline='mean' must be predicted cells"):
        vc.tl.evaluate(predicted, observed, **stated, baseline="mean")
    moved = perturbed(screen)
    moved.obs["cell_type"] = "type_9"
    with pytest.raises(KeyError, match="no such cells of context 'type_9'"):
        vc.tl.evaluate(moved, screen, **IN_CONTEXTS, scale="counts", predicted_scale="counts")
