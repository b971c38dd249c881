from __future__ import annotations

import logging
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from mudata import MuData

import virtualcell as vc


@pytest.fixture(scope="module")
def kang(kang_file: Path) -> AnnData:
    return anndata.read_h5ad(kang_file)[::8].copy()


@pytest.fixture(scope="module")
def table(kang: AnnData) -> pd.DataFrame:
    """Vectors for most genes of the data, in another order, and for genes that it does not have."""
    rng = np.random.default_rng(0)
    genes = rng.permutation([*kang.var_names[rng.random(kang.n_vars) < 0.9], "NOT1", "NOT2"])
    return pd.DataFrame(rng.normal(size=(len(genes), 4)), index=genes)


@pytest.mark.parametrize("length", [64, 1024])
def test_equal_to_a_dense_loop_on_real_cells(kang: AnnData, table: pd.DataFrame, length: int) -> None:
    adata = kang.copy()
    vc.pp.cell_sentences(adata, table, length=length)
    dense = pd.DataFrame(adata.X.toarray(), columns=adata.var_names).reindex(columns=table.index, fill_value=0)
    for i in range(adata.n_obs):
        row = dense.iloc[i].to_numpy()
        order = [g for g in np.argsort(-row, kind="stable")[:length] if row[g] > 0]
        np.testing.assert_array_equal(adata.obsm["cell_sentence"][i, : len(order)], order)
        np.testing.assert_array_equal(adata.obsm["cell_sentence"][i, len(order) :], -1)
        np.testing.assert_allclose(
            adata.obsm["cell_sentence_expression"][i, : len(order)], np.log1p(row[order]), rtol=1e-6
        )
        assert not adata.obsm["cell_sentence_expression"][i, len(order) :].any()
    assert adata.obsm["cell_sentence"].dtype == np.int32
    assert adata.obsm["cell_sentence_expression"].dtype == np.float32
    token = adata.var["gene_token"]
    assert (table.index[token[token >= 0]] == adata.var_names[token >= 0]).all()
    assert not adata.var_names[token < 0].isin(table.index).any()
    assert (adata.X != kang.X).nnz == 0


def test_order_of_cells_and_genes_does_not_matter(kang: AnnData, table: pd.DataFrame) -> None:
    adata = kang.copy()
    vc.pp.cell_sentences(adata, table, length=300)
    rng = np.random.default_rng(1)
    rows = rng.permutation(adata.n_obs)
    shuffled = kang[rows][:, rng.permutation(adata.n_vars)].copy()
    vc.pp.cell_sentences(shuffled, table, length=300)
    for key in ("cell_sentence", "cell_sentence_expression"):
        np.testing.assert_array_equal(shuffled.obsm[key], adata.obsm[key][rows])


def test_log1p_values_are_taken_as_they_are(kang: AnnData, table: pd.DataFrame) -> None:
    adata = kang.copy()
    vc.pp.cell_sentences(adata, table, length=20, layer="lognorm", scale="log1p")
    genes = table.index[adata.obsm["cell_sentence"][0]]
    lognorm = adata[:, genes].layers["lognorm"][0]
    lognorm = np.asarray(lognorm.todense() if hasattr(lognorm, "todense") else lognorm).ravel()
    np.testing.assert_array_equal(adata.obsm["cell_sentence_expression"][0], lognorm.astype(np.float32))
    with pytest.raises(ValueError, match="scale='counts' was stated, but layers\\['lognorm'\\] holds fractions"):
        vc.pp.cell_sentences(adata, table, layer="lognorm")


def test_mudata_is_written_in_its_modality(cite_file: Path) -> None:
    import mudata

    mdata: MuData = mudata.read_h5mu(cite_file)
    genes = mdata.mod["rna"].var_names[::2]
    table = pd.DataFrame(np.ones((len(genes), 2)), index=genes)
    vc.pp.cell_sentences(mdata, table, length=30)
    assert mdata.mod["rna"].obsm["cell_sentence"].shape == (mdata.n_obs, 30)
    with pytest.raises(KeyError, match="modality='gex' is unknown"):
        vc.pp.cell_sentences(mdata, table, modality="gex")


def test_cells_without_a_gene_of_the_table_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    adata = AnnData(np.array([[1, 0], [0, 2]], np.float32), var=pd.DataFrame(index=["A", "B"]))
    with caplog.at_level(logging.WARNING, logger="virtualcell"):
        vc.pp.cell_sentences(adata, pd.DataFrame([[1.0]], index=["A"]), length=2)
    assert adata.obsm["cell_sentence"].tolist() == [[0, -1], [-1, -1]]
    assert caplog.messages == ["1 of 2 cells express no gene of the table: their sentences are empty."]


def test_wrong_arguments(kang: AnnData, table: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="length=0 is not a whole number of at least 1"):
        vc.pp.cell_sentences(kang, table, length=0)
    with pytest.raises(TypeError, match=r"Read a file with `vc\.pp.read_gene_embeddings"):
        vc.pp.cell_sentences(kang, "protein_embeddings.pt")
    with pytest.raises(KeyError, match="gene_key='symbols' is unknown"):
        vc.pp.cell_sentences(kang, table, gene_key="symbols")
