from __future__ import annotations

import logging
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from anndata import AnnData
from scipy import sparse

import virtualcell as vc
from virtualcell.data._read_expression import read_expression
from virtualcell.pp._coexpression import coexpression_vectors

ISGS = ["ISG15", "IFI6", "IFIT1", "IFIT3", "ISG20", "IFITM3", "IRF7"]
CYTOTOXIC = ["GNLY", "NKG7", "GZMB", "PRF1"]


@pytest.fixture(scope="module")
def kang(kang_file: Path) -> AnnData:
    adata = anndata.read_h5ad(kang_file)
    return adata[:, adata.X.getnnz(axis=0) >= 20].copy()


@pytest.fixture(scope="module")
def vectors(kang: AnnData) -> pd.DataFrame:
    return vc.pp.expression_gene_embeddings(kang, n_comps=32)


def dense_z(adata: AnnData) -> np.ndarray:
    """Log-normalise with scanpy and standardise densely."""
    adata = AnnData(adata.X.astype(np.float64), obs=adata.obs[[]], var=adata.var[[]])
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    x = adata.X.toarray()
    return (x - x.mean(0)) / x.std(0)


def test_genes_of_a_programme_are_near_each_other(kang: AnnData, vectors: pd.DataFrame) -> None:
    unit = vectors.div(np.linalg.norm(vectors, axis=1), axis=0)
    others = unit.drop(index=ISGS + CYTOTOXIC).sample(300, random_state=0)
    for programme in (ISGS, CYTOTOXIC):
        inside = (unit.loc[programme] @ unit.loc[programme].T).to_numpy()[np.triu_indices(len(programme), 1)]
        assert inside.min() > 0.6
        assert abs((unit.loc[programme] @ others.T).to_numpy().mean()) < 0.2
    nearest = (unit @ unit.loc["ISG15"]).nlargest(6).index
    assert set(nearest) <= {*ISGS, "IFIT2", "RSAD2", "TNFSF10"}


def test_leading_components_are_those_of_a_dense_svd(kang: AnnData) -> None:
    adata = kang[::3, :400].copy()
    adata = adata[np.asarray(adata.X.sum(axis=1)).ravel() > 0].copy()
    frame = vc.pp.expression_gene_embeddings(adata, n_comps=32)
    z = pd.DataFrame(dense_z(adata), columns=adata.var_names)[frame.index].to_numpy()
    _, s, vt = np.linalg.svd(z / np.sqrt(len(z)), full_matrices=False)
    ours = frame.to_numpy()
    np.testing.assert_allclose(np.linalg.norm(ours, axis=0)[:3], s[:3], rtol=1e-3)
    for i in range(3):
        assert abs(ours[:, i] @ vt[i]) / s[i] > 0.999
        assert ours[np.abs(ours[:, i]).argmax(), i] > 0
    # The rest is noise, where a subspace iteration comes close from below.
    assert (np.linalg.norm(ours, axis=0) <= s[:32] * (1 + 1e-6)).all()
    assert (np.linalg.norm(ours, axis=0) >= s[:32] * 0.97).all()
    np.testing.assert_allclose(frame.attrs["variance_explained"], (ours**2).sum() / len(frame), rtol=1e-5)


def test_all_components_give_the_correlation(kang: AnnData, caplog: pytest.LogCaptureFixture) -> None:
    adata = kang[:, :50].copy()
    adata.obs["total"] = np.asarray(kang.X.sum(axis=1)).ravel()
    with caplog.at_level(logging.WARNING, logger="virtualcell"):
        frame = vc.pp.expression_gene_embeddings(adata, n_comps=256, library_size_key="total")
    assert caplog.messages == [f"n_comps=256 is more than {adata.n_obs} cells x 50 genes allow: 49."]
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="virtualcell"):  # nothing to say where nobody asked for a number
        few = coexpression_vectors(read_expression(adata, library_size_key="total"))
    assert caplog.messages == []
    pd.testing.assert_frame_equal(few, frame)
    correlation = np.corrcoef(dense_z(kang)[:, :50].T)
    # What is missing is the least of the 50 components.
    np.testing.assert_allclose(
        np.linalg.norm(frame @ frame.T - correlation, 2), np.linalg.eigvalsh(correlation)[0], rtol=1e-3
    )


def test_order_of_cells_and_genes_does_not_matter(kang: AnnData, vectors: pd.DataFrame) -> None:
    rng = np.random.default_rng(0)
    shuffled = kang[rng.permutation(kang.n_obs)][:, rng.permutation(kang.n_vars)].copy()
    again = vc.pp.expression_gene_embeddings(shuffled, n_comps=32)
    assert list(again.index) == list(shuffled.var_names)
    assert again.index.name == vectors.index.name == "gene"
    np.testing.assert_allclose(again.loc[vectors.index], vectors, atol=1e-5)


def test_genes_that_do_not_vary_have_no_row(kang: AnnData, caplog: pytest.LogCaptureFixture) -> None:
    adata = kang[:200, :60].copy()
    adata = adata[np.asarray(adata.X.sum(axis=1)).ravel() > 0].copy()
    expressed = adata.var_names[np.asarray(adata.X.sum(axis=0)).ravel() > 0]
    log = np.log1p(adata.X.toarray())
    log[:, adata.var_names.get_loc(expressed[0])] = 0.7
    adata.layers["log"] = sparse.csr_matrix(log)
    with caplog.at_level(logging.INFO, logger="virtualcell"):
        frame = vc.pp.expression_gene_embeddings(adata, n_comps=5, layer="log", scale="log1p")
    assert len(expressed) < 60
    assert list(frame.index) == list(expressed[1:])
    assert f"{60 - len(frame)} of 60 genes do not vary among these cells: no row for them." in caplog.messages


def test_seed_and_errors(kang: AnnData, vectors: pd.DataFrame) -> None:
    other = vc.pp.expression_gene_embeddings(kang, n_comps=32, seed=1)
    np.testing.assert_allclose(other.iloc[:, :5], vectors.iloc[:, :5], atol=0.02)
    with pytest.raises(ValueError, match="n_comps=0 is not a whole number of at least 1"):
        vc.pp.expression_gene_embeddings(kang, n_comps=0)
    with pytest.raises(ValueError, match=r"2 cells with .* too few for co-expression"):
        vc.pp.expression_gene_embeddings(kang[:2].copy())
    doubled = AnnData(np.ones((50, 3), np.float32), var=pd.DataFrame(index=["A", "B", "A"]))
    with pytest.raises(ValueError, match=r"var_names repeats \['A'\].*var_names_make_unique"):
        vc.pp.expression_gene_embeddings(doubled)
    with pytest.raises(KeyError, match="layer='counts' is unknown"):
        vc.pp.expression_gene_embeddings(kang, layer="counts")
