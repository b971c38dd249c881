from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from virtualcell.data import _sentences
from virtualcell.data._sentences import sentences


def naive(matrix: sparse.csr_matrix, tokens: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Plain sorting of (value, token) pairs, cell by cell."""
    out_tokens = np.full((matrix.shape[0], length), -1)
    out_values = np.zeros((matrix.shape[0], length))
    for i, row in enumerate(matrix.toarray()):
        pairs = sorted((-x, t) for x, t in zip(row, tokens, strict=True) if t >= 0 and x > 0)[:length]
        for j, (x, t) in enumerate(pairs):
            out_tokens[i, j], out_values[i, j] = t, -x
    return out_tokens, out_values


def counts(n_cells: int, n_genes: int, seed: int = 0) -> tuple[sparse.csr_matrix, np.ndarray]:
    rng = np.random.default_rng(seed)
    matrix = sparse.csr_matrix(rng.poisson(0.7, (n_cells, n_genes)).astype(np.float32))
    tokens = rng.permutation(10 * n_genes)[:n_genes]
    tokens[rng.random(n_genes) < 0.2] = -1
    return matrix, tokens


@pytest.mark.parametrize("length", [1, 17, 60, 500])
@pytest.mark.parametrize("kind", ["counts", "fractions"])
def test_equal_to_plain_sorting(length: int, kind: str) -> None:
    matrix, tokens = counts(40, 120)
    if kind == "fractions":
        matrix.data *= np.random.default_rng(1).random(matrix.nnz, dtype=np.float32) * 1e-3
    found_tokens, found_values = sentences(matrix, tokens, length)
    assert found_tokens.dtype == np.int32
    assert found_values.dtype == np.float32
    for found, expected in zip((found_tokens, found_values), naive(matrix, tokens, length), strict=True):
        np.testing.assert_array_equal(found, expected.astype(found.dtype))


def test_order_of_genes_and_cells_and_block_size_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, tokens = counts(30, 100)
    expected = sentences(matrix, tokens, 50)
    rng = np.random.default_rng(2)
    rows, columns = rng.permutation(30), rng.permutation(100)
    monkeypatch.setattr(_sentences, "_BLOCK_ENTRIES", 250)
    found = sentences(matrix[rows][:, columns], tokens[columns], 50)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs[rows])


def test_explicit_zeros_duplicates_and_unsorted_columns_leave_the_input_alone() -> None:
    # One cell: gene 2 is stored twice (1 + 3), gene 1 is a stored zero, and the columns are not in order.
    data, indices = np.array([3.0, 0.0, 1.0, 2.0], np.float32), np.array([2, 1, 2, 0], np.int32)
    matrix = sparse.csr_matrix((data.copy(), indices.copy(), np.array([0, 4])), shape=(1, 3))
    found_tokens, found_values = sentences(matrix, np.array([5, 6, 7]), 3)
    assert found_tokens.tolist() == [[7, 5, -1]]
    assert found_values.tolist() == [[4, 2, 0]]
    np.testing.assert_array_equal(matrix.data, data)
    np.testing.assert_array_equal(matrix.indices, indices)


def test_cells_without_genes() -> None:
    found_tokens, found_values = sentences(sparse.csr_matrix((3, 4), dtype=np.float32), np.arange(4), 2)
    assert (found_tokens == -1).all()
    assert (found_values == 0).all()
    assert sentences(sparse.csr_matrix((0, 4), dtype=np.float32), np.arange(4), 2)[0].shape == (0, 2)
