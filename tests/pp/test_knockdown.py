from __future__ import annotations

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

import virtualcell as vc

DESIGN = {"perturbation_key": "target_gene", "control": "non-targeting"}
IN_PANEL = ["CMTM6", "IFNGR2", "JAK2", "NFKBIA", "STAT1", "STAT2", "STAT3", "TNFRSF14", "UBE2L6"]


def toy(target: dict[str, list[tuple[float, ...]]]) -> ad.AnnData:
    """Cells with 1,000 counts, of which those of genes A and B are given per label."""
    rows = [(label, *values) for label, cells in target.items() for values in cells]
    counts = np.array([[*values, 1000 - sum(values)] for _, *values in rows], dtype=np.float32)
    obs = pd.DataFrame({"target_gene": [r[0] for r in rows]}, index=[f"cell{i}" for i in range(len(rows))])
    return ad.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=["A", "B", "rest"]))


@pytest.fixture(scope="module")
def papalexi(papalexi_file) -> md.MuData:
    mdata = md.read_h5mu(papalexi_file)
    return mdata[mdata.obs["guide_confident"].astype(bool)].copy()


@pytest.fixture(scope="module")
def papalexi_table(papalexi) -> pd.DataFrame:
    return vc.pp.knockdown_efficiency(papalexi, **DESIGN, library_size_key="total_counts")


def test_papalexi_residuals_as_published_and_all_nine_fall(papalexi_table):
    table = papalexi_table.set_index("target")
    for target, residual in {"STAT1": 0.18, "JAK2": 0.20, "STAT2": 0.51, "IFNGR2": 0.65}.items():
        assert table.loc[target, "residual"] == pytest.approx(residual, abs=0.01)
    assert sorted(table.index[table["direction"] == "down"]) == IN_PANEL
    assert sorted(table.index[table["direction"] == "unmeasured"]) == sorted(set(table.index) - set(IN_PANEL))
    assert sorted(table.index[table["responded"].fillna(False)]) == ["JAK2", "STAT1"]
    assert table["responded"].isna().sum() == 25 - 9


def test_papalexi_table_against_an_independent_computation(papalexi, papalexi_table):
    rna = papalexi["rna"]
    cp10k = rna.X.toarray().astype(float) * 1e4 / rna.obs["total_counts"].to_numpy()[:, None]
    label = rna.obs["target_gene"].astype(str).to_numpy()
    pvalues = []
    for target in IN_PANEL:
        values = cp10k[:, rna.var_names.get_loc(target)]
        own, other = values[label == target], values[label == "non-targeting"]
        row = papalexi_table.set_index("target").loc[target]
        assert row["mean"] == pytest.approx(own.mean(), rel=1e-5)
        assert row["control_mean"] == pytest.approx(other.mean(), rel=1e-5)
        assert (row["n_cells"], row["n_control"]) == (len(own), len(other))
        assert row["n_responding"] == (own <= 0.5 * other.mean()).sum()
        pvalues.append(stats.mannwhitneyu(own, other).pvalue)
        np.testing.assert_allclose(rna.obs["knockdown"][label == target], own / other.mean(), rtol=1e-4)
    found = papalexi_table.set_index("target").loc[IN_PANEL]
    # In float32 a few cells tie that do not in float64.
    np.testing.assert_allclose(found["pvalue"], pvalues, rtol=1e-3)
    np.testing.assert_allclose(found["pvalue_adj"], stats.false_discovery_control(found["pvalue"]), rtol=1e-12)


def test_papalexi_filter_drops_weak_targets_and_escaping_cells_only(papalexi, papalexi_table):
    obs = papalexi["rna"].obs
    kept = obs.groupby("target_gene", observed=True)["knockdown_responded"].mean()
    measured_but_weak = set(IN_PANEL) - {"STAT1", "JAK2"}
    assert (kept[sorted(measured_but_weak)] == 0).all()
    assert (kept.drop(IN_PANEL) == 1).all()  # controls and unmeasured targets
    assert obs.loc[~obs["target_gene"].isin(IN_PANEL), "knockdown"].isna().all()
    for target in ("STAT1", "JAK2"):
        own = obs[obs["target_gene"] == target]
        assert ((own["knockdown"] <= 0.5) == own["knockdown_responded"]).all()
        assert 0.8 < own["knockdown_responded"].mean() < 1


def test_norman_activation_is_told_apart_and_every_target_of_a_pair_is_reported(norman_file):
    adata = ad.read_h5ad(norman_file)
    arguments = DESIGN | {"context_key": "cell_type", "library_size_key": "total_counts"}
    table = vc.pp.knockdown_efficiency(adata, **arguments, direction="up")
    measured = table[table["direction"] != "unmeasured"]
    assert measured[["context", "target", "direction"]].to_numpy().tolist() == [["K562", "TMSB4X", "up"]]
    assert measured["residual"].item() == pytest.approx(9.2, abs=0.3)
    assert measured["responded"].item()
    # Every combination has one row per target, and every (context, perturbation) is reported.
    pairs = table[table["perturbation"].str.contains("+", regex=False)]
    assert (pairs.groupby(["context", "perturbation"]).size() == 2).all()
    as_knockdown = vc.pp.knockdown_efficiency(adata, **arguments)
    row = as_knockdown.set_index("target").loc["TMSB4X"]
    assert row["direction"] == "up"
    assert not row["responded"]
    assert not adata.obs.loc[adata.obs["target_gene"] == "TMSB4X", "knockdown_responded"].any()


