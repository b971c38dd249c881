from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from anndata import AnnData
from scipy import sparse

from virtualcell._errors import UnknownNameError
from virtualcell.data._matrix import columns_by_name, log_expression, raw_matrix


@pytest.fixture(scope="module")
def kang(kang_file: Path) -> AnnData:
    adata = ad.read_h5ad(kang_file)
    return adata[::9].copy()


@pytest.fixture
def adata() -> AnnData:
    counts = np.array([[3, 0, 1, 0], [0, 2, 0, 6], [5, 5, 0, 0]], dtype=np.float64)
    obs = pd.DataFrame({"depth": [8.0, 80.0, 10.0]}, index=list("xyz"))
    return AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=["g1", "g2", "g3", "g4"]))


def fingerprint(adata: AnnData) -> tuple:
    return (adata.X.dtype, adata.X.data.tobytes(), adata.X.indices.tobytes(), adata.X.indptr.tobytes(), dict(adata.uns))


def test_log_expression_is_scanpys(kang: AnnData) -> None:
    before = fingerprint(kang)
    found = log_expression(kang)
    assert fingerprint(kang) == before
    expected = kang.copy()
    sc.pp.normalize_total(expected, target_sum=1e4)
    sc.pp.log1p(expected)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.toarray(), expected.X.toarray(), rtol=2e-6, atol=1e-6)


def test_chosen_genes_keep_the_library_size_of_all(kang: AnnData) -> None:
    genes = list(kang.var_names[[500, 3, 77]])
    found = log_expression(kang, genes=genes)
    np.testing.assert_array_equal(found.toarray(), log_expression(kang)[:, [500, 3, 77]].toarray())
    # by name, whatever the order of the columns in the file
    shuffled = kang[:, np.random.default_rng(0).permutation(kang.n_vars)].copy()
    np.testing.assert_allclose(log_expression(shuffled, genes=genes).toarray(), found.toarray(), rtol=1e-6)


def test_values_by_hand(adata: AnnData) -> None:
    found = log_expression(adata, target_sum=100).toarray()
    np.testing.assert_allclose(found[0], np.log1p([75, 0, 25, 0]), rtol=1e-6)
    found = log_expression(adata, library_size_key="depth", target_sum=100).toarray()
    np.testing.assert_allclose(found[0], np.log1p([37.5, 0, 12.5, 0]), rtol=1e-6)
    np.testing.assert_allclose(found[1], np.log1p([0, 2.5, 0, 7.5]), rtol=1e-6)


def test_log1p_is_returned_as_it_is_in_memory_of_its_own(adata: AnnData) -> None:
    adata.layers["lognorm"] = log_expression(adata)
    for genes in (None, ["g4", "g1"]):
        found = log_expression(adata, layer="lognorm", scale="log1p", genes=genes)
        columns = [0, 1, 2, 3] if genes is None else [3, 0]
        np.testing.assert_array_equal(found.toarray(), adata.layers["lognorm"].toarray()[:, columns])
        found.data[:] = 0
        assert adata.layers["lognorm"].data.min() > 0


@pytest.mark.parametrize("stored", [np.asarray, sparse.csc_matrix, sparse.csr_array])
@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_storage_of_the_matrix_does_not_matter(adata: AnnData, stored: Callable, dtype: type) -> None:
    counts = adata.X.toarray().astype(dtype)
    adata.layers["counts"] = stored(counts)
    found = log_expression(adata, layer="counts")
    assert found.format == "csr"
    np.testing.assert_allclose(found.toarray(), log_expression(adata).toarray(), rtol=1e-6)
    after = adata.layers["counts"]
    np.testing.assert_array_equal(after.toarray() if sparse.issparse(after) else after, counts)
    assert after.dtype == dtype


def test_entries_stored_twice_count_once_together() -> None:
    # 1 + 3 of gene g1 in one cell: log(1 + 4), not log(2) + log(4)
    twice = sparse.csr_matrix((np.array([1, 3, 2], np.float32), np.array([0, 0, 1]), np.array([0, 3])), shape=(1, 2))
    cell = AnnData(twice.copy(), var=pd.DataFrame(index=["g1", "g2"]))
    before = cell.X.data.copy()
    np.testing.assert_allclose(log_expression(cell, target_sum=6).toarray(), [np.log1p([4, 2])], rtol=1e-6)
    np.testing.assert_array_equal(cell.X.data, before)


def test_raw_matrix_shares_memory_and_changes_nothing(kang: AnnData) -> None:
    before = fingerprint(kang)
    assert np.shares_memory(raw_matrix(kang).data, kang.X.data)
    assert fingerprint(kang) == before


