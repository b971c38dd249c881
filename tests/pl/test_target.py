from __future__ import annotations

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pytest

import virtualcell as vc


def test_log_expression_means_and_residual(papalexi):
    ax = vc.pl.target_expression(papalexi, perturbation="STAT1")
    cp10k = papalexi[:, "STAT1"].X.toarray().ravel() / papalexi.obs["total_counts"].to_numpy() * 1e4
    target = papalexi.obs["target_gene"].to_numpy()
    control, treated = cp10k[target == "non-targeting"], cp10k[target == "STAT1"]
    told = f"STAT1 in rep_1, rep_2, rep_3: expression at {treated.mean() / control.mean():.0%} of control"
    assert ax.get_title().replace("\n", " ") == told
    assert treated.mean() / control.mean() < 0.25  # STAT1 is knocked out
    assert [t.get_text() for t in ax.get_legend().texts] == [
        f"non-targeting ({len(control)}): mean {control.mean():.3g} CP10k, {np.mean(control > 0):.0%} above 0",
        f"STAT1 ({len(treated)}): mean {treated.mean():.3g} CP10k, {np.mean(treated > 0):.0%} above 0",
    ]
    at = [line.get_xdata()[0] for line in ax.lines]
    np.testing.assert_allclose(at, np.log1p([control.mean(), treated.mean()]), rtol=1e-5)


def test_counts_are_drawn_as_they_were_measured(norman_file):
    adata = ad.read_h5ad(norman_file)
    ax = vc.pl.target_expression(
        adata, perturbation="TMSB4X", context="K562", values="counts",
        perturbation_key="target_gene", control="non-targeting", context_key="cell_type",
    )  # fmt: skip
    counts = adata[:, "TMSB4X"].X.toarray().ravel()
    k562 = (adata.obs["cell_type"] == "K562").to_numpy()
    target = adata.obs["target_gene"].to_numpy()
    groups = [counts[k562 & (target == name)] for name in ("non-targeting", "TMSB4X")]
    residual = groups[1].mean() / groups[0].mean()
    assert residual > 5  # CRISPR activation
    assert ax.get_title() == f"TMSB4X in K562: expression at {residual:.0%} of control"
    assert ax.get_xlabel() == "TMSB4X, counts per cell"
    for patch, values in zip(ax.patches, groups, strict=True):
        steps = patch.get_path().vertices
        edges = np.unique(steps[:, 0])
        np.testing.assert_allclose(np.diff(edges), edges[1] - edges[0])
        assert (edges[0], (edges[1] - edges[0]) % 1) == (-0.5, 0)
        share = np.histogram(values, edges)[0] / len(values)
        assert steps[:, 1].max() == pytest.approx(share.max())


def test_gene_of_another_name_and_pooled_contexts(kang_file):
    adata = ad.read_h5ad(kang_file)
    keys = {"perturbation_key": "perturbation", "control": "control", "context_key": "cell_type_coarse"}
    _, ax = plt.subplots()
    assert vc.pl.target_expression(adata, perturbation="IFN-beta", gene="ISG15", context="B", **keys, ax=ax) is ax
    assert len(plt.get_fignums()) == 1
    assert ax.get_title().startswith("IFN-beta in B: ISG15 at ")
    # Contexts in which nothing was perturbed do not enter the control.
    part = adata[(adata.obs["perturbation"] == "control") | (adata.obs["cell_type_coarse"] == "B")].copy()
    pooled = vc.pl.target_expression(part, perturbation="IFN-beta", gene="ISG15", **keys)
    assert [t.get_text() for t in pooled.get_legend().texts] == [t.get_text() for t in ax.get_legend().texts]


def test_gene_that_control_cells_lack(papalexi):
    adata = papalexi[:, ["STAT1", "JAK2"]].copy()
    adata.X = adata.X.toarray()
    adata.X[(adata.obs["target_gene"] == "non-targeting").to_numpy(), 0] = 0
    title = vc.pl.target_expression(adata, perturbation="STAT1").get_title()
    assert title.replace("\n", " ").endswith(": expression not detected in control")


def test_errors(papalexi):
    with pytest.raises(KeyError, match=r"gene='STAT11' is unknown. Did you mean 'STAT1'.*gene=\."):
        vc.pl.target_expression(papalexi, perturbation="STAT1", gene="STAT11")
    with pytest.raises(KeyError, match="perturbation='IRF1' is unknown"):
        vc.pl.target_expression(papalexi, perturbation="IRF1", gene="STAT1")
    with pytest.raises(ValueError, match=r"values='raw' is unknown. Say 'log1p' or 'counts'."):
        vc.pl.target_expression(papalexi, perturbation="STAT1", values="raw")
    with pytest.raises(ValueError, match="values='counts' was asked for, but scale='log1p' was stated"):
        vc.pl.target_expression(papalexi, perturbation="STAT1", values="counts", scale="log1p")
