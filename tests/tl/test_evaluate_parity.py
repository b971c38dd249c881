"""`cell-eval` 0.8 on the same real cells gives the same numbers, and where it does not, this shows why."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import virtualcell as vc
from virtualcell import metrics

cell_eval = pytest.importorskip("cell_eval")

THEIRS = {
    "pearson_delta": "pearson_delta",
    "mae": "mae",
    "mse": "mse",
    "mae_delta": "mae_delta",
    "mse_delta": "mse_delta",
    **{f"discrimination_score_{m}": f"discrimination_{m}" for m in ("l1", "l2", "cosine")},
    "overlap_at_N": "de_overlap",
    "precision_at_N": "de_precision",
    **{f"{m}_at_{k}": f"de_{m}_{k}" for m in ("overlap", "precision") for k in (50, 100, 200, 500)},
    "de_sig_genes_recall": "de_recall",
    "de_direction_match": "de_direction_match",
    "de_spearman_lfc_sig": "de_spearman_lfc",
    "pr_auc": "pr_auc",
    "roc_auc": "roc_auc",
    "de_nsig_counts_pred": "de_n_predicted",
    "de_nsig_counts_real": "de_n_observed",
    "de_spearman_sig": "de_spearman_n",
    "pearson_edistance": "pearson_edistance",
}
# written by numpy in float32 there: the distances of a set have seven digits, their differences fewer
LOOSE = {"pearson_edistance": 1e-5}


def evaluator(predicted, observed, key, control, tmp_path_factory) -> cell_eval.MetricsEvaluator:
    return cell_eval.MetricsEvaluator(
        predicted.copy(),
        observed.copy(),
        control_pert=control,
        pert_col=key,
        num_threads=1,
        outdir=str(tmp_path_factory.mktemp("cell_eval")),
    )


def theirs(evaluator: cell_eval.MetricsEvaluator, *skipped: str) -> pd.DataFrame:
    skipped = ["clustering_agreement", *skipped]
    results, _ = evaluator.compute(write_csv=False, skip_metrics=skipped, break_on_error=True)
    return pd.DataFrame(results.to_dict(as_series=False)).set_index("perturbation")


def ours(predicted, observed, key, control, **options) -> pd.DataFrame:
    options = {"suite": "full", "scale": "log1p", "predicted_control": True, **options}
    scores = vc.tl.evaluate(predicted, observed, perturbation_key=key, control=control, **options)
    wide = scores.pivot(index="perturbation", columns="metric", values="value")
    return wide.drop(index="(all)").fillna(wide.loc["(all)"].dropna())


@pytest.fixture(scope="module")
def papalexi(papalexi_log_halves, tmp_path_factory):
    halves = papalexi_log_halves
    run = evaluator(*halves, "target_gene", "non-targeting", tmp_path_factory)
    return run, theirs(run), ours(*halves, "target_gene", "non-targeting")


@pytest.fixture(scope="module")
def kang(kang_file, tmp_path_factory):
    """Monocytes and CD4 T cells in halves, the 600 genes with the most counts, IFN-beta in either type."""
    adata = ad.read_h5ad(kang_file)
    genes = np.sort(np.argsort(-np.asarray(adata.X.sum(axis=0)).ravel(), kind="stable")[:600])
    size = adata.obs["total_counts"].to_numpy()[:, None]
    cells = ad.AnnData(adata.X.multiply(1e4 / size).tocsr()[:, genes].log1p().astype(np.float32), obs=adata.obs)
    cells.var_names = adata.var_names[genes]
    cells.obs["group"] = adata.obs["cell_type_coarse"].astype(str) + " " + adata.obs["perturbation"].astype(str)
    cells = cells[cells.obs["cell_type_coarse"].isin(["Mono", "CD4T"]).to_numpy()].copy()
    first = np.random.default_rng(0).permutation(cells.n_obs) < cells.n_obs // 2
    return cells[first].copy(), cells[~first].copy()


@pytest.mark.parametrize("name", THEIRS)
def test_papalexi_in_halves(papalexi, name):
    _, expected, scores = papalexi
    expected = expected[name].astype(float)
    assert len(expected) == 7
    np.testing.assert_allclose(
        scores[THEIRS[name]].reindex(expected.index), expected, rtol=0, atol=LOOSE.get(name, 1e-6)
    )


def test_the_halves_have_something_to_agree_on(papalexi):
    scores = papalexi[2]
    assert (scores["de_n_observed"] > 10).sum() >= 3
    assert 0.2 < scores["de_overlap"].mean() < 0.9
    assert scores["de_spearman_lfc"].nunique() > 2


def spearman_without_pseudocount(predicted, observed) -> float:
    tables = [
        metrics.differential_expression(c.X, c.obs["perturbation"], control="control", pseudocount=0)
        for c in (predicted, observed)
    ]
    lfc = [t["log2_fold_change"].to_numpy() for t in tables]
    return metrics.de_spearman_lfc(*lfc, observed_fdr=tables[1]["fdr"])


def test_kang_context_by_context(kang, tmp_path_factory):
    predicted, observed = kang
    scores = vc.tl.evaluate(
        predicted,
        observed,
        perturbation_key="perturbation",
        control="control",
        context_key="cell_type_coarse",
        suite="full",
        scale="log1p",
        predicted_control=True,
    )
    for context, rows in scores.groupby("context"):
        here = [h[(h.obs["cell_type_coarse"] == context).to_numpy()] for h in kang]
        run = evaluator(*here, "perturbation", "control", tmp_path_factory)
        expected = theirs(run, "pearson_edistance").loc["IFN-beta"]
        values = rows.set_index("metric")["value"]
        for name, mine in THEIRS.items():
            if mine in ("de_spearman_n", "pearson_edistance"):  # one perturbation has no correlation
                assert np.isnan(values[mine])
            elif mine.startswith("discrimination"):  # nor anything to be told apart from, which is perfect there
                assert np.isnan(values[mine])
                assert expected[name] == 1
            elif mine == "de_spearman_lfc":  # genes that no control cell has tie at infinity there, and are ranked here
                assert values[mine] == pytest.approx(float(expected[name]), abs=1e-3)
                tied = spearman_without_pseudocount(*here)
                assert tied == pytest.approx(float(expected[name]), abs=1e-6), context
            else:
                assert values[mine] == pytest.approx(float(expected[name]), rel=0, abs=1e-6), (context, name)


def test_differential_expression_is_that_of_pdex(papalexi, papalexi_log_halves):
    """The same statistic, corrected for ties and continuity. Fold changes differ where a gene is absent on one side."""
    observed = papalexi_log_halves[1]
    table = papalexi[0].de_comparison.real.data
    expected = pd.DataFrame(
        {c: table[c].to_list() for c in ("target", "feature", "p_value", "fdr", "log2_fold_change")}
    )
    expected = expected.set_index(["target", "feature"])
    for pseudocount, infinite in ((0.0, True), (1e-9, False)):
        found = metrics.differential_expression(
            observed.X,
            observed.obs["target_gene"],
            control="non-targeting",
            genes=observed.var_names,
            pseudocount=pseudocount,
        )
        found = found.astype({"perturbation": str}).set_index(["perturbation", "gene"]).loc[expected.index]
        for column in ("p_value", "fdr"):  # float32 there
            np.testing.assert_allclose(found[column], expected[column], rtol=2e-6, atol=1e-30)
        one_sided = np.isinf(expected["log2_fold_change"])
        assert one_sided.any()
        if infinite:
            np.testing.assert_allclose(
                found["log2_fold_change"], expected["log2_fold_change"], rtol=1e-5, atol=1e-5
            )  # float32 means there
        else:
            assert np.isfinite(found["log2_fold_change"]).all()
            both = ~one_sided
            np.testing.assert_allclose(
                found.loc[both, "log2_fold_change"], expected.loc[both, "log2_fold_change"], rtol=1e-4, atol=1e-4
            )


@pytest.fixture
def flat(papalexi_log_halves):
    """A prediction of no effect at all: every perturbation gets the same cells as the control."""
    observed = papalexi_log_halves[1]
    control = observed[(observed.obs["target_gene"] == "non-targeting").to_numpy()][:100]
    parts = []
    for name in observed.obs["target_gene"].unique():
        part = control.copy()
        part.obs["target_gene"] = name
        parts.append(part)
    return ad.concat(parts, index_unique="-"), observed


def test_where_they_differ_by_design(flat, tmp_path_factory):
    """Ties, and what is not defined: a prediction without effect."""
    expected = theirs(evaluator(*flat, "target_gene", "non-targeting", tmp_path_factory))
    scores = ours(*flat, "target_gene", "non-targeting")
    # all real effects are equally far: there the order of the names decides, here each tie counts half, which is chance
    cosine = expected["discrimination_score_cosine"].astype(float)
    assert cosine.nunique() == len(cosine)
    np.testing.assert_allclose(scores["discrimination_cosine"], 1 - 3 / 7)
    # no correlation with nothing
    assert expected["pearson_delta"].isna().all()
    assert (scores["pearson_delta"] == 0).all()
    # nobody's numbers of significant genes vary
    assert scores["de_spearman_n"].isna().all()
    # what both define agrees as ever
    np.testing.assert_allclose(scores["mae"], expected["mae"].astype(float).reindex(scores.index), atol=1e-6)
    np.testing.assert_allclose(scores["de_overlap"], expected["overlap_at_N"].astype(float).reindex(scores.index))


def test_genes_absent_from_the_control_rank_by_size_and_not_by_chance(tmp_path_factory):
    """Infinite fold changes tie in cell-eval; with scanpy's pseudocount the more abundant gene comes first."""
    rng = np.random.default_rng(0)
    labels = np.repeat(["control", "A", "B"], 60)
    counts = rng.poisson(2.0, (180, 30)).astype(np.float32)
    perturbed = labels != "control"
    for gene, mean in enumerate((1.0, 3.0, 9.0)):
        counts[:, gene] = np.where(perturbed, 1 + rng.poisson(mean, 180), 0)
    cells = ad.AnnData(
        sparse.csr_matrix(np.log1p(counts)), obs=pd.DataFrame({"target": labels}, index=np.arange(180).astype(str))
    )
    cells.var_names = [f"g{i}" for i in range(30)]
    table = metrics.differential_expression(cells.X, labels, control="control", genes=cells.var_names)
    one = table[table["perturbation"] == "A"].set_index("gene")
    assert list(one["log2_fold_change"].nlargest(3).index) == ["g2", "g1", "g0"]
    run = evaluator(cells, cells, "target", "control", tmp_path_factory).de_comparison.real.data
    assert sum(np.isinf(run["log2_fold_change"].to_numpy())) == 6