def test_each_context_has_its_own_controls():
    one = toy({"A": [(10, 0)] * 40, "non-targeting": [(100, 0)] * 40})
    other = toy({"A": [(10, 0)] * 40, "non-targeting": [(10, 0)] * 40})
    adata = ad.concat({"x": one, "y": other}, label="context", index_unique="-")
    table = vc.pp.knockdown_efficiency(adata, **DESIGN, context_key="context").set_index("context")
    assert table["residual"].to_dict() == pytest.approx({"x": 0.1, "y": 1.0}, rel=1e-5)
    assert table["direction"].to_dict() == {"x": "down", "y": "flat"}
    assert adata.obs.groupby("context", observed=True)["knockdown_responded"].sum().to_dict() == {"x": 80, "y": 40}


def test_a_combination_is_judged_by_its_weakest_target():
    adata = toy({"A+B": [(10, 20)] * 40, "A+non-targeting": [(10, 20)] * 40, "non-targeting": [(100, 50)] * 40})
    table = vc.pp.knockdown_efficiency(adata, **DESIGN).set_index(["perturbation", "target"])
    assert table.index.tolist() == [("A+non-targeting", "A"), ("A+B", "A"), ("A+B", "B")]
    assert table["residual"].tolist() == pytest.approx([0.1, 0.1, 0.4], rel=1e-5)
    # Each cell passes 0.5, but the mean of B does not pass 0.3.
    assert table["n_responding"].tolist() == [40, 40, 40]
    assert table["responded"].tolist() == [True, False, False]
    both = adata.obs["target_gene"] == "A+B"
    np.testing.assert_allclose(adata.obs.loc[both, "knockdown"], 0.4, rtol=1e-5)


def test_thresholds_and_the_least_number_of_cells_decide():
    # 30 of 40 cells at a residual of 0.2, ten at 0.6: mean 0.3.
    adata = toy({"A": [(20, 0)] * 30 + [(60, 0)] * 10, "non-targeting": [(100, 0)] * 40})
    table = vc.pp.knockdown_efficiency(adata, **DESIGN, threshold=0.3001)
    assert table["n_responding"].item() == 30
    assert table["responded"].item()
    assert adata.obs["knockdown_responded"].tolist() == [True] * 30 + [False] * 10 + [True] * 40
    assert not vc.pp.knockdown_efficiency(adata, **DESIGN, threshold=0.3001, min_cells=31)["responded"].item()
    assert not vc.pp.knockdown_efficiency(adata, **DESIGN, threshold=0.2999)["responded"].item()
    everyone = vc.pp.knockdown_efficiency(adata, **DESIGN, threshold=0.3001, cell_threshold=0.61)
    assert everyone["n_responding"].item() == 40


def test_a_target_that_no_control_expresses_cannot_be_judged():
    adata = toy({"A": [(5, 0)] * 40, "B": [(50, 1)] * 40, "non-targeting": [(50, 0)] * 40})
    table = vc.pp.knockdown_efficiency(adata, **DESIGN).set_index("target")
    assert table["direction"].to_dict() == {"A": "down", "B": "unmeasured"}
    assert table.loc["B", "mean"] == pytest.approx(10, rel=1e-5)
    assert adata.obs["knockdown_responded"].all()


def test_scale_gene_names_and_order_do_not_change_the_result(papalexi, papalexi_table):
    rna = papalexi["rna"]
    rng = np.random.default_rng(0)
    other = rna[rng.permutation(rna.n_obs), rng.permutation(rna.n_vars)].copy()
    size = other.obs["total_counts"].to_numpy()
    other.layers["lognorm"] = sparse.csr_matrix(other.X.multiply(1e4 / size[:, None])).log1p()
    other.var["symbol"] = other.var_names
    other.var_names = [f"ENSG{i}" for i in range(other.n_vars)]
    table = vc.pp.knockdown_efficiency(other, **DESIGN, layer="lognorm", scale="log1p", gene_key="symbol")
    pd.testing.assert_frame_equal(table, papalexi_table, rtol=1e-4)
    assert other.uns["virtualcell"]["design"]["gene_key"] == "symbol"


def test_results_survive_files(papalexi, papalexi_table, tmp_path):
    papalexi["rna"].write_h5ad(tmp_path / "rna.h5ad")
    again = ad.read_h5ad(tmp_path / "rna.h5ad")
    table = again.uns["virtualcell"]["knockdown"].reset_index(drop=True)
    pd.testing.assert_frame_equal(table, papalexi_table, check_dtype=False)
    assert again.obs["knockdown_responded"].dtype == bool


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"control": "NT"}, KeyError, "control='NT' is unknown"),
        ({"direction": "lower"}, ValueError, "direction='lower' is unknown"),
        ({"gene_key": "symbol"}, KeyError, "gene_key='symbol' is unknown"),
        ({"gene_key": "ensembl"}, ValueError, r"None of the 1 targets, such as 'A', is in var\['ensembl'\].*'ENSG0'"),
        ({"gene_key": "twice"}, ValueError, "Target 'A' stands for 2 genes"),
        ({"context_key": "context"}, ValueError, r"Context 'y' has no control cells \('non-targeting'\)"),
    ],
)
def test_errors_name_what_was_wrong(arguments, error, message):
    adata = toy({"A": [(10, 0)] * 3, "non-targeting": [(100, 0)] * 3})
    adata.var = adata.var.assign(ensembl=["ENSG0", "ENSG1", "ENSG2"], twice=["A", "A", "B"])
    adata.obs["context"] = ["x", "x", "y", "x", "x", "x"]
    with pytest.raises(error, match=message):
        vc.pp.knockdown_efficiency(adata, **(DESIGN | arguments))