def test_columns_by_name(adata: AnnData) -> None:
    matrix, names = raw_matrix(adata), adata.var_names
    assert columns_by_name(matrix, names, None) is matrix
    assert columns_by_name(matrix, names, list(names)) is matrix
    np.testing.assert_array_equal(columns_by_name(matrix, names, ["g3", "g1"]).toarray(), adata.X.toarray()[:, [2, 0]])
    with pytest.raises(UnknownNameError, match=r"genes='G11' is unknown. Did you mean 'g1'.*1 of 2 genes are missing"):
        columns_by_name(matrix, names, ["g3", "G11"])
    with pytest.raises(ValueError, match=r"var_names repeats \['g1'\].*var_names_make_unique"):
        columns_by_name(matrix, pd.Index(["g1", "g2", "g1", "g4"]), ["g2"])


def test_wrong_values_are_named(adata: AnnData) -> None:
    adata.layers["scaled"] = adata.X.toarray() - 1.5
    with pytest.raises(
        ValueError, match=r"layers\['scaled'\] holds negative values \(least -1.5\).*raw counts or log1p"
    ):
        log_expression(adata, layer="scaled")
    adata.layers["nan"] = np.where(adata.X.toarray() > 4, np.nan, 1)
    with pytest.raises(ValueError, match=r"layers\['nan'\] holds NaN or infinite values"):
        log_expression(adata, layer="nan")
    adata.layers["inf"] = np.where(adata.X.toarray() > 4, np.inf, 1)
    with pytest.raises(ValueError, match=r"NaN or infinite"):
        log_expression(adata, layer="inf")
    with pytest.raises(
        UnknownNameError, match=r"layer='Scaled' is unknown. Did you mean 'scaled'.*Leave it out to use X"
    ):
        log_expression(adata, layer="Scaled")
    with pytest.raises(ValueError, match=r"X is empty"):
        log_expression(AnnData(obs=adata.obs, var=adata.var))


def test_scale_is_stated_and_checked(adata: AnnData) -> None:
    adata.layers["lognorm"] = log_expression(adata)
    with pytest.raises(
        ValueError, match=r"scale='counts' was stated, but layers\['lognorm'\] holds fractions.*'log1p'"
    ):
        log_expression(adata, layer="lognorm")
    adata.layers["high"] = adata.X * 2
    with pytest.raises(ValueError, match=r"scale='log1p' was stated, but layers\['high'\] reaches 12.*'counts'"):
        log_expression(adata, layer="high", scale="log1p")
    with pytest.raises(ValueError, match=r"scale='raw' is unknown. Say 'counts'.*never guessed"):
        log_expression(adata, scale="raw")


def test_log1p_of_another_total_is_refused(kang: AnnData) -> None:
    other = kang.copy()
    sc.pp.normalize_total(other)  # to the median, as scanpy does by default
    median = float(other.X[0].sum())
    sc.pp.log1p(other)
    with pytest.raises(ValueError, match=rf"normalised to {median:.4g} counts each, not to 10000.*target_sum=10000"):
        log_expression(other, scale="log1p")
    genes = other[:, ::3].copy()  # a panel: its totals differ and say nothing
    assert log_expression(genes, scale="log1p").shape == genes.shape
    right = kang.copy()
    sc.pp.normalize_total(right, target_sum=1e4)
    sc.pp.log1p(right)
    np.testing.assert_array_equal(log_expression(right, scale="log1p").toarray(), right.X.toarray())


def test_library_size_must_be_there_and_positive(adata: AnnData) -> None:
    with pytest.raises(UnknownNameError, match=r"library_size_key='dept' is unknown. Did you mean 'depth'"):
        log_expression(adata, library_size_key="dept")
    adata.obs["depth"] = [1.0, 0.0, np.nan]
    with pytest.raises(ValueError, match=r"2 cells have no positive number in obs\[.depth.\], among them \['y', 'z'\]"):
        log_expression(adata, library_size_key="depth")
    adata.obs["depth"] = np.asarray(adata.X.sum(axis=1)).ravel() - [0, 1, 0]
    with pytest.raises(ValueError, match=r"library_size_key='depth' is smaller than what X adds up to in 1 cells.*'y'"):
        log_expression(adata, library_size_key="depth")
    adata.obs["depth"] = ["a", "b", "c"]
    with pytest.raises(ValueError, match=r"library_size_key='depth' is a column of .* not of numbers"):
        log_expression(adata, library_size_key="depth")
    empty = adata.copy()
    empty.X = sparse.csr_matrix(empty.X.multiply([[1], [0], [1]]))
    with pytest.raises(ValueError, match=r"1 cells have no counts, among them \['y'\].*filter_cells"):
        log_expression(empty)


def test_backed_data_is_refused(adata: AnnData, tmp_path: Path) -> None:
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    with pytest.raises(ValueError, match=r"is backed.*to_memory"):
        log_expression(backed)
    backed.file.close()
