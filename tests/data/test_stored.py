from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from virtualcell._errors import UnknownNameError
from virtualcell.data import _stored
from virtualcell.data._expression import Expression
from virtualcell.data._lazy import stored_matrix
from virtualcell.data._stored import row_numbers, row_sums


def make_cells(n: int = 60, n_genes: int = 30) -> AnnData:
    """Counts below 100, none of the cells empty."""
    counts = np.minimum(np.random.default_rng(0).negative_binomial(0.5, 0.1, (n, n_genes)), 99)
    counts[:, 0] += 1
    obs = pd.DataFrame(index=[f"c{i:03d}" for i in range(n)])
    var = pd.DataFrame(index=[f"g{j}" for j in range(n_genes)])
    return AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=obs, var=var)


def read(adata: AnnData, **how: object) -> np.ndarray:
    return Expression(adata, **how).rows().toarray()


def bits(x: np.ndarray) -> np.ndarray:
    assert x.dtype == np.float32
    return x.view(np.int32)


DENSE = [np.asarray, np.asfortranarray]
SPARSE = [sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array, sparse.csc_array]


def doubled(counts: np.ndarray) -> sparse.csr_matrix:
    """Every entry in two halves or as itself and a zero, in an order of no kind."""
    rng = np.random.default_rng(0)
    rows, columns = np.nonzero(counts)
    half = (counts[rows, columns] // 2).astype(counts.dtype)
    order = rng.permutation(2 * len(rows))
    order = order[np.argsort(np.tile(rows, 2)[order], kind="stable")]
    data = np.concatenate([half, counts[rows, columns] - half])[order].astype(counts.dtype)
    indptr = np.concatenate([[0], np.cumsum(2 * np.bincount(rows, minlength=len(counts)))])
    return sparse.csr_matrix((data, np.tile(columns, 2)[order], indptr), shape=counts.shape)


DTYPES = ["int8", "uint16", "int32", "int64", "float32", "float64"]


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [*product([*DENSE, *SPARSE, doubled], DTYPES), *product(DENSE, ["float16", ">f4"])],  # which scipy does not know
)
def test_storage_of_the_matrix_does_not_matter(stored: Callable, dtype: str) -> None:
    adata = make_cells()
    expected = {unit: read(adata, unit=unit) for unit in ("log1p", "log_counts", "counts")}
    counts = adata.X.toarray().astype(dtype)
    adata.layers["other"] = stored(counts)
    before = adata.layers["other"].copy()
    for unit, values in expected.items():
        expression = Expression(adata, layer="other", unit=unit)
        np.testing.assert_array_equal(bits(expression.rows().toarray()), bits(values))
        some = np.array([7, 3, 3, 59])
        np.testing.assert_array_equal(bits(expression.rows(some).toarray()), bits(values[some]))
        blocks = [b.toarray() for _, b in expression.blocks(7)]
        np.testing.assert_array_equal(bits(np.concatenate(blocks)), bits(values))
    after = adata.layers["other"]
    assert type(after) is type(before)
    assert after.dtype == dtype
    pairs = [(after, before)]
    if sparse.issparse(after):
        pairs = [(getattr(after, name), getattr(before, name)) for name in ("data", "indices", "indptr")]
    for a, b in pairs:
        np.testing.assert_array_equal(a, b)


def test_entries_stored_twice_count_once_together() -> None:
    # 1 + 3 of gene g1 in one cell: log(1 + 4), not log(2) + log(4)
    twice = sparse.csr_matrix((np.array([1, 3, 2], np.float32), np.array([0, 0, 1]), np.array([0, 3])), shape=(1, 2))
    cell = AnnData(twice.copy(), var=pd.DataFrame(index=["g1", "g2"]))
    np.testing.assert_allclose(read(cell, target_sum=6), [np.log1p([4, 2])], rtol=1e-6)
    assert cell.X.nnz == 3
    # 100 + 100 is more than the small integers of the file can hold
    small = sparse.csr_matrix((np.array([100, 100], np.int8), np.array([1, 1]), np.array([0, 2])), shape=(1, 2))
    np.testing.assert_array_equal(read(AnnData(small), unit="counts"), [[0, 200]])


