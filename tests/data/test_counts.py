from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import sparse

from virtualcell.data._counts import NoCountsError, averaged, counts_of, depth_matched_counts, library_of, log_of

GENES = [f"G{i}" for i in range(40)]


@pytest.fixture
def share() -> np.ndarray:
    share = np.random.default_rng(1).lognormal(sigma=1.5, size=len(GENES))
    share[5] = 0
    return share / share.sum()


def repeated(share: np.ndarray, n: int) -> sparse.csr_matrix:
    return sparse.csr_matrix(np.tile(np.log1p(1e4 * share), (n, 1)).astype(np.float32))


@pytest.mark.parametrize("sampling", ["systematic", "multinomial"])
def test_totals_are_the_depths_and_means_are_kept(share, sampling):
    depths = np.random.default_rng(0).integers(1, 3000, size=4000)
    counts = depth_matched_counts(repeated(share, 4000), depths, genes=GENES, sampling=sampling)
    dense = counts.toarray().astype(np.float64)
    np.testing.assert_array_equal(dense.sum(axis=1), depths)
    np.testing.assert_array_equal(dense, np.rint(dense))
    assert counts.dtype == np.float32
    assert (counts.data > 0).all()
    error = np.sqrt(share * (1 - share) / depths.sum())  # of the multinomial, the noisier of the two
    assert (np.abs(dense.sum(axis=0) / depths.sum() - share) <= 4 * error).all()


def test_multinomial_has_the_variance_of_counting(share):
    counts = depth_matched_counts(repeated(share, 6000), [500] * 6000, genes=GENES, sampling="multinomial").toarray()
    expected = 500 * share * (1 - share)
    seen = counts.var(axis=0)
    kept = expected > 0.05
    np.testing.assert_allclose(seen[kept], expected[kept], rtol=0.15)
    # drawn together, counts of two genes are anticorrelated: -N p q
    first, second = np.argsort(share)[-2:]
    covariance = np.cov(counts[:, first], counts[:, second])[0, 1]
    assert covariance == pytest.approx(-500 * share[first] * share[second], rel=0.25)


def test_systematic_rounds_up_or_down_with_the_least_variance(share):
    mean = 500 * share
    counts = depth_matched_counts(repeated(share, 6000), [500] * 6000, genes=GENES, sampling="systematic").toarray()
    assert (np.abs(counts - mean) < 1 + 1e-3).all()
    fraction = mean - np.floor(mean)
    np.testing.assert_allclose(counts.var(axis=0), fraction * (1 - fraction), atol=0.02)


def test_systematic_gives_real_counts_back_and_multinomial_doubles_their_noise(share):
    rng = np.random.default_rng(3)
    real = rng.multinomial(800, share, size=3000)
    log = sparse.csr_matrix(np.log1p(real / real.sum(axis=1, keepdims=True) * 1e4).astype(np.float32))
    back = depth_matched_counts(log, real.sum(axis=1), genes=GENES).toarray()
    assert (back == real).all(axis=1).mean() > 0.99
    again = depth_matched_counts(log, real.sum(axis=1), genes=GENES, sampling="multinomial").toarray()
    kept = 800 * share > 1
    assert np.median(again.var(axis=0)[kept] / real.var(axis=0)[kept]) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("sampling", ["systematic", "multinomial"])
def test_order_of_genes_does_not_matter_and_the_seed_does(share, sampling):
    log = repeated(share, 30)
    order = np.random.default_rng(2).permutation(len(GENES))
    counts = depth_matched_counts(log, [200] * 30, genes=GENES, sampling=sampling, seed=4)
    shuffled = depth_matched_counts(log[:, order], [200] * 30, genes=np.array(GENES)[order], sampling=sampling, seed=4)
    np.testing.assert_array_equal(shuffled.toarray(), counts[:, order].toarray())
    other = depth_matched_counts(log, [200] * 30, genes=GENES, sampling=sampling, seed=5)
    assert (other != counts).nnz


def test_cells_of_several_blocks_keep_their_order(share, monkeypatch):
    monkeypatch.setattr("virtualcell.data._counts._ROWS", 4)
    depths = np.arange(1, 12)
    counts = depth_matched_counts(repeated(share, 11), depths, genes=GENES)
    np.testing.assert_array_equal(counts.toarray().sum(axis=1), depths)


def test_a_cell_that_expresses_nothing_is_an_error(share):
    log = repeated(share, 3).tolil()
    log[1] = 0
    with pytest.raises(ValueError, match="cell 1 of predicted expresses nothing"):
        depth_matched_counts(log.tocsr(), [10] * 3, genes=GENES)


def test_counts_and_library_sizes_are_read_off_logarithms():
    rng = np.random.default_rng(5)
    library = rng.integers(500, 20_000, size=200).astype(float)
    counts = sparse.csr_matrix(rng.poisson(rng.lognormal(0, 1.5, size=(200, 40))).astype(np.float32))
    counts[0] = 0
    counts.eliminate_zeros()
    log = log_of(counts, library)
    found = library_of(log)
    np.testing.assert_array_equal(found[1:], library[1:])
    assert found[0] == np.rint(np.median(library[1:]))  # of a cell that tells nothing
    np.testing.assert_array_equal(counts_of(log, found).toarray(), counts.toarray())
    assert (log_of(counts_of(log, found), found) != log).nnz == 0


def test_the_smallest_value_may_be_two_counts_where_genes_were_left_out():
    counts, library = sparse.csr_matrix(np.array([[2, 3, 7], [2, 4, 0]], np.float32)), np.array([3000.0, 4000.0])
    log = log_of(counts, library)
    found = library_of(log)
    np.testing.assert_array_equal(found, [3000, 2000])  # all even: taken for half as many
    np.testing.assert_allclose(log_of(counts_of(log, found), found).toarray(), log.toarray(), atol=1e-6)


def test_corrected_expression_holds_no_counts(share):
    log = repeated(share, 5)
    with pytest.raises(NoCountsError, match=r"5 of 5 cells are not made of whole counts.*scale='counts'.*emit='mean'"):
        library_of(log)


def test_averages_are_of_four_cells_of_the_group(share):
    rate = np.arange(1.0, 13.0)[:, None] * np.array([1.0, 0, 10])
    groups = np.repeat([0, 1, 2], [5, 5, 2])
    means = np.expm1(averaged(sparse.csr_matrix(np.log1p(rate)), groups).toarray())
    for group in range(3):
        own, theirs = rate[groups == group, 0], means[groups == group, 0]
        np.testing.assert_allclose(theirs.mean(), own.mean(), rtol=1e-5)
        assert theirs.min() >= own.min() - 1e-5
        assert theirs.var() < own.var()
    np.testing.assert_allclose(means[groups == 2, 0], 11.5, rtol=1e-5)  # fewer cells than four
    np.testing.assert_allclose(means[:, 2], 10 * means[:, 0], rtol=1e-5)


def test_reading_off_library_sizes_leaves_the_matrix_as_it_is() -> None:
    """Rows whose entries are in no order, as some tools leave them, share their places with what is computed."""
    counts = np.random.default_rng(0).poisson(1.0, (20, 30))
    log = sparse.csr_matrix(np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True)))
    turned = [np.arange(a, b)[::-1] for a, b in itertools.pairwise(log.indptr)]
    log = sparse.csr_matrix((log.data[np.concatenate(turned)], log.indices[np.concatenate(turned)], log.indptr))
    before = log.indices.copy(), log.data.copy()
    np.testing.assert_array_equal(library_of(log), counts.sum(axis=1))
    np.testing.assert_array_equal(log.indices, before[0])
    np.testing.assert_array_equal(log.data, before[1])