def test_views_are_read_as_the_cells_and_genes_that_they_show() -> None:
    adata = make_cells()
    for whole in (adata, AnnData(adata.X.toarray(), obs=adata.obs, var=adata.var)):
        view = whole[whole.obs_names[[30, 2, 5]], ["g0", "g7", "g3"]]
        assert view.is_view
        np.testing.assert_array_equal(bits(read(view)), bits(read(view.copy())))
        assert view.is_view


def test_a_large_dense_matrix_is_turned_some_cells_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_stored, "BLOCK", 7)
    adata = make_cells()
    dense = AnnData(adata.X.toarray(), obs=adata.obs, var=adata.var)
    np.testing.assert_array_equal(bits(read(dense)), bits(read(adata)))
    assert stored_matrix(dense, None, "X").rows(np.zeros(0, int)).shape == (0, 30)


@pytest.mark.parametrize(
    "part", [slice(3, 9), slice(None), slice(5, None), slice(9, 3), slice(0, 50, 7), slice(50, 99)]
)
def test_rows_in_one_piece(part: slice) -> None:
    adata = make_cells()
    found = stored_matrix(adata, None, "X").rows(part)
    np.testing.assert_array_equal(found.toarray(), adata.X.toarray()[part])
    assert found.has_canonical_format


def test_what_is_stored_by_columns_is_turned_when_it_is_read() -> None:
    adata = make_cells()
    adata.X = adata.X.tocsc()
    matrix = stored_matrix(adata, None, "X")
    assert matrix._stored is adata.X
    first = matrix.rows(None)
    assert np.shares_memory(first.data, matrix.rows(None).data)  # once
    assert adata.X.format == "csc"


def test_row_starts_of_64_bits_do_not_make_every_read_a_pass() -> None:
    adata = make_cells()
    expected = adata.X.toarray()[[3, 1]]
    adata.X.indptr = adata.X.indptr.astype(np.int64)
    matrix = stored_matrix(adata, None, "X")
    np.testing.assert_array_equal(matrix.rows(np.array([3, 1])).toarray(), expected)
    assert matrix._stored.indptr.dtype == matrix._stored.indices.dtype
    assert np.shares_memory(matrix._stored.data, adata.X.data)
    assert adata.X.indptr.dtype == np.int64  # the data are left as they are


def test_row_sums_are_exact() -> None:
    rng = np.random.default_rng(0)
    values = rng.random((5, 9000)).astype(np.float32)
    values[[0, 3]] = 0
    block = sparse.csr_matrix(values)
    np.testing.assert_allclose(row_sums(block), values.astype(np.float64).sum(axis=1), rtol=1e-14)
    # so that the order of genes in a file makes no difference
    np.testing.assert_array_equal(row_sums(block[:, rng.permutation(9000)]), row_sums(block))
    assert row_sums(sparse.csr_matrix((3, 4), dtype=np.float32)).tolist() == [0, 0, 0]


def test_row_numbers() -> None:
    mask = [True, False, True]
    for rows in (mask, np.array(mask), pd.Series(mask), [0, 2], np.array([0, -1], np.int8)):
        assert row_numbers(rows, 3).tolist() == [0, 2]
    assert row_numbers([], 3).tolist() == []
    for wrong in ([True, False], [3], [0.5]):
        with pytest.raises(IndexError):
            row_numbers(wrong, 3)


def test_what_is_not_there() -> None:
    adata = make_cells()
    with pytest.raises(UnknownNameError, match=r"layer='Raw' is unknown. .*Leave it out to use X"):
        stored_matrix(adata, "Raw", "layers['Raw']")
    with pytest.raises(ValueError, match="X of observed is empty"):
        stored_matrix(AnnData(obs=adata.obs, var=adata.var), None, "X of observed")
